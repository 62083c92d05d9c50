"""Maximum likelihood: minus the log-density of the data, under any model that has one."""

import math
from typing import ClassVar, cast, final

from torch import nn

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.models.flow import Flow
from fewstep.training.objectives.stateless import Stateless


@final
class LikelihoodConfig(Config):
    """Maximum likelihood of a flow: `extra["x"]` [B,*shape] given `extra["c"]` [B,context], if there is one."""

    kind: ClassVar[str] = "likelihood"
    source: ClassVar[str] = "Dinh et al. 2014, arXiv 1410.8516, equation 3; dequantisation: Theis et al. 2015, arXiv 1511.01844"

    def build(self) -> "Likelihood":
        return Likelihood()


@final
class Likelihood(Stateless):
    """Nats per row, with the noise the flow asks for. Cost: one pass of its bijections."""

    name = LikelihoodConfig.kind

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        flow = cast(Flow, model)
        if "x" not in batch.extra:
            raise ValueError("batch: no 'x'; this objective learns arrays, choose data of points, digits or csv")
        x, c = batch.extra["x"], batch.extra.get("c")
        value = -flow.log_prob(flow.corrupted(x, rng), c, rng).mean()
        nats = value.detach()
        return Loss(value, len(x), {"nats": nats, "bits_per_dim": nats / (flow.size * math.log(2))})
