"""Medusa and Hydra heads: small networks without attention on the trunk's last activation, one per token ahead.

Head k (from 1) reads the activation at position i, after the last norm, and predicts token i+k+1. This file knows neither the
trunk nor how drafts are verified.
"""

from abc import abstractmethod
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from fewstep.core.mixer import Context
from fewstep.nn.ahead import Embed, HeadsConfig, MakeBlock

Unembedding = Literal["own", "shared"]


class _Config(HeadsConfig):
    """`depth` heads of `layers` residual blocks each, with an unembedding of their `own` or the trunk's, `shared`."""

    depth: int = Field(default=4, ge=1, le=64)
    layers: int = Field(default=1, ge=1, le=16)
    unembedding: Unembedding = "own"


@final
class MedusaHeadsConfig(_Config):
    """Heads side by side, each of which reads the trunk alone. With a small vocabulary `own` unembeddings cost little."""

    kind: ClassVar[str] = "medusa"
    source: ClassVar[str] = "Cai et al. 2024, arXiv 2401.10774, eq. 1"
    drafter: ClassVar[str] = "medusa"

    def build(self, *, width: int, vocab: int, trunk_depth: int, eps: float, make_block: MakeBlock) -> "MedusaHeads":
        return MedusaHeads(self, width, vocab)


@final
class HydraHeadsConfig(_Config):
    """Heads in sequence: each also reads the embeddings of the tokens before the one it predicts, the drafted ones included."""

    kind: ClassVar[str] = "hydra"
    source: ClassVar[str] = "Ankner et al. 2024, arXiv 2402.05109, section 3"
    drafter: ClassVar[str] = "hydra"

    def build(self, *, width: int, vocab: int, trunk_depth: int, eps: float, make_block: MakeBlock) -> "HydraHeads":
        return HydraHeads(self, width, vocab)


class FreeHeads(nn.Module):
    """What both share: the activation they read, their residual blocks beyond the first, and their unembeddings.

    A block maps x to x + SiLU(W x + b) and begins as the identity, so that a head begins as the trunk's own law.
    """

    tap = "final"

    def __init__(self, config: _Config, width: int, vocab: int) -> None:
        super().__init__()
        self.config, self.depth = config, config.depth
        self.deeper = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, width) for _ in range(config.layers - 1)) for _ in range(config.depth)
        )
        own = config.depth if config.unembedding == "own" else 0
        self.unembeddings = nn.ModuleList(nn.Linear(width, vocab, bias=False) for _ in range(own))

    def begin(self, unembedding: Tensor) -> None:
        """Blocks begin as the identity, unembeddings as the trunk's."""
        with torch.no_grad():
            for block in (block for head in self.deeper for block in head.children()):
                for parameter in block.parameters():
                    parameter.zero_()
            for own in self.unembeddings.parameters():
                own.copy_(unembedding)

    @abstractmethod
    def forward(self, hidden: Tensor, tokens: Tensor, embed: Embed, ctx: Context) -> list[Tensor]:
        """Trunk activations [B,T,D], tokens [B,T] -> per head k the activations [B,T-k,D] that predict token i+k+1."""

    def unembed(self, k: int, h: Tensor, unembedding: Embed) -> Tensor:
        """The logits [...,V] of head k = 1 .. depth, whose activation is `h` [...,D]; `unembedding` is the trunk's."""
        return self.unembeddings[k - 1](h) if len(self.unembeddings) else unembedding(h)

    def _deepened(self, k: int, h: Tensor) -> Tensor:
        for block in self.deeper[k - 1].children():
            h = h + silu(block(h))
        return h


@final
class MedusaHeads(FreeHeads):
    """h_k = h + SiLU(W_k h + b_k), and so on for the deeper blocks. Cost: `layers` D^2 weights and an unembedding per head.

    The first blocks of all heads are one matrix, since they read the same activation.
    Differs: deeper blocks have weights of their own, where the original code repeats one; b begins at zero, not at random.
    """

    def __init__(self, config: MedusaHeadsConfig, width: int, vocab: int) -> None:
        super().__init__(config, width, vocab)
        self.first = nn.Linear(width, config.depth * width)

    def begin(self, unembedding: Tensor) -> None:
        super().begin(unembedding)
        nn.init.zeros_(self.first.weight)
        nn.init.zeros_(self.first.bias)

    def activations(self, hidden: Tensor) -> Tensor:
        """Trunk activations [B,D] or [B,T,D] -> those of every head, [B,depth,D] or [B,T,depth,D]."""
        h = hidden.unsqueeze(-2) + silu(self.first(hidden)).unflatten(-1, (self.depth, -1))
        if self.config.layers == 1:
            return h
        return torch.stack([self._deepened(k, part) for k, part in enumerate(h.unbind(-2), 1)], -2)

    def logits(self, hidden: Tensor, depth: int, unembedding: Embed) -> Tensor:
        """Trunk activations [B,D] -> the logits [B,depth,V] of the first `depth` heads."""
        h = self.activations(hidden)[:, :depth]
        if not len(self.unembeddings):
            return unembedding(h)
        return torch.stack([self.unembed(k, part, unembedding) for k, part in enumerate(h.unbind(1), 1)], 1)

    def forward(self, hidden: Tensor, tokens: Tensor, embed: Embed, ctx: Context) -> list[Tensor]:
        h, count = self.activations(hidden), hidden.shape[1]
        return [h[:, : max(0, count - k), k - 1] for k in range(1, self.depth + 1)]


@final
class HydraHeads(FreeHeads):
    """h_k = P_k z + SiLU(W_k z + b_k) of z = [h; Emb(t_{i+1}); ..; Emb(t_{i+k})], and so on for the deeper blocks.

    Cost: 2 (k+1) D^2 weights, `layers` - 1 blocks and an unembedding for head k. Differs: P_k begins as the identity on h.
    """

    def __init__(self, config: HydraHeadsConfig, width: int, vocab: int) -> None:
        super().__init__(config, width, vocab)
        # P_k above W_k, as one matrix
        self.first = nn.ModuleList(nn.Linear((k + 1) * width, 2 * width) for k in range(1, config.depth + 1))

    def begin(self, unembedding: Tensor) -> None:
        super().begin(unembedding)
        with torch.no_grad():
            for weight, bias in (head.parameters() for head in self.first):
                width = weight.shape[0] // 2
                weight.zero_()
                weight[:width, :width] = torch.eye(width, device=weight.device, dtype=weight.dtype)
                bias.zero_()

    def activation(self, k: int, inputs: Tensor) -> Tensor:
        """Head k: [h; k embeddings] [...,(k+1)D] -> its activation [...,D]."""
        straight, bent = self.first[k - 1](inputs).chunk(2, -1)
        return self._deepened(k, straight + silu(bent))

    def forward(self, hidden: Tensor, tokens: Tensor, embed: Embed, ctx: Context) -> list[Tensor]:
        outputs, embedded, count = [], embed(tokens), tokens.shape[1]
        for k in range(1, self.depth + 1):
            size = max(0, count - k)
            parts = [hidden[:, :size], *(embedded[:, j : j + size] for j in range(1, k + 1))]
            outputs.append(self.activation(k, torch.cat(parts, -1)))
        return outputs
