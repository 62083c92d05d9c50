"""Softmax attention with what a position encoding adds to scores and outputs, for mixers that keep their tokens in slots.

`ctx.shared` keys are those of `attention`. This file knows no mixer, and of encodings their contract alone.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewstep.core.mixer import Context
from fewstep.core.position import NoPosition
from fewstep.nn.mixers.scores import additive
from fewstep.nn.slots import Slots

Places = tuple[Tensor, Tensor]  # the positions of queries [B or 1,Q] and of keys [B or 1,K]


def placed_attention(position: NoPosition, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, places: Places) -> Tensor:
    """[B,H,Q,E] of queries [B,H,Q,E] over the keys and values [B,G,K,E] that are `seen` [B or 1,1,Q,K] (None: all).

    Cost: that of the encoding, and of PyTorch's fused kernel with a mask of numbers; the weights are held where the encoding
    changes values.
    """
    added, groups = placed_scores(position, q, k, seen, places), q.shape[1] // k.shape[1]
    if "value" not in position.parts:
        return scaled_dot_product_attention(q, k, v, attn_mask=added, enable_gqa=groups > 1)
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = (scores if added is None else scores + added).softmax(-1)
    y, more = weights @ v, position.value(weights, *places)
    return y if more is None else y + more


def placed_scores(position: NoPosition, q: Tensor, k: Tensor, seen: Tensor | None, places: Places) -> Tensor | None:
    """What is added to the scores of queries [B,H,Q,E] and keys [B,G,K,E]: the encoding's bias, -inf for keys not `seen`."""
    bias = position.bias(q, k, *places)
    if bias is None:
        return None if seen is None else additive(seen, q.dtype)
    return bias.to(q.dtype) if seen is None else bias.to(q.dtype).masked_fill(~seen, float("-inf"))


def own_places(ctx: Context) -> Places:
    """The positions of queries and keys of a parallel pass: one row where all rows have the same."""
    key = ("attention", "places")
    if key not in ctx.shared:
        assert ctx.positions is not None, "a parallel pass has no state to count positions"
        first = ctx.positions[:1]
        places = first if torch.equal(first.expand_as(ctx.positions), ctx.positions) else ctx.positions
        ctx.shared[key] = places, places
    both: Places = ctx.shared[key]
    return both


def cached_places(ctx: Context, slots: Slots, count: int) -> Places:
    """The positions of the last `count` pending nodes and of all slots: one row where all rows have the same.

    Raises ValueError for positions of the caller's own: those of the cached keys are not kept, for they are their slots.
    """
    key = ("attention", "places")
    if key not in ctx.shared:
        if ctx.positions is not None and not _are_counted(ctx.positions, slots, count):
            raise ValueError("positions: not those that the cache counts, which scores by distance need; leave them out")
        index = slots.index
        if slots.uniform and slots.chain:
            index = index[:1]
        committed = torch.arange(slots.base, device=index.device).expand(index.shape[0], -1)
        ctx.shared[key] = index[:, -count:], torch.cat([committed, index], 1)
    both: Places = ctx.shared[key]
    return both


def _are_counted(positions: Tensor, slots: Slots, count: int) -> bool:
    """Whether `positions` are what the table counts for its last `count` nodes; padding may stand anywhere."""
    if positions.ndim != 2:
        return False
    same = positions == slots.index[:, -count:]
    return bool((same if slots.parent is None else same | (slots.parent[:, -count:] == -2)).all())
