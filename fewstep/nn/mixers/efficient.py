"""Efficient attention: queries are mixtures of E features, and each feature of the keys is itself an attention over the tokens.

Over whole sequences that is two matrix products. Causally, a feature's attention runs over the tokens so far, which is a weighted
mean that can be carried on together with the logarithm of its weights' sum.
"""

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from fewstep.core.mixer import Aux, Causal, Context, Full
from fewstep.core.position import NoPosition, fitted
from fewstep.core.recipe import Config
from fewstep.nn.mixers.packing import apart
from fewstep.nn.mixers.scores import cached_window, check_mask
from fewstep.nn.recurrent import Carry, Inputs, Links, Recurrent, RecurrentState, even_heads, wide


@final
class EfficientConfig(Config):
    """Efficient attention with softmax normalisation."""

    kind: ClassVar[str] = "efficient"
    source: ClassVar[str] = "Shen et al. 2018, arXiv 1812.01243"

    bias: bool = False

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        """(heads, head width). Raises ValueError where they do not divide."""
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "EfficientAttention":
        return EfficientAttention(self, width, heads, position)


@final
class EfficientAttention(Recurrent):
    """y_i = softmax_E(q_i) softmax_T(K)' V (arXiv 1812.01243, eq. 8), the second softmax over the tokens that i sees.

    Cost: 4 T E^2 a head, and in the causal form `chunk` exponentials per token and feature. State: E (E + 1) numbers a head.
    Differs: the causal form, which is the published one over each token's own past; no other layer's positions are honoured,
    since features are mixed by no product of a query and a key, so in a bidirectional pass order must come from the embedding.
    """

    modes = frozenset({"causal", "bidirectional"})
    masks = frozenset({Causal, Full})
    encodings: frozenset[str] = frozenset()
    chunk = 16  # exponentials grow with it, rounds shrink

    def __init__(self, config: EfficientConfig, width: int, heads: int, position: NoPosition | None) -> None:
        super().__init__()
        fitted(position, config.kind, self.encodings)
        self.config, self.heads = config, heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.out = nn.Linear(width, width, bias=config.bias)

    @property
    def width(self) -> int:
        return self.out.out_features

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Aux]:
        check_mask(self.config.kind, ctx.mask, self.masks)
        if isinstance(ctx.mask, Causal):
            return super().forward(x, ctx)
        assert ctx.positions is not None, "a parallel pass has no state to count positions"
        y = apart(self._whole, x, ctx.positions, ctx.segments, exact=True)
        return self.finish(y, x), {}

    def extend(self, x: Tensor, ctx: Context, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        cached_window(ctx.mask)
        check_mask(self.config.kind, ctx.mask, self.masks)
        return super().extend(x, ctx, state)

    def _whole(self, x: Tensor, positions: Tensor) -> Tensor:
        """[B,T,D] over one sequence a row, every token seeing every other."""
        q, k, v = (part.transpose(1, 2) for part in self._project(x))
        return (q.softmax(-1) @ (k.softmax(-2).mT @ v)).transpose(1, 2).flatten(2)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [B,T,H,E]."""
        return wide(self.qkv(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        q, k, v = self._project(features)
        return q.softmax(-1), k, v

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        """Each feature's mean of the values, and the logarithm of the weights it is taken with."""
        size = self.width // self.heads
        mean = wide(torch.zeros(batch, self.heads, size, size, device=device, dtype=dtype))
        return mean, torch.full_like(mean[..., 0], torch.finfo(mean.dtype).min / 4)  # not -inf: nothing and nothing add up

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        q, k, v = inputs
        mean, total = carry
        logits = k.unsqueeze(1).masked_fill(~links.sees[:, :, :, None, None], -torch.inf)  # [B,T,T,H,E]
        earlier = total[:, None].masked_fill(links.fresh[:, :, None, None], -torch.inf).unsqueeze(2)
        shares = q.unsqueeze(2) * torch.cat([logits, earlier], 2).softmax(2)
        within = shares[:, :, :-1].sum(-1).permute(0, 3, 1, 2)
        before = shares[:, :, -1].transpose(1, 2)
        return (within @ v.transpose(1, 2) + before @ mean).transpose(1, 2)

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        _, k, v = inputs
        mean, total = carry
        logits = torch.cat([k.masked_fill(~real[:, :, None, None], -torch.inf), total.unsqueeze(1)], 1)
        shares = logits.softmax(1)
        added = shares[:, :-1].permute(0, 2, 3, 1) @ v.transpose(1, 2)
        return mean * shares[:, -1].unsqueeze(-1) + added, logits.logsumexp(1)

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        return self.out(y.flatten(2).to(features.dtype))
