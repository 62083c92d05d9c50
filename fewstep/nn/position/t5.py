"""T5's relative positions: one learned number a head for each bucket of distances."""

import math
from typing import ClassVar, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.core.position import NoPosition
from fewstep.nn.position.encoding import EncodingConfig, back, by_distance, span


@final
class T5Config(EncodingConfig):
    """A learned bias for each of `buckets` buckets of distances: half of them exact, half logarithmic up to `farthest`, beyond
    which all distances are one. `bidirectional`: half of the buckets are for keys behind the query (encoders)."""

    kind: ClassVar[str] = "t5"
    source: ClassVar[str] = "Raffel et al. 2019, arXiv 1910.10683, section 2.1"

    buckets: int = Field(default=32, ge=4, multiple_of=4)
    farthest: int = Field(default=128, ge=2)
    bidirectional: bool = False
    init_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _is_a_ramp(self) -> "T5Config":
        exact = self.buckets // (4 if self.bidirectional else 2)
        if self.farthest <= exact:
            raise ValueError(f"farthest={self.farthest}: must be above the {exact} distances with buckets of their own; raise it")
        return self

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "T5":
        return T5(self, heads)


@final
class T5(NoPosition):
    """b_h[bucket(i - j)], one table for all layers. Cost: H numbers read a pair.

    Differs: scores keep their 1 / sqrt(E), which T5 leaves out and puts into its initial weights.
    """

    kind = "t5"
    parts = frozenset({"bias"})

    def __init__(self, config: T5Config, heads: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.buckets, heads) * config.init_std)

    def bias(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        distances, index = span(back(q_pos, k_pos, self.kind))
        return by_distance(self.embedding[self.bucket(distances)], index)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance i - j (int64); causal tables have none for keys behind the query, which share the first."""
        count, behind = self.config.buckets, torch.zeros_like(distance)
        if self.config.bidirectional:
            count //= 2
            behind = (distance < 0) * count
            distance = distance.abs()
        exact, distance = count // 2, distance.clamp(min=0)
        far = (distance.clamp(min=1).double() / exact).log() / math.log(self.config.farthest / exact) * (count - exact)
        logarithmic = (exact + far.to(torch.int64)).clamp(max=count - 1)
        return behind + torch.where(distance < exact, distance, logarithmic)
