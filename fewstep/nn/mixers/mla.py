"""Multi-head latent attention: keys and values of all heads are read off one small latent, which alone is cached.

Whole sequences materialise keys and values; cached calls move the projections to the queries' side (absorption), so that a step
reads the latents and nothing else. This file knows no position encoding but its contract.
"""

from dataclasses import replace
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from fewstep.core.mixer import Aux, Causal, Context, Dense, Full, Window
from fewstep.core.position import NoPosition, fitted
from fewstep.core.recipe import Config
from fewstep.nn import kernels
from fewstep.nn.mixers.attention import AttentionState, few
from fewstep.nn.mixers.attention_whole import fused_attention, whole_attention
from fewstep.nn.mixers.placed import Places, cached_places, own_places, placed_scores
from fewstep.nn.mixers.scores import cached_bias, cached_visible, cached_window, check_mask
from fewstep.nn.slots import Slots


@final
class MLAConfig(Config):
    """Multi-head latent attention. DeepSeek-V2 has 128 heads, latents of 512 and 1536 (queries), widths 128 (content), 64, 128.

    `latent`: numbers of the keys' and values' latent (None: a quarter of the width). `query_latent`: of the queries' (None:
    they are projected at once). `content_width`, `rotary_width`, `value_width` of a head (None: width / heads); a model's layers
    share one encoding, so beside other mixers `rotary_width` must be their head width.
    """

    kind: ClassVar[str] = "mla"
    source: ClassVar[str] = "DeepSeek-AI 2024, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437"
    claims: ClassVar[tuple[str, ...]] = ("mla-cache",)

    latent: int | None = Field(default=None, ge=1)
    query_latent: int | None = Field(default=None, ge=1)
    content_width: int | None = Field(default=None, ge=1)
    rotary_width: int | None = Field(default=None, ge=1)
    value_width: int | None = Field(default=None, ge=1)
    bias: bool = False
    eps: float = Field(default=1e-6, gt=0)

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        """(heads that are cached, the width that positions turn). Raises ValueError where a default does not divide."""
        if width % heads and None in (self.content_width, self.rotary_width, self.value_width):
            raise ValueError(f"heads={heads}: must divide width={width}; choose a divisor or set the three widths of a head")
        return 1, self.rotary_width or width // heads

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "MLA":
        return MLA(self, width, heads, position)


@final
class MLA(nn.Module):
    """Latent attention over [B,T,D]; `n`, `r`, `e`: content, rotary and value width of a head, `c` the latent's.

    Score of a pair: (q_n k_n + q_r k_r) / sqrt(n + r), where k_r is shared by the heads. State: c + r numbers per token.
    Cost: materialised 2 T^2 H (n + r + e) and the projections; a cached token over S others 2 H S (2 c + r), without touching
    keys or values. Source: arXiv 2405.04434, section 2.1 and appendix C.
    Differs: rotary pairs lie as the encoding has them (in DeepSeek's weights they are adjacent); without one, keys share k_r
    unturned; encodings that bias the scores see q_r and k_r for queries and keys.
    `ctx.shared` keys: those of `scores`.
    """

    modes = frozenset({"causal", "bidirectional"})
    masks = frozenset({Causal, Window, Full, Dense})
    encodings = frozenset({"rotate", "bias"})

    def __init__(self, config: MLAConfig, width: int, heads: int, position: NoPosition | None) -> None:
        super().__init__()
        self.config, self.heads = config, heads
        self.position = fitted(position, config.kind, self.encodings)
        self.rotary = config.widths(width, heads)[1]
        self.latent = config.latent or max(1, width // 4)
        self.content, self.value = (own or width // heads for own in (config.content_width, config.value_width))
        queries = heads * (self.content + self.rotary)
        self.q_down = nn.Linear(width, config.query_latent, bias=config.bias) if config.query_latent else None
        self.q_norm = nn.RMSNorm(config.query_latent, eps=config.eps) if config.query_latent else None
        self.q = nn.Linear(config.query_latent or width, queries, bias=False)
        self.kv_down = nn.Linear(width, self.latent + self.rotary, bias=config.bias)
        self.kv_norm = nn.RMSNorm(self.latent, eps=config.eps)
        # a bare matrix, not a layer: absorption reads its parts
        self.kv_up = nn.Parameter(torch.randn(heads * (self.content + self.value), self.latent) * self.latent**-0.5)
        self.out = nn.Linear(heads * self.value, width, bias=config.bias)

    @property
    def scale(self) -> float:
        """1 / sqrt(n + r), whichever form computes the scores."""
        return (self.content + self.rotary) ** -0.5

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> AttentionState:
        # zeros, not empty: a masked slot still enters the weighted sum with weight 0, and 0 x NaN is NaN
        cache = torch.zeros(batch, 1, capacity, self.latent + self.rotary, device=device, dtype=dtype)
        return AttentionState(cache, Slots.empty(batch, capacity, device))

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Aux]:
        assert ctx.positions is not None, "a parallel pass has no state to count positions"
        check_mask(self.config.kind, ctx.mask, self.masks)
        return self._whole(*self.project(x, ctx.positions, ctx), ctx), {}

    def extend(self, x: Tensor, ctx: Context, state: AttentionState) -> tuple[Tensor, AttentionState]:
        window, count = cached_window(ctx.mask), x.shape[1]
        state = state.reserve(ctx.parent, count)
        slots = state.slots
        places = cached_places(ctx, slots, count) if "bias" in self.position.parts else None
        q, new = self.project(x, slots.index[:, -count:] if ctx.positions is None else ctx.positions, ctx)
        state = state.write(new)
        cache = state.cache[:, :, : slots.end]
        kernel = places is None and few(q, count)
        if not kernel and slots.base == 0 and count == slots.end and slots.chain and window is None:
            return self._whole(q, cache, replace(ctx, mask=Causal(), segments=None)), state
        absorbs = slots.base > 0 and self.absorbs(count)
        if places is not None:
            added = self._added(q, cache, cached_visible(ctx, slots, count, window), places)
            return self.out(self.absorbed(q, cache, added) if absorbs else self.materialised(q, cache, added)), state
        if kernel or absorbs:
            return self.out(self.absorbed(q, cache, cached_visible(ctx, slots, count, window))), state
        return self.out(self.materialised(q, cache, cached_bias(ctx, slots, q, window))), state

    def absorbs(self, count: int) -> bool:
        """Whether absorption multiplies less for `count` tokens: wider scores against expanding every cached latent."""
        materialised = self.content + self.rotary + self.value
        return count * (2 * (self.latent + self.rotary) - materialised) < self.latent * (self.content + self.value)

    def project(self, x: Tensor, positions: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries [B,H,T,n+r], their last part turned, and what is cached [B,1,T,c+r]: the normed latent and the turned key."""
        latent = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q = self.q(latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        content, q_turn = q.split([self.content, self.rotary], -1)
        c, k_turn = self.kv_down(x).unsqueeze(1).split([self.latent, self.rotary], -1)
        q_turn, k_turn = self.position.rotate(q_turn, k_turn, positions, positions, ctx.shared)
        return torch.cat([content, q_turn], -1), torch.cat([self.kv_norm(c), k_turn], -1)

    def expanded(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B,H,S,n+r] and values [B,H,S,e] of every head, made from the `cache` [B,1,S,c+r]."""
        c, k_turn = cache.split([self.latent, self.rotary], -1)
        kv = linear(c.squeeze(1), self.kv_up).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        content, v = kv.split([self.content, self.value], -1)
        return torch.cat([content, k_turn.expand(-1, self.heads, -1, -1)], -1), v

    def materialised(self, q: Tensor, cache: Tensor, bias: Tensor | None) -> Tensor:
        """[B,T,H e] attention over what is made from the `cache`; `bias` is added to the scores, the mask in it."""
        return fused_attention(q, *self.expanded(cache), bias, scale=self.scale).transpose(1, 2).flatten(2)

    def absorbed(self, q: Tensor, cache: Tensor, mask: Tensor | None) -> Tensor:
        """The same, each latent serving as key and value of all heads: q' = W_UK q before, W_UV after the weighted sum.

        `mask` [B or 1,H or 1,T,S]: bool, the tokens that are seen, or numbers added to the scores; None: every token is seen.
        """
        keys, values = self.kv_up.unflatten(0, (self.heads, -1)).split([self.content, self.value], 1)
        content, turned = q.split([self.content, self.rotary], -1)
        q = torch.cat([_by_head(content, keys), turned], -1)
        if few(q, q.shape[2]) and (mask is None or mask.dtype == torch.bool):
            y = kernels.attend(q, cache, cache, mask, scale=self.scale).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        else:
            y = scaled_dot_product_attention(q, cache, cache, attn_mask=mask, scale=self.scale, enable_gqa=True)
        return _by_head(y[..., : self.latent], values.mT).transpose(1, 2).flatten(2)

    def _whole(self, q: Tensor, cache: Tensor, ctx: Context) -> Tensor:
        """[B,T,D] over whole sequences."""
        bias = self._added(q, cache, None, own_places(ctx)) if "bias" in self.position.parts else None
        y = whole_attention(q, *self.expanded(cache), ctx, bias, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))

    def _added(self, q: Tensor, cache: Tensor, seen: Tensor | None, places: Places) -> Tensor | None:
        """What an encoding that biases adds to the scores, with -inf where a key is not `seen` [B or 1,1,T,S].

        It reads the turned parts; the queries are such that its 1 / sqrt(r) becomes the 1 / sqrt(n + r) of all scores.
        """
        q_turn, k_turn = q[..., self.content :] * (self.rotary**0.5 * self.scale), cache[..., self.latent :]
        return placed_scores(self.position, q_turn, k_turn, seen, places)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [B,H,T,A] times each head's own matrix of `weight` [H,A,C]: [B,H,T,C]."""
    return (x.transpose(0, 1).flatten(1, 2) @ weight).unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)
