"""Transformer-XL's relative positions, as XLNet has them: sinusoids of the distance, projected by each layer."""

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from fewstep.core.position import NoPosition
from fewstep.nn.position.encoding import EncodingConfig, back, per_head, pick, span, wide
from fewstep.nn.position.sinusoidal import sinusoids


@final
class TransformerXLConfig(EncodingConfig):
    """Scores by content and by distance, each with a learned bias in place of the query's own position."""

    kind: ClassVar[str] = "transformer_xl"
    source: ClassVar[str] = "Dai et al. 2019, arXiv 1901.02860; Yang et al. 2019, XLNet, arXiv 1906.08237"
    shared: ClassVar[bool] = False

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "TransformerXL":
        return TransformerXL(head_width, width or heads * head_width, heads)


@final
class TransformerXL(NoPosition):
    """((q_i + u) k_j + (q_i + v) W r_(i-j)) / sqrt(E); r: sines, then cosines of the distance [D]; u, v, W of each layer.

    Cost: 2 Q R E a head for R distances, and 2 R D H E to project them; for few queries, with W moved to their side, 2 Q E D and
    2 Q R D a head. Source: arXiv 1901.02860 section 3.3. Differs: u and v are each layer's own, as in XLNet; there are no
    segment recurrence and no segment biases.
    """

    kind = "transformer_xl"
    parts = frozenset({"bias"})

    def __init__(self, head_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width, self.width = heads, head_width, width
        self.content_bias = nn.Parameter(torch.zeros(heads * head_width))
        self.distance_bias = nn.Parameter(torch.zeros(heads * head_width))
        self.distance = nn.Linear(width, heads * head_width, bias=False)

    def bias(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        distances, index = span(back(q_pos, k_pos, self.kind))
        waves = torch.cat(sinusoids(distances.to(wide(q)), self.width), -1)[:, : self.width].to(q.dtype)
        content, asking = self._by_head(self.content_bias), q + self._by_head(self.distance_bias)
        if q.shape[2] < self.head_width:
            moved = asking @ self.distance.weight.unflatten(0, (self.heads, -1))  # [B,H,Q,D]
            scores = moved @ waves.mT
        else:
            scores = asking @ self.distance(waves).unflatten(-1, (self.heads, -1)).permute(1, 2, 0)
        return (content @ per_head(k, self.heads).mT + pick(scores, index)) * q.shape[-1] ** -0.5

    def _by_head(self, vector: Tensor) -> Tensor:
        """[H,1,E]."""
        return vector.view(self.heads, 1, -1)
