"""Mixed chunk attention, the layer of FLASH: gated attention inside a chunk of tokens, linear attention to the chunks before it.

Chunks are counted from the beginning of a sequence, so a node of a tree belongs to the chunk of its place on its own path.
"""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from fewstep.core.mixer import Aux, Causal, Context, Full
from fewstep.core.position import NoPosition, fitted
from fewstep.nn.mixers.gau import GatedConfig, Variants, squared_relu
from fewstep.nn.mixers.packing import apart
from fewstep.nn.mixers.scores import cached_window, check_mask
from fewstep.nn.recurrent import Carry, Inputs, Links, Recurrent, RecurrentState, wide


@final
class MixedChunkConfig(GatedConfig):
    """FLASH's attention over chunks of `size` tokens (the paper: 256)."""

    kind: ClassVar[str] = "mixed_chunk"
    source: ClassVar[str] = "Hua et al. 2022, arXiv 2202.10447, section 3"

    size: int = Field(default=64, ge=1)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "MixedChunk":
        return MixedChunk(self, width, heads, position)


@final
class MixedChunk(Recurrent):
    """O = (U * (A V + Q' sum_g K'_g V_g / C)) W_o with A = relu^2(Q K' / C + b) inside a chunk of C tokens.

    The sum runs over earlier chunks, in a bidirectional pass over all tokens, divided by their number in place of C. Cost: 2 T C
    (s + e) + 4 T s e and the projections. State: s e numbers, and 3 s + e for each token of an unfinished chunk (at most C - 1).
    Source: arXiv 2202.10447, section 3.2 and code 2; the scales are those of the public PyTorch implementation.
    Differs: sums are kept in float32 or wider; gains start as those of `gau`.
    """

    modes = frozenset({"causal", "bidirectional"})
    masks = frozenset({Causal, Full})
    encodings = frozenset({"rotate"})

    def __init__(self, config: MixedChunkConfig, width: int, heads: int, position: NoPosition | None) -> None:
        super().__init__()
        self.config, (_, self.base), self.inner = config, config.widths(width, heads), config.inner(width)
        self.chunk = self.size = config.size
        self.variants = Variants(2, self.base, fitted(position, config.kind, self.encodings))
        self.uvz = nn.Linear(width, 2 * self.inner + self.base)
        self.out = nn.Linear(self.inner, width)

    @property
    def width(self) -> int:
        return self.out.out_features

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Aux]:
        assert ctx.positions is not None, "a parallel pass has no state to count positions"
        check_mask(self.config.kind, ctx.mask, self.masks)
        causal = isinstance(ctx.mask, Causal)

        def form(features: Tensor, positions: Tensor) -> Tensor:
            return self._chunks(self._project(features, positions), causal)

        features = self.features(x)
        return self.finish(apart(form, features, ctx.positions, ctx.segments, exact=not causal), features), {}

    def extend(self, x: Tensor, ctx: Context, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        cached_window(ctx.mask)
        check_mask(self.config.kind, ctx.mask, self.masks)
        return super().extend(x, ctx, state)

    def features(self, x: Tensor) -> Tensor:
        """Gates, values and the base [B,T,2e+s]."""
        return silu(self.uvz(x))

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        return self._project(features, positions)

    def _project(self, features: Tensor, positions: Tensor) -> Inputs:
        """Queries within a chunk [B,T,2s] and across chunks [B,T,s], and what is kept of a token [B,T,3s+e]."""
        _, v, base = wide(features).split([self.inner, self.inner, self.base], -1)
        q, k = self.variants(base, positions, {})
        within, across, bias = q.unbind(1)
        k_within, k_across, k_bias = k.unbind(1)
        return torch.cat([within / self.size, bias], -1), across, torch.cat([k_within, k_bias, k_across, v], -1)

    def _parts(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys within a chunk, keys across chunks, values."""
        within, across, v = kept.split([2 * self.base, self.base, self.inner], -1)
        return within, across, v

    def _chunks(self, inputs: Inputs, causal: bool) -> Tensor:
        """[B,T,e] over one sequence a row."""
        count = inputs[0].shape[1]
        lacking = -count % self.size
        q, across, kept = (pad(x, (0, 0, 0, lacking)).unflatten(1, (-1, self.size)) for x in inputs)
        k, k_across, v = self._parts(kept)
        place = torch.arange(count + lacking, device=q.device).view(-1, self.size)
        seen = (place < count).unsqueeze(1)
        if causal:
            seen = seen & (place.unsqueeze(1) <= place.unsqueeze(2))
        y = squared_relu(q @ k.mT, seen) @ v
        sums = k_across.mT @ v
        total = pad(sums.cumsum(1)[:, :-1], (0, 0, 0, 0, 1, 0)) if causal else sums.sum(1, keepdim=True)
        return (y + across @ total / (self.size if causal else count)).flatten(1, 2)[:, :count]

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        """The sum over finished chunks, the tokens of the unfinished one, and how many tokens there were."""
        total = wide(torch.zeros(batch, self.base, self.inner, device=device, dtype=dtype))
        rest = total.new_zeros(batch, self.size - 1, 3 * self.base + self.inner)
        return total, rest, torch.zeros(batch, device=device, dtype=torch.int64)

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        q, across, new = inputs
        total, rest, count = carry
        goes_on = ~links.fresh.unsqueeze(2)
        place = links.sees.sum(2) - 1 + torch.where(links.fresh, 0, count.unsqueeze(1))
        known, there = self._unfinished(count)
        chunk = place.unsqueeze(2) // self.size
        seen = torch.cat([there.unsqueeze(1) & goes_on, links.sees], 2)
        own = torch.cat([known, place], 1).unsqueeze(1) // self.size == chunk
        k, k_across, v = self._parts(torch.cat([rest, new], 1))
        weights = squared_relu(q @ k.mT, seen & own)
        earlier = (across @ k_across.mT).masked_fill(~(seen & ~own), 0.0)
        return (weights + earlier / self.size) @ v + (across * goes_on) @ total / self.size

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        total, rest, count = carry
        known, there = self._unfinished(count)
        kept, there = torch.cat([rest, inputs[2]], 1), torch.cat([there, real], 1)
        place = torch.cat([known, count.unsqueeze(1) + real.cumsum(1) - 1], 1)
        count = count + real.sum(1)
        begins = (count // self.size * self.size).unsqueeze(1)
        _, k_across, v = self._parts(kept)
        total = total + (k_across * (there & (place < begins)).unsqueeze(2)).mT @ v
        slot = torch.where(there & (place >= begins), place - begins, self.size - 1)  # the last one is for what is not kept
        rest = kept.new_zeros(len(kept), self.size, kept.shape[2]).scatter(1, slot.unsqueeze(2).expand_as(kept), kept)
        return total, rest[:, :-1], count

    def _unfinished(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """The places [B,C-1] of the tokens kept of an unfinished chunk after `count` tokens, and which of them are there."""
        place = (count // self.size * self.size).unsqueeze(1) + torch.arange(self.size - 1, device=count.device)
        return place, place < count.unsqueeze(1)

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        return self.out(features[..., : self.inner] * y.to(features.dtype))
