"""What mixers that keep their tokens in slots share: the masks they refuse, and a call's mask in additive form.

`ctx.shared` keys are those of `attention`, so that the layers of a hybrid make each mask once. This file knows no mixer.
"""

import torch
from torch import Tensor

from fewstep.core.mixer import Blocks, Causal, Context, Full, Window
from fewstep.nn.masks import allowed
from fewstep.nn.slots import Slots


def check_mask(kind: str, mask: object, masks: frozenset[type]) -> None:
    """Raises ValueError for a mask that a mixer does not take."""
    if type(mask) not in masks:
        known = ", ".join(sorted(each.__name__ for each in masks))
        raise ValueError(f"mask={type(mask).__name__}: {kind} takes {known}; choose one of them")


def cached_window(mask: object) -> int | None:
    """The window of a cached call, None for an unlimited one. Raises ValueError for a mask that looks ahead."""
    if not isinstance(mask, Causal | Window):
        raise ValueError(f"mask={type(mask).__name__}: a cached call is causal; use forward for a bidirectional pass")
    return mask.size if isinstance(mask, Window) else None


def parallel_seen(ctx: Context, x: Tensor) -> Tensor | None:
    """[1 or B,1,T,T] bool: which keys the queries of tokens [B,T,D] see in a parallel pass; None: all."""
    if isinstance(ctx.mask, Full) and ctx.segments is None:
        return None
    key = ("attention", ctx.mask if isinstance(ctx.mask, Window) else type(ctx.mask), "seen")
    if key not in ctx.shared:
        ctx.shared[key] = allowed(ctx.mask, x.shape[1], ctx.segments, x.device)
    seen: Tensor = ctx.shared[key]
    return seen


def parallel_bias(ctx: Context, q: Tensor) -> Tensor:
    """[1 or B,1,T,T] added to the scores of queries [B,H,T,E] in a parallel pass."""
    key = ("attention", ctx.mask if isinstance(ctx.mask, Window) else type(ctx.mask))
    if key not in ctx.shared:
        ctx.shared[key] = additive(allowed(ctx.mask, q.shape[2], ctx.segments, q.device), q.dtype)
    bias: Tensor = ctx.shared[key]
    return bias


def cached_bias(ctx: Context, slots: Slots, q: Tensor, window: int | None) -> Tensor | None:
    """[B,1,T,end] added to the scores of the last T pending nodes' queries [B,H,T,E]; None: they see everything."""
    key = ("attention", window, "additive")
    if key not in ctx.shared:
        visible = _visible(ctx, slots, q.shape[2], window)
        ctx.shared[key] = None if visible is None else additive(visible, q.dtype)
    bias: Tensor | None = ctx.shared[key]
    return bias


def cached_visible(ctx: Context, slots: Slots, count: int, window: int | None) -> Tensor | None:
    """[B,1,T,end] bool for the last `count` pending nodes, as the kernels take it; None: they see everything."""
    key = ("attention", window, "visible")
    if key not in ctx.shared:
        ctx.shared[key] = _visible(ctx, slots, count, window)
    visible: Tensor | None = ctx.shared[key]
    return visible


def _visible(ctx: Context, slots: Slots, count: int, window: int | None) -> Tensor | None:
    """[B,1,count,end] bool for the last `count` pending nodes over all slots; None: they see everything.

    Under `Blocks` a call ends where a block does, or its nodes are dropped: each sees what is committed and the pending nodes of
    its own and earlier blocks.
    """
    if not isinstance(ctx.mask, Blocks):
        return slots.visible(count, window)
    device, pending = slots.lengths.device, slots.pending
    committed = torch.arange(slots.base, device=device) < slots.lengths[:, None]
    block = slots.index // ctx.mask.size
    seen = block[:, None] <= block[:, pending - count :, None]
    if slots.parent is not None:
        own = torch.eye(pending, dtype=torch.bool, device=device)[pending - count :]
        seen = (seen & (slots.parent > -2)[:, None]) | own  # padding sees itself alone, so that no row is empty
    return torch.cat([committed[:, None].expand(-1, count, -1), seen], 2)[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` holds and -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
