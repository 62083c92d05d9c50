"""FlashAttention in Triton, forward and backward: tiles of scores live in on-chip memory and are never written out.

The twin is `fewstep.nn.flash`, which checks the arguments. In backward one kernel takes queries over their keys and another keys
over their queries, so that no two programs add to one gradient but a bias's. Knows tensors. Does not know mixers.
"""

from typing import Any, final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewstep.nn.triton.scores import LOG2E, Plan, apart_by, keys_of, logits, queries_of, view_bias
from fewstep.nn.triton.tiles import View, configs, dense, lanes, load, on, precision, store, zeros

SHARED = 232448  # bytes a block may have on Hopper; a device with less refuses what is too large for it


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    segments: Tensor | tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `fewstep.nn.flash.flash_attention`, for q, k and v of one dtype: float16, bfloat16 or float32.

    Cost: as there; memory in backward is one number a query and head beyond the gradients. Tiles are skipped that causality
    hides, or that lie outside a segment's first and last tokens. A bias's gradient is summed in no fixed order.
    Source: Dao 2023, arXiv 2307.08691, algorithms 1 and 2. Differs: backward is two kernels; the paper's adds dq up atomically.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if scale < 0:
        q, scale = -q, -scale
    pair = (segments, segments) if isinstance(segments, Tensor) else segments
    return _Flash.apply(dense(q), dense(k), dense(v), bias, pair, causal, scale)


@final
class _Flash(torch.autograd.Function):
    """q [B,H,T,E], k, v, bias -> outputs [B,H,T,F] and logarithms of sums [B,H,T]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *given: Any) -> tuple[Tensor, Tensor]:
        pair, causal, scale = given
        (batch, heads, queries, width), values = q.shape, v.shape[3]
        share, kind = heads // k.shape[1], precision(q.dtype)
        plan = Plan(heads, share, width, values, lanes(width), lanes(values), causal, kind, str(q.dtype))
        apart, sizes = None if pair is None else apart_by(*pair), (queries, k.shape[2], scale)
        y, lse = q.new_empty(batch, heads, queries, values), q.new_empty(batch, heads, queries, dtype=torch.float32)
        inputs = (_view(q), _view(k), _view(v), view_bias(bias, queries))
        with on(q):
            _attend[lambda tile: (triton.cdiv(queries, tile["ROWS"]), batch * heads)](inputs, (_view(y), lse), apart, sizes, plan)
        ctx.plan, ctx.apart, ctx.sizes = plan, apart, sizes
        ctx.save_for_backward(q, k, v, bias, y, lse)
        return y, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, y, lse = ctx.saved_tensors
        (queries, keys, _), (batch, groups) = ctx.sizes, k.shape[:2]
        dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
        dbias = torch.zeros(bias.shape, device=q.device) if bias is not None and ctx.needs_input_grad[3] else None
        inputs = (_view(q), _view(k), _view(v), view_bias(bias, queries))
        known = (_view(dense(dy)), lse, delta)
        made = (_view(y), dlse.contiguous(), _view(dq), view_bias(dbias, queries))
        with on(q):
            _to_queries[lambda tile: (triton.cdiv(queries, tile["ROWS"]), batch * ctx.plan.heads)](
                inputs, known, made, ctx.apart, ctx.sizes, ctx.plan
            )
            _to_keys[lambda tile: (triton.cdiv(keys, tile["COLUMNS"]), batch * groups)](
                inputs, known, (_view(dk), _view(dv)), ctx.apart, ctx.sizes, ctx.plan
            )
        return dq, dk, dv, None if dbias is None or bias is None else dbias.to(bias.dtype), None, None, None


def _view(x: Tensor) -> View:
    return View(x, *x.stride()[:3])


def _fitting(choices: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """Of the tiles to choose from those that shared memory holds: one that stays, and a stage each of those that pass by.

    To compile the others takes long and is in vain. A float32 is taken apart for its three products.
    """
    plan, found = arguments["PLAN"], []
    both, size = plan.lanes + plan.value_lanes, 6 if plan.dtype == "torch.float32" else 2
    stays = plan.lanes if "outputs" in arguments else both
    for choice in choices:
        small, large = sorted(choice.kwargs.values())
        if (large * stays + choice.num_stages * small * both) * size <= SHARED:
            found.append(choice)
    return found or choices[-1:]


def _zero_bias(arguments: dict[str, Any], reset_only: bool = False) -> None:
    """Between the runs of a search for the best tiles: the gradient of a bias is added to."""
    dbias = arguments["made"][3]
    if dbias is not None:
        dbias.at.zero_()


@triton.autotune(
    configs(("ROWS", "COLUMNS"), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
    key=["PLAN"],
    prune_configs_by={"early_config_prune": _fitting},
)
@triton.jit
def _attend(
    inputs: tl.tuple,
    outputs: tl.tuple,
    apart: tl.tuple,
    sizes: tl.tuple,
    PLAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A block of queries over the keys they see: running maximum, sum and weighted values."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # of a triangle, the longest rows first
    place = ((tl.program_id(1) // PLAN.heads).to(tl.int64), tl.program_id(1) % PLAN.heads)
    rows = block * ROWS + tl.arange(0, ROWS)
    q = load(inputs[0], place, rows, sizes[0], tl.arange(0, PLAN.lanes), PLAN.width)
    first, full, end = keys_of(block * ROWS, place, apart, sizes, PLAN, ROWS, COLUMNS)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    carry = (zeros(ROWS, PLAN.value_lanes), tl.zeros([ROWS], tl.float32), largest)
    scene = (inputs, apart, sizes, place)
    carry = _over_keys(carry, q, rows, scene, (first, full), PLAN, False, COLUMNS)
    y, total, largest = _over_keys(carry, q, rows, scene, (full, end), PLAN, True, COLUMNS)
    total = tl.where(total == 0, 1.0, total)
    store(outputs[0], place, rows, sizes[0], tl.arange(0, PLAN.value_lanes), y / total[:, None], PLAN.values)
    at = (place[0] * PLAN.heads + place[1]) * sizes[0] + rows
    tl.store(outputs[1] + at, (largest + tl.log2(total)) / LOG2E, mask=rows < sizes[0])


@triton.jit
def _over_keys(
    carry: tl.tuple,
    q: tl.tensor,
    rows: tl.tensor,
    scene: tl.tuple,
    span: tl.tuple,
    PLAN: tl.constexpr,
    MASKED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Tiles of keys from span[0] to span[1]; MASKED: of which something may be hidden."""
    inputs, _, sizes, place = scene
    _, k, v, bias = inputs
    shared, keys, scale = (place[0], place[1] // PLAN.share), sizes[1], sizes[2]
    y, total, largest = carry
    for start in range(span[0], span[1], COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k_tile = load(k, shared, columns, keys, tl.arange(0, PLAN.lanes), PLAN.width)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PLAN.precision)
        if MASKED or bias is not None:
            scores = logits(scores, scene, rows[:, None], columns[None, :], PLAN, MASKED)
            new = tl.maximum(largest, tl.max(scores, 1))
            finite = tl.where(new == -float("inf"), 0.0, new)
            p = tl.exp2(scores - finite[:, None])
        else:  # the factor and the difference are one instruction
            new = tl.maximum(largest, tl.max(scores, 1) * (scale * LOG2E))
            finite = new
            p = tl.exp2(scores * (scale * LOG2E) - finite[:, None])
        fading = tl.exp2(largest - finite)
        v_tile = load(v, shared, columns, keys, tl.arange(0, PLAN.value_lanes), PLAN.values)
        y = tl.dot(p.to(v_tile.dtype), v_tile, y * fading[:, None], input_precision=PLAN.precision)
        total = total * fading + tl.sum(p, 1)
        largest = new
    return y, total, largest


@triton.autotune(
    configs(("ROWS", "COLUMNS"), (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2), (32, 32, 4, 1)),
    key=["PLAN"],
    prune_configs_by={"early_config_prune": _fitting},
    pre_hook=_zero_bias,
)
@triton.jit
def _to_queries(
    inputs: tl.tuple,
    known: tl.tuple,
    made: tl.tuple,
    apart: tl.tuple,
    sizes: tl.tuple,
    PLAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The gradients of a block of queries and of the bias; and delta, by which its weights are pulled down, for `_to_keys`."""
    dy, lse, delta = known
    y, dlse, dq, dbias = made
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    place = ((tl.program_id(1) // PLAN.heads).to(tl.int64), tl.program_id(1) % PLAN.heads)
    rows = block * ROWS + tl.arange(0, ROWS)
    at, inside = (place[0] * PLAN.heads + place[1]) * sizes[0] + rows, rows < sizes[0]
    q = load(inputs[0], place, rows, sizes[0], tl.arange(0, PLAN.lanes), PLAN.width)
    dy_tile = load(dy, place, rows, sizes[0], tl.arange(0, PLAN.value_lanes), PLAN.values)
    y_tile = load(y, place, rows, sizes[0], tl.arange(0, PLAN.value_lanes), PLAN.values)
    pull = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1) - tl.load(dlse + at, mask=inside, other=0.0)
    tl.store(delta + at, pull, mask=inside)
    fixed = (q, dy_tile, _finite(lse, at, inside), pull, rows)
    first, full, end = keys_of(block * ROWS, place, apart, sizes, PLAN, ROWS, COLUMNS)
    scene, total = (inputs, apart, sizes, place), zeros(ROWS, PLAN.lanes)
    total = _back_over_keys(total, fixed, scene, dbias, (first, full), PLAN, False, COLUMNS)
    total = _back_over_keys(total, fixed, scene, dbias, (full, end), PLAN, True, COLUMNS)
    store(dq, place, rows, sizes[0], tl.arange(0, PLAN.lanes), total * sizes[2], PLAN.width)


@triton.jit
def _back_over_keys(
    dq: tl.tensor,
    fixed: tl.tuple,
    scene: tl.tuple,
    dbias: tl.tuple,
    span: tl.tuple,
    PLAN: tl.constexpr,
    MASKED: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """As `_over_keys`, with the softmax known."""
    q, dy, lse, pull, rows = fixed
    inputs, _, sizes, place = scene
    _, k, v, _ = inputs
    shared, queries, keys = (place[0], place[1] // PLAN.share), sizes[0], sizes[1]
    for start in range(span[0], span[1], COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k_tile = load(k, shared, columns, keys, tl.arange(0, PLAN.lanes), PLAN.width)
        v_tile = load(v, shared, columns, keys, tl.arange(0, PLAN.value_lanes), PLAN.values)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PLAN.precision)
        p = tl.exp2(logits(scores, scene, rows[:, None], columns[None, :], PLAN, MASKED) - lse[:, None])
        ds = p * (tl.dot(dy, tl.trans(v_tile), input_precision=PLAN.precision) - pull[:, None])
        if dbias is not None:
            at = dbias.at + place[0] * dbias.batch + place[1] * dbias.head
            at += rows[:, None].to(tl.int64) * dbias.query + columns[None, :].to(tl.int64) * dbias.key
            tl.atomic_add(at, ds, mask=(rows < queries)[:, None] & (columns < keys)[None, :])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PLAN.precision)
    return dq


@triton.autotune(
    configs(("ROWS", "COLUMNS"), (64, 128, 8, 3), (64, 64, 4, 3), (32, 64, 4, 2), (32, 32, 4, 1)),
    key=["PLAN"],
    prune_configs_by={"early_config_prune": _fitting},
)
@triton.jit
def _to_keys(
    inputs: tl.tuple,
    known: tl.tuple,
    made: tl.tuple,
    apart: tl.tuple,
    sizes: tl.tuple,
    PLAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The gradients of a block of keys and values, summed over the heads that share them."""
    groups = PLAN.heads // PLAN.share
    batch, group = (tl.program_id(1) // groups).to(tl.int64), tl.program_id(1) % groups
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = load(inputs[1], (batch, group), columns, sizes[1], tl.arange(0, PLAN.lanes), PLAN.width)
    v = load(inputs[2], (batch, group), columns, sizes[1], tl.arange(0, PLAN.value_lanes), PLAN.values)
    first, full, end = queries_of(tl.program_id(0) * COLUMNS, batch, apart, sizes, PLAN, ROWS, COLUMNS)
    carry = (zeros(COLUMNS, PLAN.lanes), zeros(COLUMNS, PLAN.value_lanes))
    for member in range(PLAN.share):
        scene = (inputs, apart, sizes, (batch, group * PLAN.share + member))
        carry = _over_queries(carry, (k, v, columns), scene, known, (first, full), PLAN, True, ROWS)
        carry = _over_queries(carry, (k, v, columns), scene, known, (full, end), PLAN, False, ROWS)
    store(made[0], (batch, group), columns, sizes[1], tl.arange(0, PLAN.lanes), carry[0] * sizes[2], PLAN.width)
    store(made[1], (batch, group), columns, sizes[1], tl.arange(0, PLAN.value_lanes), carry[1], PLAN.values)


@triton.jit
def _over_queries(
    carry: tl.tuple,
    fixed: tl.tuple,
    scene: tl.tuple,
    known: tl.tuple,
    span: tl.tuple,
    PLAN: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """Tiles of queries, keys down and queries across, so that no tile of weights is turned."""
    dk, dv = carry
    k, v, columns = fixed
    dy, lse, delta = known
    inputs, _, sizes, place = scene
    q, queries = inputs[0], sizes[0]
    for start in range(span[0], span[1], ROWS):
        rows = start + tl.arange(0, ROWS)
        at, inside = (place[0] * PLAN.heads + place[1]) * queries + rows, rows < queries
        q_tile = load(q, place, rows, queries, tl.arange(0, PLAN.lanes), PLAN.width)
        dy_tile = load(dy, place, rows, queries, tl.arange(0, PLAN.value_lanes), PLAN.values)
        scores = tl.dot(k, tl.trans(q_tile), input_precision=PLAN.precision)
        scores = logits(scores, scene, rows[None, :], columns[:, None], PLAN, MASKED)
        p = tl.exp2(scores - _finite(lse, at, inside)[None, :])
        dv = tl.dot(p.to(dy_tile.dtype), dy_tile, dv, input_precision=PLAN.precision)
        pull = tl.load(delta + at, mask=inside, other=0.0)
        ds = p * (tl.dot(v, tl.trans(dy_tile), input_precision=PLAN.precision) - pull[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PLAN.precision)
    return dk, dv


@triton.jit
def _finite(lse: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Logarithms of sums to base 2; 0 for a query that sees nothing, whose scores are -inf."""
    sums = tl.load(lse + at, mask=inside, other=0.0)
    return tl.where(sums == -float("inf"), 0.0, sums * LOG2E)
