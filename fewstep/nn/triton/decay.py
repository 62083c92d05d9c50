"""Linear attention with one decay a head in Triton: the state at the border of each chunk, then what the chunks' tokens read.

Two kernels do all of it. Backward is the same recurrence run from the last token to the first, with queries and keys, values and
gradients in each other's place. The twin is `fewstep.nn.decay`. Knows tensors. Does not know mixers.
"""

from typing import Any, NamedTuple, final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewstep.nn.triton.tiles import INTERPRETED, View, configs, dense, load, on, precision, store, zeros

CHUNK = tl.constexpr(16 if INTERPRETED else 64)  # tokens that read one another


@final
class _Plan(NamedTuple):
    """What a kernel is compiled and timed for: x, of width `inner`, is multiplied with a state to give `outer` columns.

    `backward`: from the last token to the first. `turned`: with the state's transpose.
    """

    heads: int
    inner: int
    outer: int
    backward: bool
    turned: bool
    precision: str
    dtype: str


@final
class _Fading(NamedTuple):
    """Logarithms of decays, and how many runs [B,T] (the carried one is run 0) have begun up to each token."""

    log_a: View
    run: View


def sweep(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, start: Tensor, begins: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `fewstep.nn.decay.sweep`, for q, k and v of one dtype: bfloat16 or float32.

    Cost: as there; memory D E / 64 numbers a token and head in q's dtype, twice that in backward, none kept between. Source: Dao
    & Gu 2024, arXiv 2405.21060, section 6; the order of the kernels is that of Yang et al. 2023, arXiv 2312.06635, section 4.
    """
    batch, count, heads, _ = q.shape
    log_a = q.new_zeros((), dtype=torch.float32).expand(batch, count, heads) if log_a is None else log_a.float()
    run = torch.zeros((), dtype=torch.int32, device=q.device).expand(batch, count)
    run = run if begins is None else begins.cumsum(1, dtype=torch.int32)
    return _Sweep.apply(dense(q), dense(k), dense(v), log_a, start.float(), run)


@final
class _Sweep(torch.autograd.Function):
    """q, k [B,T,H,D], v [B,T,H,E], log_a [B,T,H], start [B,H,D,E] -> y [B,T,H,E] and the state after the last token."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_a, start, run = tensors
        states, last = _carried(k, v, log_a, run, start, backward=False)
        ctx.save_for_backward(*tensors)
        return _read((q, k, v), log_a, run, states), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_a, start, run = ctx.saved_tensors
        dy = dense(dy.to(q.dtype))
        states, last = _carried(k, v, log_a, run, start, backward=False)
        dstates, dstart = _carried(q, dy, log_a, run, dlast, backward=True)
        dq = _read((dy, v, k), log_a, run, states, turned=True)
        dk = _read((v, dy, q), log_a, run, dstates, turned=True, backward=True)
        dv = _read((k, q, dy), log_a, run, dstates, backward=True)
        dlog_a = None
        if ctx.needs_input_grad[3]:
            after = torch.cat([_product(states[:, :, 1:], dstates[:, :, :-1]), _product(last, dlast).unsqueeze(2)], 2)
            dlog_a = _faded((q * dq - k * dk).sum(-1, dtype=torch.float32), after, run)
        return dq, dk, dv, dlog_a, dstart, None


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The sums over two matrices' products, element by element."""
    return torch.linalg.vecdot(x.flatten(-2).float(), y.flatten(-2).float())


def _faded(within: Tensor, after: Tensor, run: Tensor) -> Tensor:
    """The gradient of log_a [B,T,H]: what later tokens of the chunk and run leave [B,T,H], and what goes on behind it [B,H,N].

    y depends on decays as q exp(total) and k exp(-total) do, so that a token leaves q dq - k dk for the total up to it.
    """
    (batch, count, heads), chunks = within.shape, after.shape[2]
    rest = chunks * CHUNK.value - count
    within = torch.nn.functional.pad(within, (0, 0, 0, rest)).view(batch, chunks, CHUNK.value, heads)
    pieces = torch.cat([run, run[:, -1:].expand(-1, rest)], 1).view(batch, chunks, CHUNK.value)
    together = (pieces.unsqueeze(3) == pieces.unsqueeze(2)).triu()
    found = together.float() @ within + after.transpose(1, 2).unsqueeze(2) * together[..., -1:]
    found = found.flatten(1, 2)[:, :count]
    first = run.diff(dim=1, prepend=torch.zeros_like(run[:, :1])) > 0  # nothing comes before it that could fade
    return found.masked_fill(first.unsqueeze(-1), 0.0)


def _view(x: Tensor) -> View:
    return View(x, x.stride(0), x.stride(2), x.stride(1))


def _fading(log_a: Tensor, run: Tensor) -> _Fading:
    return _Fading(_view(log_a), View(run, run.stride(0), 0, run.stride(1)))


def _carried(x: Tensor, y: Tensor, log_a: Tensor, run: Tensor, start: Tensor, *, backward: bool) -> tuple[Tensor, Tensor]:
    """What is carried into each chunk [B,H,N,D,E], in x's dtype, and out of the last one; N chunks, in the order they are run."""
    (batch, count, heads, inner), outer = x.shape, y.shape[3]
    chunks = triton.cdiv(count, CHUNK.value)
    plan = _Plan(heads, inner, outer, backward, False, precision(x.dtype), str(x.dtype))
    states, start = x.new_empty(batch, heads, chunks, inner, outer), start.contiguous()
    last = torch.empty_like(start)
    with on(x):
        _carry[lambda tile: (triton.cdiv(inner, tile["INNER"]), triton.cdiv(outer, tile["OUTER"]), batch * heads)](
            (_view(x), _view(y)), _fading(log_a, run), (start, last), states, (count, chunks), plan
        )
    return states, last


def _read(
    given: tuple[Tensor, Tensor, Tensor],
    log_a: Tensor,
    run: Tensor,
    states: Tensor,
    *,
    backward: bool = False,
    turned: bool = False,
) -> Tensor:
    """(x S) + (x z') w over what each token sees: x, z, w [B,T,H,...], a state for each chunk -> [B,T,H,...] like w."""
    x, _, w = given
    (batch, count, heads, inner), outer, chunks = x.shape, w.shape[3], states.shape[2]
    plan = _Plan(heads, inner, outer, backward, turned, precision(x.dtype), str(x.dtype))
    out = x.new_empty(batch, count, heads, outer)
    with on(x):
        _mix[lambda tile: (chunks, triton.cdiv(outer, tile["OUTER"]), batch * heads)](
            tuple(map(_view, given)), _fading(log_a, run), states, _view(out), (count, chunks), plan
        )
    return out


@triton.jit
def _fades(fading: tl.tuple, chunk: tl.tensor, place: tl.tuple, count: tl.tensor, PLAN: tl.constexpr) -> tl.tensor:
    """Of a chunk's tokens: the totals of log_a, the runs, and how what is carried fades to each, from each, and through all.

    What is carried forward comes from before the chunk, and backward from behind it.
    """
    log_a, run = fading
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    at = log_a.at + place[0] * log_a.batch + place[1] * log_a.head + tokens * log_a.token
    steps = tl.load(at, mask=tokens < count, other=0.0)
    total, whole = tl.cumsum(steps, 0), tl.sum(steps, 0)
    at = run.at + place[0] * run.batch
    runs = tl.load(at + tokens * run.token, mask=tokens < count, other=-1)
    before = tl.load(at + (chunk * CHUNK - 1) * run.token, mask=chunk > 0, other=0)
    behind = tl.load(at + (tl.minimum((chunk + 1) * CHUNK, count) - 1) * run.token)
    near = tl.where(runs == before, tl.exp(total), 0.0)
    far = tl.where(runs == behind, tl.exp(whole - total), 0.0)
    through = tl.where(before == behind, tl.exp(whole), 0.0)
    if PLAN.backward:
        return total, runs, far, near, through
    return total, runs, near, far, through


@triton.jit
def _cells(
    state: tl.tensor, index: tl.tensor, rows: tl.tensor, columns: tl.tensor, HIGH: tl.constexpr, WIDE: tl.constexpr
) -> tl.tensor:
    """Addresses of a tile of the dense matrix [HIGH,WIDE] number `index`, and which of them it has."""
    at = state + index * (HIGH * WIDE) + rows[:, None] * WIDE + columns[None, :]
    return at, (rows < HIGH)[:, None] & (columns < WIDE)[None, :]


@triton.autotune(configs(("INNER", "OUTER"), (64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3), (32, 32, 2, 3)), key=["PLAN"])
@triton.jit
def _carry(
    given: tl.tuple,
    fading: tl.tuple,
    ends: tl.tuple,
    states: tl.tensor,
    sizes: tl.tuple,
    PLAN: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
) -> None:
    """A tile of what is carried, over all chunks: it fades, and x' y of each token is added, faded from there to the border."""
    x, y = given
    count, chunks = sizes
    line = tl.program_id(2).to(tl.int64)
    place = (line // PLAN.heads, line % PLAN.heads)
    rows, columns = tl.program_id(0) * INNER + tl.arange(0, INNER), tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    at, inside = _cells(ends[0], line, rows, columns, PLAN.inner, PLAN.outer)
    state = tl.load(at, mask=inside, other=0.0)
    for step in range(chunks):
        chunk = step
        if PLAN.backward:
            chunk = chunks - 1 - step
        here, inside = _cells(states, line * chunks + chunk, rows, columns, PLAN.inner, PLAN.outer)
        tl.store(here, state.to(states.dtype.element_ty), mask=inside)
        _, _, _, leaving, through = _fades(fading, chunk, place, count, PLAN)
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
        x_tile = load(x, place, tokens, count, rows, PLAN.inner)
        y_tile = load(y, place, tokens, count, columns, PLAN.outer)
        faded = (x_tile * leaving[:, None]).to(x_tile.dtype)
        state = tl.dot(tl.trans(faded), y_tile, state * through, input_precision=PLAN.precision)
    at, inside = _cells(ends[1], line, rows, columns, PLAN.inner, PLAN.outer)
    tl.store(at, state, mask=inside)


@triton.autotune(configs(("INNER", "OUTER"), (64, 64, 4, 3), (64, 128, 4, 2), (32, 64, 4, 3), (32, 32, 2, 2)), key=["PLAN"])
@triton.jit
def _mix(
    given: tl.tuple,
    fading: tl.tuple,
    states: tl.tensor,
    out: tl.tuple,
    sizes: tl.tuple,
    PLAN: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
) -> None:
    """Columns of what a chunk's tokens read: of what is carried, and of one another."""
    x, z, w = given
    count, chunks = sizes
    chunk, line = tl.program_id(0), tl.program_id(2).to(tl.int64)
    place, order = (line // PLAN.heads, line % PLAN.heads), tl.arange(0, CHUNK)
    tokens, columns = chunk * CHUNK + order, tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    carried, scores = zeros(CHUNK, OUTER), zeros(CHUNK, CHUNK)
    for begin in range(0, PLAN.inner, INNER):
        rows = begin + tl.arange(0, INNER)
        x_tile = load(x, place, tokens, count, rows, PLAN.inner)
        z_tile = load(z, place, tokens, count, rows, PLAN.inner)
        if PLAN.turned:
            at, inside = _cells(states, line * chunks + chunk, columns, rows, PLAN.outer, PLAN.inner)
            state = tl.trans(tl.load(at, mask=inside, other=0.0))
        else:
            at, inside = _cells(states, line * chunks + chunk, rows, columns, PLAN.inner, PLAN.outer)
            state = tl.load(at, mask=inside, other=0.0)
        carried = tl.dot(x_tile, state, carried, input_precision=PLAN.precision)
        scores = tl.dot(x_tile, tl.trans(z_tile), scores, input_precision=PLAN.precision)
    total, runs, reaching, _, _ = _fades(fading, chunk, place, count, PLAN)
    gap, seen = total[:, None] - total[None, :], order[:, None] >= order[None, :]
    if PLAN.backward:
        gap, seen = -gap, order[:, None] <= order[None, :]
    seen &= runs[:, None] == runs[None, :]
    w_tile = load(w, place, tokens, count, columns, PLAN.outer)
    scores = (scores * tl.exp(tl.where(seen, gap, -float("inf")))).to(w_tile.dtype)
    y = tl.dot(scores, w_tile, carried * reaching[:, None], input_precision=PLAN.precision)
    store(out, place, tokens, count, columns, y, PLAN.outer)
