"""Self-speculation: one network learns to read left to right and to fill in blocks, so that it can draft for itself."""

from typing import ClassVar, final

from pydantic import Field
from torch import nn

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.training.objectives.block import BlockConfig
from fewstep.training.objectives.masking import MaskingConfig
from fewstep.training.objectives.next_token import NextTokenConfig
from fewstep.training.objectives.stateless import Stateless


@final
class SelfSpeculationConfig(MaskingConfig):
    """Next token, and `weight` times block diffusion in blocks of `size`; both in nats a token."""

    kind: ClassVar[str] = "selfspec"
    source: ClassVar[str] = "TiDAR, arXiv 2511.08923 (both losses on one network)"

    size: int = Field(default=4, ge=1)
    weight: float = Field(default=1.0, ge=0)

    def build(self) -> "SelfSpeculation":
        return SelfSpeculation(self)


@final
class SelfSpeculation(Stateless):
    """What is drafted in the masked mode is judged in the causal one. Cost: a pass over the tokens and one over twice as many.

    Differs: TiDAR's clean half is causal in the same pass; here the mask of a call tells the two modes apart.
    """

    name = SelfSpeculationConfig.kind

    def __init__(self, config: SelfSpeculationConfig) -> None:
        self.config = config
        self._next = NextTokenConfig().build()
        self._block = BlockConfig(size=config.size, estimator=config.estimator, noise=config.noise, window=config.window).build()

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        ahead, block = self._next.loss(model, batch, rng), self._block.loss(model, batch, rng)
        return Loss(ahead.value + self.config.weight * block.value, ahead.units, {**ahead.metrics, **block.metrics})
