"""The selective scan of Mamba in Triton, forward and backward: chunks of tokens side by side, the states between them in turn.

The twin is `fewstep.nn.kernels.scan`, which checks the arguments. First every chunk sums what it leaves behind, then those are
carried from chunk to chunk, then each chunk runs from the state it was given. Backward does the same from the end. Knows
tensors. Does not know mixers.
"""

from typing import Any, NamedTuple, final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewstep.nn.triton.tiles import INTERPRETED, on

CHUNK = tl.constexpr(8 if INTERPRETED else 32)  # tokens between kept states
TILE = tl.constexpr(4 if INTERPRETED else 64)  # channels


@final
class _Plan(NamedTuple):
    """What a kernel is compiled and timed for: channels, states of each, and whether it runs from the last token to the first."""

    width: int
    states: int
    backward: bool


def selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, begins: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `fewstep.nn.kernels.scan.selective_scan`, for tensors of one dtype: float16, bfloat16 or float32; sums are in float32.

    Cost: as there, with a second exponential an element; memory for backward is a 32nd of the states, in backward four of those.
    Source: Gu & Dao 2023, arXiv 2312.00752, section 3.3.2; the scan within a chunk is that of Blelloch 1990.
    """
    run = torch.zeros(u.shape[:2], dtype=torch.int32, device=u.device) if begins is None else begins.cumsum(1, dtype=torch.int32)
    return _Scan.apply(*(x.contiguous() for x in (u, delta, a, b, c, start)), run)


@final
class _Scan(torch.autograd.Function):
    """u, delta [B,T,D], a [N,D], b, c [B,T,N], start [B,N,D], runs [B,T] -> y [B,T,D] and the states after the last token."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        u, delta, a, b, c, start, run = tensors
        kept, last = _carried(u, delta, a, b, start, run, backward=False)
        y = torch.empty_like(u)
        with on(u):
            _read[_grid(u)]((u, delta, a, b, c, run), kept, y, (u.shape[1], kept.shape[1]), _Plan(u.shape[2], a.shape[0], False))
        ctx.save_for_backward(*tensors, kept)
        return y, last.to(start.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, a, b, c, start, run, kept = ctx.saved_tensors
        dy = dy.contiguous()
        dkept, dstart = _carried(dy, delta, a, c, dlast.contiguous(), run, backward=True)
        (batch, count, width), states, chunks = u.shape, a.shape[0], kept.shape[1]
        du, ddelta = torch.empty_like(u), torch.empty_like(delta)
        da = u.new_empty(batch, chunks, states, width, dtype=torch.float32)
        db, dc = u.new_empty(2, triton.cdiv(width, TILE.value), batch, count, states, dtype=torch.float32)
        made = (du, ddelta, da, db, dc)
        with on(u):
            _back[_grid(u)]((u, delta, a, b, c, run, dy), (kept, dkept), made, (count, chunks), _Plan(width, states, True))
        return du, ddelta, da.sum((0, 1)).to(a.dtype), db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype), dstart.to(start.dtype), None


def _grid(u: Tensor) -> tuple[int, int, int]:
    return triton.cdiv(u.shape[1], CHUNK.value), triton.cdiv(u.shape[2], TILE.value), u.shape[0]


def _carried(
    x: Tensor, delta: Tensor, a: Tensor, weights: Tensor, start: Tensor, run: Tensor, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """What is carried into each chunk [B,C,N,D], float32, and out of the last one, in the order they are run."""
    (batch, count, width), states = x.shape, a.shape[0]
    chunks, plan = _grid(x)[0], _Plan(width, states, backward)
    kept, last = x.new_empty(batch, chunks, states, width, dtype=torch.float32), torch.empty_like(start, dtype=torch.float32)
    with on(x):
        _leave[_grid(x)]((x, delta, a, weights, run), kept, (count, chunks), plan)
        lanes = triton.next_power_of_2(states)
        _carry[(1, *_grid(x)[1:])]((delta, a, run), (start, last), kept, (count, chunks), plan, lanes)
    return kept, last


@triton.jit
def _tile(
    x: tl.tensor, batch: tl.tensor, tokens: tl.tensor, count: tl.tensor, channels: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    """[tokens,channels] of x [B,T,D], float32, zeros beyond."""
    at = x + (batch * count + tokens[:, None]) * WIDTH + channels[None, :]
    inside = ((tokens >= 0) & (tokens < count))[:, None] & (channels < WIDTH)[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _column(x: tl.tensor, batch: tl.tensor, tokens: tl.tensor, count: tl.tensor, n: tl.tensor, STATES: tl.constexpr) -> tl.tensor:
    """[tokens,1] of x [B,T,N], the same."""
    return tl.load(x + (batch * count + tokens) * STATES + n, mask=tokens < count, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _begins(run: tl.tensor, batch: tl.tensor, tokens: tl.tensor, count: tl.tensor) -> tl.tensor:
    """[tokens,1] which of them know none before them."""
    at, inside = run + batch * count + tokens, tokens < count
    return (tl.load(at, mask=inside, other=0) != tl.load(at - 1, mask=inside & (tokens > 0), other=0))[:, None] & inside[:, None]


@triton.jit
def _step(a: tl.tensor, b: tl.tensor, next_a: tl.tensor, next_b: tl.tensor) -> tl.tensor:
    """Two steps h -> a h + b in one."""
    return a * next_a, next_a * b + next_b


@triton.jit
def _leave(given: tl.tuple, kept: tl.tensor, sizes: tl.tuple, PLAN: tl.constexpr) -> None:
    """What the tokens of a chunk leave for those behind it (backward: before it), each faded from its place to the border."""
    x, delta, a, weights, run = given
    count, chunks = sizes
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    tokens, channels = chunk * CHUNK + tl.arange(0, CHUNK), tl.program_id(1) * TILE + tl.arange(0, TILE)
    step, left = _tile(delta, batch, tokens, count, channels, PLAN.width), _tile(x, batch, tokens, count, channels, PLAN.width)
    runs = tl.load(run + batch * count + tokens, mask=tokens < count, other=-1)
    before, behind = _borders(run, batch, chunk, count)
    way = tl.cumsum(step, 0)
    if PLAN.backward:
        left = tl.where((runs == before)[:, None], left, 0.0)
    else:
        left, way = tl.where((runs == behind)[:, None], left * step, 0.0), tl.sum(step, 0)[None, :] - way
    for n in range(PLAN.states):
        rate = tl.load(a + n * PLAN.width + channels, mask=channels < PLAN.width, other=0.0).to(tl.float32)
        weight = _column(weights, batch, tokens, count, n, PLAN.states)
        at = kept + ((batch * chunks + chunk) * PLAN.states + n) * PLAN.width + channels
        tl.store(at, tl.sum(left * weight * tl.exp(rate[None, :] * way), 0), mask=channels < PLAN.width)


@triton.jit
def _borders(run: tl.tensor, batch: tl.tensor, chunk: tl.tensor, count: tl.tensor) -> tl.tensor:
    """The run that is carried into a chunk, and the one that goes on behind it."""
    before = tl.load(run + batch * count + chunk * CHUNK - 1, mask=chunk > 0, other=0)
    return before, tl.load(run + batch * count + tl.minimum((chunk + 1) * CHUNK, count) - 1)


@triton.jit
def _carry(given: tl.tuple, ends: tl.tuple, kept: tl.tensor, sizes: tl.tuple, PLAN: tl.constexpr, LANES: tl.constexpr) -> None:
    """From chunk to chunk: what a chunk left is read where what is carried into it is kept."""
    delta, a, run = given
    count, chunks = sizes
    batch, states = tl.program_id(2).to(tl.int64), tl.arange(0, LANES)
    channels = tl.program_id(1) * TILE + tl.arange(0, TILE)
    cells = states[:, None] * PLAN.width + channels[None, :]
    inside = (states < PLAN.states)[:, None] & (channels < PLAN.width)[None, :]
    rate = tl.load(a + cells, mask=inside, other=0.0).to(tl.float32)
    state = tl.load(ends[0] + batch * (PLAN.states * PLAN.width) + cells, mask=inside, other=0.0).to(tl.float32)
    for i in range(chunks):
        chunk = i
        if PLAN.backward:
            chunk = chunks - 1 - i
        at = kept + (batch * chunks + chunk) * (PLAN.states * PLAN.width) + cells
        left = tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)
        step = _tile(delta, batch, chunk * CHUNK + tl.arange(0, CHUNK), count, channels, PLAN.width)
        before, behind = _borders(run, batch, chunk, count)
        state = left + tl.where(before == behind, state * tl.exp(rate * tl.sum(step, 0)[None, :]), 0.0)
    tl.store(ends[1] + batch * (PLAN.states * PLAN.width) + cells, state, mask=inside)


@triton.jit
def _read(given: tl.tuple, kept: tl.tensor, y: tl.tensor, sizes: tl.tuple, PLAN: tl.constexpr) -> None:
    """What the tokens of a chunk read of the states, which run through it."""
    u, delta, a, b, c, run = given
    count, chunks = sizes
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    tokens, channels = chunk * CHUNK + tl.arange(0, CHUNK), tl.program_id(1) * TILE + tl.arange(0, TILE)
    step, begins = _tile(delta, batch, tokens, count, channels, PLAN.width), _begins(run, batch, tokens, count)
    put, found = _tile(u, batch, tokens, count, channels, PLAN.width) * step, tl.zeros([CHUNK, TILE], tl.float32)
    for n in range(PLAN.states):
        rate = tl.load(a + n * PLAN.width + channels, mask=channels < PLAN.width, other=0.0).to(tl.float32)
        at = kept + ((batch * chunks + chunk) * PLAN.states + n) * PLAN.width + channels
        carried = tl.load(at, mask=channels < PLAN.width, other=0.0)
        decay = tl.where(begins, 0.0, tl.exp(rate[None, :] * step))
        through, state = tl.associative_scan((decay, put * _column(b, batch, tokens, count, n, PLAN.states)), 0, _step)
        found += (state + through * carried[None, :]) * _column(c, batch, tokens, count, n, PLAN.states)
    at = y + (batch * count + tokens[:, None]) * PLAN.width + channels[None, :]
    tl.store(at, found.to(y.dtype.element_ty), mask=(tokens < count)[:, None] & (channels < PLAN.width)[None, :])


@triton.jit
def _back(given: tl.tuple, carried: tl.tuple, made: tl.tuple, sizes: tl.tuple, PLAN: tl.constexpr) -> None:
    """All gradients of a chunk: its states again, then their gradients from behind."""
    u, delta, a, b, c, run, dy = given
    du, ddelta, da, db, dc = made
    count, chunks = sizes
    chunk, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    order = tl.arange(0, CHUNK)
    tokens, channels = chunk * CHUNK + order, block * TILE + tl.arange(0, TILE)
    later = tl.where(order < CHUNK - 1, tokens + 1, count)  # behind the last token nothing fades
    there = channels < PLAN.width
    u_tile, dy_tile = _tile(u, batch, tokens, count, channels, PLAN.width), _tile(dy, batch, tokens, count, channels, PLAN.width)
    step, next_step = (
        _tile(delta, batch, tokens, count, channels, PLAN.width),
        _tile(delta, batch, later, count, channels, PLAN.width),
    )
    begins, next_begins = _begins(run, batch, tokens, count), _begins(run, batch, later, count)
    du_tile, ddelta_tile = tl.zeros([CHUNK, TILE], tl.float32), tl.zeros([CHUNK, TILE], tl.float32)
    for n in range(PLAN.states):
        rate = tl.load(a + n * PLAN.width + channels, mask=there, other=0.0).to(tl.float32)[None, :]
        at = ((batch * chunks + chunk) * PLAN.states + n) * PLAN.width + channels
        weight = _column(b, batch, tokens, count, n, PLAN.states)
        put = u_tile * step * weight
        through, state = tl.associative_scan((tl.where(begins, 0.0, tl.exp(rate * step)), put), 0, _step)
        state += through * tl.load(carried[0] + at, mask=there, other=0.0)[None, :]
        past = state - put
        asked = dy_tile * _column(c, batch, tokens, count, n, PLAN.states)
        through, dstate = tl.associative_scan(
            (tl.where(next_begins, 0.0, tl.exp(rate * next_step)), asked), 0, _step, reverse=True
        )
        dstate += through * tl.load(carried[1] + at, mask=there, other=0.0)[None, :]
        du_tile += dstate * step * weight
        ddelta_tile += dstate * (rate * past + u_tile * weight)
        tl.store(da + at, tl.sum(dstate * step * past, 0), mask=there)
        at = ((block * tl.num_programs(2) + batch) * count + tokens) * PLAN.states + n
        tl.store(db + at, tl.sum(dstate * step * u_tile, 1), mask=tokens < count)
        tl.store(dc + at, tl.sum(dy_tile * state, 1), mask=tokens < count)
    at, inside = (batch * count + tokens[:, None]) * PLAN.width + channels[None, :], (tokens < count)[:, None] & there[None, :]
    tl.store(du + at, du_tile.to(du.dtype.element_ty), mask=inside)
    tl.store(ddelta + at, ddelta_tile.to(ddelta.dtype.element_ty), mask=inside)
