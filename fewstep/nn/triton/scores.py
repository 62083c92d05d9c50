"""Scores of attention in Triton: a tile's logits with bias and what is hidden, and which tiles show anything at all.

Knows tiles. Does not know softmax or gradients.
"""

from typing import Any, NamedTuple, final

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)  # scores are logarithms to base 2: the hardware's exponential is that of 2


@final
class Bias(NamedTuple):
    """A bias on the device and how far its rows, heads, queries and keys lie apart: opposite ways along the last two if it is
    by distance."""

    at: Any
    batch: int
    head: int
    query: int
    key: int


@final
class Apart(NamedTuple):
    """Segments of queries [B,T] and keys [B,S]; the first key of each query's and the end of its keys; the same of each key."""

    query: Tensor
    key: Tensor
    first_key: Tensor
    end_key: Tensor
    first_query: Tensor
    end_query: Tensor


@final
class Plan(NamedTuple):
    """What kernels are compiled and timed for: heads, how many of them share keys, widths and the lanes that hold them."""

    heads: int
    share: int
    width: int
    values: int
    lanes: int
    value_lanes: int
    causal: bool
    precision: str
    dtype: str


def view_bias(bias: Tensor | None, queries: int) -> Bias | None:
    """A bias as `fewstep.nn.flash` takes it, or its gradient; what is broadcast has strides of 0."""
    if bias is None:
        return None
    strides = [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]
    if bias.ndim == 4:
        return Bias(bias, *strides[:2], *bias.stride()[2:])
    step = bias.stride(1)
    return Bias(bias[:, queries - 1 :], 0, strides[0], -step, step)


def apart_by(query: Tensor, key: Tensor) -> Apart:
    """From the segments of queries and of keys, without waiting for the device."""
    query, key = query.int().contiguous(), key.int().contiguous()
    return Apart(query, key, *_range(query, key), *_range(key, query))


def _range(of: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """For each segment `of` [B,T] its first place in `among` [B,S] and one past its last; S and 0 where there is none."""
    order, place = among.sort(dim=1, stable=True)
    left, right = torch.searchsorted(order, of), torch.searchsorted(order, of, right=True)
    none = (left == right) | (of < 0)
    first, last = place.gather(1, left.clamp(max=among.shape[1] - 1)), place.gather(1, (right - 1).clamp(min=0))
    return first.masked_fill(none, among.shape[1]).int(), (last + 1).masked_fill(none, 0).int()


@triton.jit
def logits(
    scores: tl.tensor, scene: tl.tuple, rows: tl.tensor, columns: tl.tensor, PLAN: tl.constexpr, MASKED: tl.constexpr
) -> tl.tensor:
    """Products to base-2 logits, -inf where hidden; rows and columns stand upright and flat, in either order."""
    inputs, apart, sizes, place = scene
    queries, keys, scale = sizes
    bias, batch = inputs[3], place[0]
    scores = scores * (scale * LOG2E)
    if bias is not None:
        at = bias.at + batch * bias.batch + place[1] * bias.head
        at += rows.to(tl.int64) * bias.query + columns.to(tl.int64) * bias.key
        scores += tl.load(at, mask=(rows < queries) & (columns < keys), other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        seen = (columns < keys) & (rows < queries)
        if PLAN.causal:
            seen &= columns <= rows + (keys - queries)
        if apart is not None:
            mine = tl.load(apart.query + batch * queries + rows, mask=rows < queries, other=-1)
            seen &= (mine == tl.load(apart.key + batch * keys + columns, mask=columns < keys, other=-1)) & (mine >= 0)
        scores = tl.where(seen, scores, -float("inf"))
    return scores


@triton.jit
def keys_of(
    start: tl.tensor,
    place: tl.tuple,
    apart: tl.tuple,
    sizes: tl.tuple,
    PLAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Where the keys of a block of queries begin, where from something of a tile may be hidden, and where they end."""
    queries, keys, _ = sizes
    first, full, end = 0, keys, keys
    if PLAN.causal:
        full = tl.minimum(keys, tl.maximum(start + 1 + keys - queries, 0))
        end = tl.minimum(keys, start + ROWS + keys - queries)
    full = full // COLUMNS * COLUMNS
    if apart is not None:
        rows = start + tl.arange(0, ROWS)
        at = place[0] * queries + rows
        first = tl.min(tl.load(apart.first_key + at, mask=rows < queries, other=keys)) // COLUMNS * COLUMNS
        end = tl.minimum(end, tl.max(tl.load(apart.end_key + at, mask=rows < queries, other=0)))
        full = first
    return first, full, end


@triton.jit
def queries_of(
    start: tl.tensor,
    batch: tl.tensor,
    apart: tl.tuple,
    sizes: tl.tuple,
    PLAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Where the queries of a block of keys begin, from where on nothing of a tile is hidden, and where they end."""
    queries, keys, _ = sizes
    first, full, end = 0, 0, queries
    if PLAN.causal:
        first = tl.maximum(start + queries - keys, 0) // ROWS * ROWS
        full = tl.minimum(tl.cdiv(tl.maximum(start + COLUMNS - 1 + queries - keys, 0), ROWS) * ROWS, end)
    if apart is not None:
        columns = start + tl.arange(0, COLUMNS)
        at = batch * keys + columns
        first = tl.maximum(first, tl.min(tl.load(apart.first_query + at, mask=columns < keys, other=queries)) // ROWS * ROWS)
        end = tl.max(tl.load(apart.end_query + at, mask=columns < keys, other=0))
        full = end
    return first, full, end
