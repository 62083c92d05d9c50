"""Softmax attention in which a token sees the few others that a pattern of places lets it see.

This file knows patterns and position encodings by their contracts.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fewstep.core.mixer import Aux, Causal, Context, Full
from fewstep.core.position import NoPosition, fitted
from fewstep.core.recipe import Config, choice
from fewstep.nn import kernels
from fewstep.nn.mixers.attention import AttentionState, few
from fewstep.nn.mixers.packing import apart
from fewstep.nn.mixers.patterns import PATTERNS, Pattern, Piece, StridedConfig
from fewstep.nn.mixers.placed import cached_places, placed_attention
from fewstep.nn.mixers.scores import additive, cached_window, check_mask
from fewstep.nn.recurrent import even_heads
from fewstep.nn.slots import Slots


@final
class SparseConfig(Config):
    """Sparse attention; `pattern` says which tokens see which."""

    kind: ClassVar[str] = "sparse"
    source: ClassVar[str] = "Child et al. 2019, arXiv 1904.10509"

    pattern: choice(lambda: PATTERNS, "pattern") = StridedConfig()  # type: ignore[valid-type]
    bias: bool = False

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        """(key-value heads, head width). Raises ValueError where they do not divide."""
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "Sparse":
        return Sparse(self, width, heads, position)


@final
class Sparse(nn.Module):
    """Sparse attention over [B,T,D]. Cost: 4 D for each pair of tokens that see each other, and as much again where groups of
    queries share keys that only some of them see; time and memory grow as the pattern does, T sqrt(T) at best.

    State: keys and values of every token, 2 D numbers each, since any of them may be seen again (`strided`, `fixed`, `blocks`)
    and slots are shared with other layers (`window`); a cached call reads them all and hides what the pattern hides. A node of a
    tree stands at committed length + depth. Source: arXiv 1904.10509, section 4.3.
    Differs: every head sees the union of the paper's two steps; in a bidirectional pass the pattern holds to both sides.
    `ctx.shared` keys: ("sparse", pattern, tokens, causal), the pieces of a pass; ("sparse", pattern), the mask of a cached call.
    """

    modes = frozenset({"causal", "bidirectional"})
    masks = frozenset({Causal, Full})
    encodings = frozenset({"rotate", "bias", "value"})

    def __init__(self, config: SparseConfig, width: int, heads: int, position: NoPosition | None) -> None:
        super().__init__()
        self.config, self.heads = config, heads
        self.position = fitted(position, config.kind, self.encodings)
        self._biased = not self.position.parts.isdisjoint({"bias", "value"})
        self.head_width = config.widths(width, heads)[1]
        self.pattern: Pattern = config.pattern
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.out = nn.Linear(width, width, bias=config.bias)

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> AttentionState:
        # zeros, not empty: a masked slot still enters the weighted sum with weight 0, and 0 x NaN is NaN
        cache = torch.zeros(batch, 2 * self.heads, capacity, self.head_width, device=device, dtype=dtype)
        return AttentionState(cache, Slots.empty(batch, capacity, device))

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Aux]:
        assert ctx.positions is not None, "a parallel pass has no state to count positions"
        check_mask(self.config.kind, ctx.mask, self.masks)
        causal = isinstance(ctx.mask, Causal)

        def form(features: Tensor, positions: Tensor) -> Tensor:
            # tables of rotations are made anew where sequences are taken apart: they belong to other tokens
            within = Context(positions, shared=ctx.shared if ctx.segments is None else {})
            q, k, v = self._turn(features, positions, within).chunk(3, 1)
            return self._attend(q, k, v, positions, causal, ctx)

        return self.out(apart(form, self.qkv(x), ctx.positions, ctx.segments, exact=not causal)), {}

    def extend(self, x: Tensor, ctx: Context, state: AttentionState) -> tuple[Tensor, AttentionState]:
        cached_window(ctx.mask)
        check_mask(self.config.kind, ctx.mask, self.masks)
        count = x.shape[1]
        state = state.reserve(ctx.parent, count)
        slots = state.slots
        places = cached_places(ctx, slots, count) if self._biased else None
        positions = slots.index[:, -count:] if ctx.positions is None else ctx.positions
        q, kv = self._turn(self.qkv(x), positions, ctx).split([self.heads, 2 * self.heads], 1)
        state = state.write(kv)
        k, v = state.cache[:, :, : slots.end].chunk(2, 1)
        kernel = places is None and few(q, count)
        if not kernel and slots.base == 0 and count == slots.end and slots.chain:
            return self.out(self._attend(q, k, v, positions, True, ctx)), state
        visible = self._visible(ctx, slots, count)
        if places is not None:
            y = placed_attention(self.position, q, k, v, visible, places)
            return self.out(y.transpose(1, 2).flatten(2)), state
        if kernel:
            return self.out(kernels.attend(q, k, v, visible)), state
        y = scaled_dot_product_attention(q, k, v, attn_mask=additive(visible, q.dtype))
        return self.out(y.transpose(1, 2).flatten(2)), state

    def _turn(self, features: Tensor, positions: Tensor, ctx: Context) -> Tensor:
        """Queries, keys and values [B,3H,T,E] of projected tokens [B,T,3D], turned by position."""
        q, k, v = features.unflatten(2, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        q, k = self.position.rotate(q, k, positions, positions, ctx.shared)
        return torch.cat([q, k, v], 1)

    def _visible(self, ctx: Context, slots: Slots, count: int) -> Tensor:
        """[B,1,count,end] bool for the last `count` pending nodes over all slots."""
        key = ("sparse", self.pattern)
        if key not in ctx.shared:
            committed = torch.arange(slots.base, device=slots.lengths.device).expand(slots.lengths.shape[0], -1)
            places = torch.cat([committed, slots.index], 1)
            visible = self.pattern.sees(slots.index[:, -count:].unsqueeze(2), places.unsqueeze(1)).unsqueeze(1)
            unhidden = slots.visible(count, None)
            ctx.shared[key] = visible if unhidden is None else visible & unhidden
        found: Tensor = ctx.shared[key]
        return found

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, causal: bool, ctx: Context) -> Tensor:
        """[B,T,D] over one sequence a row; q, k, v [B,H,T,E] at `positions` [B,T]."""
        key = ("sparse", self.pattern, q.shape[2], causal)
        if key not in ctx.shared:
            ctx.shared[key] = self.pattern.pieces(q.shape[2], causal, q.device)
        pieces: tuple[Piece, ...] = ctx.shared[key]
        placed = _Placed(self.position, positions) if self._biased else None
        return attend(q, k, v, pieces, placed).transpose(1, 2).flatten(2)


@final
@dataclass(frozen=True, eq=False)
class _Placed:
    """A position encoding and the `positions` [B,T] of tokens: what it adds to a piece, whose groups are rows to it."""

    encoding: NoPosition
    positions: Tensor

    def bias(self, piece: Piece, q: Tensor, k: Tensor) -> Tensor | None:
        """[B,H,G,M,N] for q, k [B,H,T,E]."""
        bias = self.encoding.bias(_rows(piece.pick_queries(q)), _rows(piece.pick_keys(k)), *self._places(piece))
        return None if bias is None else bias.unflatten(0, (len(q), -1)).transpose(1, 2).to(q.dtype)

    def value(self, piece: Piece, weights: Tensor) -> Tensor | None:
        """[B,H,G,M,E] for `weights` [B,H,G,M,N]."""
        value = self.encoding.value(_rows(weights), *self._places(piece))
        return None if value is None else value.unflatten(0, (len(weights), -1)).transpose(1, 2)

    def _places(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """The positions of the queries [B G,M] and of the keys [B G,N]."""
        places = self.positions.unsqueeze(1)
        return _rows(piece.pick_queries(places)).squeeze(1), _rows(piece.pick_keys(places)).squeeze(1)


def _rows(x: Tensor) -> Tensor:
    """[B,H,G,...] -> [B G,H,...]."""
    return x.transpose(1, 2).flatten(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, pieces: tuple[Piece, ...], placed: _Placed | None = None) -> Tensor:
    """[B,H,T,E] softmax attention over the pairs of tokens in `pieces`. Every query must see a key in one of them."""
    scaled, scores = q * q.shape[-1] ** -0.5, []
    for piece in pieces:
        found = piece.pick_queries(scaled) @ piece.pick_keys(k).mT
        if placed is not None and (bias := placed.bias(piece, q, k)) is not None:
            found = found + bias
        scores.append(piece.restore(found.masked_fill(~piece.allowed, -torch.inf)))
    sizes = [piece.keys.shape[1] for piece in pieces]
    weights = torch.cat(scores, -1).softmax(-1, torch.promote_types(q.dtype, torch.float32)).to(q.dtype).split(sizes, -1)
    parts = []
    for piece, held in zip(pieces, weights, strict=True):
        grouped = piece.pick_queries(held)
        y = grouped @ piece.pick_keys(v)
        if placed is not None and (value := placed.value(piece, grouped)) is not None:
            y = y + value
        parts.append(piece.restore(y))
    return torch.stack(parts).sum(0)
