"""The gated attention unit: one head whose queries and keys are cheap variants of one small base, squared ReLU for softmax, and a
gate that makes the feed-forward network dispensable. In a `Block` the MLP still follows it."""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from fewstep.core.mixer import Aux, Causal, Context, Dense, Full, Window
from fewstep.core.position import NoPosition, Shared, fitted
from fewstep.core.recipe import Config
from fewstep.nn.mixers.attention import AttentionState
from fewstep.nn.mixers.scores import cached_visible, cached_window, check_mask, parallel_seen
from fewstep.nn.recurrent import even_heads
from fewstep.nn.slots import Slots


class GatedConfig(Config):
    """What gated units share. `expand`: inner channels per channel of the width. `base`: s, the width of queries and keys (None:
    width / heads, that of the other mixers of a model; the paper takes 128)."""

    expand: float = Field(default=2.0, gt=0)
    base: int | None = Field(default=None, ge=1)

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        """(1 head, the width of queries and keys). Raises ValueError where the default does not divide."""
        return 1, self.base or even_heads(width, heads)

    def inner(self, width: int) -> int:
        """e, the width of values and gates."""
        return max(1, round(self.expand * width))


@final
class Variants(nn.Module):
    """Queries and keys as gains and offsets of one base, and a relative bias a_i b_j of turned vectors.

    Source: arXiv 2202.10447, sections 2.2 and appendix (code 1, the bias of long sequences).
    """

    def __init__(self, pairs: int, width: int, position: NoPosition) -> None:
        super().__init__()
        self.position = position
        self.gain = nn.Parameter(torch.ones(2, pairs, width) + 0.02 * torch.randn(2, pairs, width))
        self.offset = nn.Parameter(torch.zeros(2, pairs, width))
        self.bias = nn.Parameter(0.02 * torch.randn(2, 1, width))

    def forward(self, base: Tensor, positions: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """base [B,T,s] -> the queries' sides and the keys' [B,pairs+1,T,s], the bias last."""
        varied = base[:, None, None] * self.gain.unsqueeze(2) + self.offset.unsqueeze(2)
        bias = self.bias.unsqueeze(2).expand(len(base), -1, -1, base.shape[1], -1)
        q, k = torch.cat([varied, bias], 2).unbind(1)
        return self.position.rotate(q, k, positions, positions, shared)


def squared_relu(scores: Tensor, seen: Tensor | None) -> Tensor:
    """The attention weights relu(scores)^2, 0 for keys that are not `seen`."""
    weights = scores.relu().square()
    return weights if seen is None else weights.masked_fill(~seen, 0.0)


@final
class GAUConfig(GatedConfig):
    """The gated attention unit."""

    kind: ClassVar[str] = "gau"
    source: ClassVar[str] = "Hua et al. 2022, arXiv 2202.10447"
    claims: ClassVar[tuple[str, ...]] = ("gau",)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "GAU":
        return GAU(self, width, heads, position)


@final
class GAU(nn.Module):
    """O = (U * A V) W_o with A = relu^2(Q K' / n + b), n the number of keys a query sees: i + 1 in a causal pass.

    U, V [T,e] and the base [T,s] are SiLU projections. Cost: 2 T^2 (s + e) and the projections; state: 2 s + e numbers per token.
    Source: arXiv 2202.10447, figure 2 and eq. 4.
    Differs: a causal row is divided by its own count and not by the length of the sequence, which a step could not know; the
    gains of queries and keys start at 1, not 0, where the weights would start at 0 without a gradient.
    """

    modes = frozenset({"causal", "bidirectional"})
    masks = frozenset({Causal, Window, Full, Dense})
    encodings = frozenset({"rotate"})

    def __init__(self, config: GAUConfig, width: int, heads: int, position: NoPosition | None) -> None:
        super().__init__()
        self.config, (_, self.base), self.inner = config, config.widths(width, heads), config.inner(width)
        self.variants = Variants(1, self.base, fitted(position, config.kind, self.encodings))
        self.uvz = nn.Linear(width, 2 * self.inner + self.base)
        self.out = nn.Linear(self.inner, width)

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> AttentionState:
        cache = torch.zeros(batch, 1, capacity, 2 * self.base + self.inner, device=device, dtype=dtype)
        return AttentionState(cache, Slots.empty(batch, capacity, device))

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Aux]:
        assert ctx.positions is not None, "a parallel pass has no state to count positions"
        check_mask(self.config.kind, ctx.mask, self.masks)
        gate, q, kv = self._project(x, ctx.positions, ctx.shared)
        return self._attend(gate, q, kv, parallel_seen(ctx, x)), {}

    def extend(self, x: Tensor, ctx: Context, state: AttentionState) -> tuple[Tensor, AttentionState]:
        window, count = cached_window(ctx.mask), x.shape[1]
        state = state.reserve(ctx.parent, count)
        slots = state.slots
        positions = slots.index[:, -count:] if ctx.positions is None else ctx.positions
        gate, q, kv = self._project(x, positions, ctx.shared)
        state = state.write(kv.unsqueeze(1))
        return self._attend(gate, q, state.cache[:, 0, : slots.end], cached_visible(ctx, slots, count, window)), state

    def _project(self, x: Tensor, positions: Tensor, shared: Shared) -> tuple[Tensor, Tensor, Tensor]:
        """Gates [B,T,e], queries beside their bias [B,2,T,s], and what is cached [B,T,2s+e]: keys, their bias, values."""
        gate, v, base = silu(self.uvz(x)).split([self.inner, self.inner, self.base], -1)
        q, k = self.variants(base, positions, shared)
        return gate, q, torch.cat([k.transpose(1, 2).flatten(2), v], -1)

    def _attend(self, gate: Tensor, q: Tensor, kv: Tensor, seen: Tensor | None) -> Tensor:
        """[B,T,D] of queries that see the keys `seen` [B or 1,1,T,S] (None: all)."""
        seen = None if seen is None else seen.squeeze(1)
        k, v = kv.split([2 * self.base, self.inner], -1)
        count = k.shape[1] if seen is None else seen.sum(-1, keepdim=True)
        weights = squared_relu(torch.cat([q[:, 0] / count, q[:, 1]], -1) @ k.mT, seen)
        return self.out(gate * (weights @ v))
