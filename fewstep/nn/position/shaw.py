"""Shaw's relative positions: learned vectors for near distances, added to keys and to values."""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.position import NoPosition
from fewstep.nn.position.encoding import EncodingConfig, back, pick


@final
class ShawConfig(EncodingConfig):
    """Learned vectors a^K and a^V for the distances up to `reach` on both sides; farther ones count as `reach`."""

    kind: ClassVar[str] = "shaw"
    source: ClassVar[str] = "Shaw et al. 2018, arXiv 1803.02155"
    shared: ClassVar[bool] = False

    reach: int = Field(default=16, ge=1)
    init_std: float = Field(default=0.02, gt=0)

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "Shaw":
        return Shaw(self, head_width)


@final
class Shaw(NoPosition):
    """q_i (k_j + a^K_ij) / sqrt(E), and sum_j w_ij (v_j + a^V_ij), a_ij = a[clip(j - i, -reach, reach)].

    The heads of a layer share the vectors. Cost: beside plain attention 4 (2 reach + 1) E operations a query and head, and the
    weights are held, so that memory grows with Q K. Source: arXiv 1803.02155 eq. 3 and 4.
    """

    kind = "shaw"
    parts = frozenset({"bias", "value"})

    def __init__(self, config: ShawConfig, head_width: int) -> None:
        super().__init__()
        self.reach = config.reach
        # one tensor: as matrices they would be orthogonalised by some optimizers
        self.embedding = nn.Parameter(torch.randn(2, 2 * config.reach + 1, head_width) * config.init_std)  # a^K, a^V

    def bias(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        scores = q @ self.embedding[0].mT * q.shape[-1] ** -0.5
        return pick(scores, self._index(q_pos, k_pos))

    def value(self, weights: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        index = self._index(q_pos, k_pos).unsqueeze(1).expand_as(weights)
        by_distance = weights.new_zeros(*weights.shape[:3], 2 * self.reach + 1).scatter_add(3, index, weights)
        return by_distance @ self.embedding[1]

    def _index(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (-back(q_pos, k_pos, self.kind)).clamp(-self.reach, self.reach) + self.reach
