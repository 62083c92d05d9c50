"""Softmax attention: grouped queries, optional query-key norm and sliding window.

This file knows no position encoding but its contract, and keeps keys already rotated. Which kernel attends over whole sequences
is told by `attention_whole`; encodings that read the weights have them computed.
"""

from dataclasses import replace
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.mixer import Aux, Blocks, Causal, Context, Dense, Full, Mask, Window
from fewstep.core.position import NoPosition, fitted
from fewstep.core.recipe import Config
from fewstep.nn import kernels
from fewstep.nn.mixers.attention_whole import fused_attention, whole_attention
from fewstep.nn.mixers.placed import cached_places, own_places, placed_attention
from fewstep.nn.mixers.scores import cached_bias, cached_visible, parallel_seen
from fewstep.nn.slots import Slots


@final
class AttentionConfig(Config):
    """Multi-head or grouped-query softmax attention. None means: as many key-value heads as heads; width / heads."""

    kind: ClassVar[str] = "attention"
    source: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762; GQA arXiv 2305.13245; query-key norm arXiv 2302.05442"
    claims: ClassVar[tuple[str, ...]] = ("recall", "flash-memory")

    kv_heads: int | None = Field(default=None, ge=1)
    head_width: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1)
    qk_norm: bool = False
    bias: bool = False
    out_bias: bool = False
    eps: float = Field(default=1e-6, gt=0)

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        """(key-value heads, head width) for a model of `width` with `heads`. Raises ValueError where they do not divide."""
        kv_heads = self.kv_heads or heads
        if heads % kv_heads:
            raise ValueError(f"kv_heads={kv_heads}: must divide heads={heads}; choose a divisor")
        if self.head_width is None and width % heads:
            raise ValueError(f"heads={heads}: must divide width={width}; choose a divisor or set head_width")
        return kv_heads, self.head_width or width // heads

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "Attention":
        return Attention(self, width, heads, position or NoPosition())


FEW = 64  # tokens up to which a CPU decodes with the kernels, whose results do not depend on what shares the call


def few(x: Tensor, count: int) -> bool:
    """Whether `count` tokens with activations `x` are decoded with the kernels."""
    return count <= FEW and not torch.is_grad_enabled() and x.is_cpu and x.dtype in kernels.DTYPES and kernels.available()


@final
class AttentionState:
    """Keys and values [B,2G,S,E] (keys first) and their slot table. Cost: 2 G E numbers per token."""

    def __init__(self, cache: Tensor, slots: Slots, caches: kernels.Caches | None = None) -> None:
        """`caches`: the kernel's view of the same cache, if it was made before."""
        self.cache, self.slots = cache, slots
        self._caches = caches

    @property
    def caches(self) -> kernels.Caches | None:
        """The kernel's view of the cache, None where it is not one of its own."""
        if self._caches is None and kernels.Caches.fits(self.cache):
            self._caches = kernels.Caches([self.cache])
        return self._caches

    def reserve(self, parent: Tensor | None, count: int) -> "AttentionState":
        """With `count` pending nodes whose slots are still to be written. Raises ValueError over capacity."""
        return AttentionState(self.cache, self.slots.extend(parent, count), self._caches)

    def write(self, new: Tensor) -> "AttentionState":
        """With `new` [B,2G,T,E] in the last slots in use."""
        end = self.slots.end
        start = end - new.shape[2]
        if torch.is_grad_enabled() or self.cache.requires_grad:
            return AttentionState(torch.cat([self.cache[:, :, :start], new, self.cache[:, :, end:]], 2), self.slots)
        self.cache[:, :, start:end] = new
        return self

    def commit(self, path: Tensor, keep: Tensor) -> "AttentionState":
        slots = self.slots.commit(path, keep)
        if self._caches is not None:
            self._caches.keep(self.slots.base, self.slots.lengths, path, keep)
            return AttentionState(self.cache, slots, self._caches)
        moves = self.slots.moves(path, keep)
        return AttentionState(self.cache if moves is None else moves.apply(self.cache), slots)

    def rollback(self) -> "AttentionState":
        return AttentionState(self.cache, self.slots.rollback(), self._caches)

    def fork(self, rows: Tensor) -> "AttentionState":
        return AttentionState(self.cache.index_select(0, rows), self.slots.fork(rows))

    def join(self, other: "AttentionState") -> "AttentionState":
        slots = self.slots.join(other.slots)
        return AttentionState(torch.cat([_grown(self.cache, slots.capacity), _grown(other.cache, slots.capacity)]), slots)

    def nbytes(self) -> int:
        return self.cache.nbytes


def _grown(cache: Tensor, capacity: int) -> Tensor:
    return nn.functional.pad(cache, (0, 0, 0, capacity - cache.shape[2]))


@final
class Attention(nn.Module):
    """Softmax attention over [B,T,D]. Cost: 4 T^2 D per row in the parallel form.

    `ctx.shared` keys: ("attention", ...), those of `scores` and `placed`.
    """

    modes = frozenset({"causal", "bidirectional"})
    masks = frozenset({Causal, Window, Full, Dense})
    encodings = frozenset({"rotate", "bias", "value"})

    def __init__(self, config: AttentionConfig, width: int, heads: int, position: NoPosition) -> None:
        super().__init__()
        self.config, self.heads = config, heads
        self.position = fitted(position, config.kind, self.encodings)
        self._biased = not self.position.parts.isdisjoint({"bias", "value"})
        self.kv_heads, self.head_width = config.widths(width, heads)
        self.qkv = nn.Linear(width, (heads + 2 * self.kv_heads) * self.head_width, bias=config.bias)
        self.out = nn.Linear(heads * self.head_width, width, bias=config.out_bias)
        self.q_norm = nn.RMSNorm(self.head_width, eps=config.eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_width, eps=config.eps) if config.qk_norm else None

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> AttentionState:
        # zeros, not empty: a masked slot still enters the weighted sum with weight 0, and 0 x NaN is NaN
        cache = torch.zeros(batch, 2 * self.kv_heads, capacity, self.head_width, device=device, dtype=dtype)
        return AttentionState(cache, Slots.empty(batch, capacity, device))

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Aux]:
        assert ctx.positions is not None, "a parallel pass has no state to count positions"
        q, kv = self._project(x, ctx.positions, ctx)
        k, v = kv.split(self.kv_heads, 1)
        return self._attend_whole(q, k, v, replace(ctx, mask=self._mask(ctx))), {}

    def extend(self, x: Tensor, ctx: Context, state: AttentionState) -> tuple[Tensor, AttentionState]:
        window, count = self._window(ctx), x.shape[1]
        state = state.reserve(ctx.parent, count)
        slots = state.slots
        places = cached_places(ctx, slots, count) if self._biased else None
        q, kv = self._project(x, slots.index[:, -count:] if ctx.positions is None else ctx.positions, ctx)
        state = state.write(kv)
        k, v = state.cache[:, :, : slots.end].split(self.kv_heads, 1)
        kernel = places is None and few(q, count)
        blocks = isinstance(ctx.mask, Blocks)
        if not kernel and not blocks and slots.base == 0 and count == slots.end and slots.chain and window is None:
            return self._attend_whole(q, k, v, replace(ctx, mask=Causal(), segments=None)), state
        if places is not None:
            y = placed_attention(self.position, q, k, v, cached_visible(ctx, slots, count, window), places)
        elif kernel:
            return self.out(kernels.attend(q, k, v, cached_visible(ctx, slots, count, window))), state
        else:
            y = fused_attention(q, k, v, cached_bias(ctx, slots, q, window))
        return self.out(y.transpose(1, 2).flatten(2)), state

    def _window(self, ctx: Context) -> int | None:
        if isinstance(ctx.mask, Blocks):  # a cached call takes it: earlier blocks never see later ones
            return None
        mask = self._mask(ctx)
        if not isinstance(mask, Causal | Window):
            raise ValueError(f"mask={type(mask).__name__}: a cached call is causal; use forward for a bidirectional pass")
        return mask.size if isinstance(mask, Window) else None

    def _mask(self, ctx: Context) -> Mask:
        window = self.config.window
        if isinstance(ctx.mask, Causal | Window) and window is not None:
            return Window(min(window, ctx.mask.size) if isinstance(ctx.mask, Window) else window)
        if type(ctx.mask) not in self.masks:
            known = ", ".join(sorted(mask.__name__ for mask in self.masks))
            raise ValueError(f"mask={type(ctx.mask).__name__}: attention takes {known}; choose one of them")
        return ctx.mask

    def _project(self, x: Tensor, positions: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """q [B,H,T,E] and keys beside values [B,2G,T,E], normed and turned by position."""
        batch, count, _ = x.shape
        heads = self.qkv(x).view(batch, count, self.heads + 2 * self.kv_heads, self.head_width).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.position.rotate(q, k, positions, positions, ctx.shared)
        return q, torch.cat([k, v], 1)

    def _attend_whole(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        """[B,T,D] over whole sequences; an encoding that changes values has all weights computed."""
        if "value" in self.position.parts:
            y = placed_attention(self.position, q, k, v, parallel_seen(ctx, q[:, 0]), own_places(ctx))
        else:
            bias = self.position.bias(q, k, *own_places(ctx)) if self._biased else None
            y = whole_attention(q, k, v, ctx, bias)
        return self.out(y.transpose(1, 2).flatten(2))
