"""Mean flow: a network that learns the mean velocity between two times, so that one call makes a step of any length."""

from typing import ClassVar, Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.diffusion.parameterisations import VelocityConfig
from fewstep.diffusion.processes import FlowConfig, diffuse, spread
from fewstep.models.denoiser import Denoiser
from fewstep.training.objectives.rows import labels, part
from fewstep.training.objectives.stateless import Stateless
from fewstep.training.objectives.times import TimesConfig

_FLOOR = 1e-3  # of the squared error that a row's weight divides by


@final
class MeanFlowConfig(TimesConfig):
    """The mean velocity u from t back to r < t, by what it must satisfy: u = v - (t - r) du/dt along the path.

    Both times follow the law, the later one is t; in all but a share `apart` of the rows r is t, and u the velocity itself. A
    row's squared error is divided by itself + 0.001 to the `power`, so that no row rules the others.
    """

    kind: ClassVar[str] = "mean-flow"
    source: ClassVar[str] = "Geng et al. 2025, arXiv 2505.13447, equations 6, 11 and 22"

    times: Literal["uniform", "log-normal", "log-uniform", "levels", "mode"] = "log-normal"
    location: float = -0.4
    spread: float = Field(default=1.0, gt=0)
    apart: float = Field(default=0.25, ge=0, le=1)
    power: float = Field(default=1.0, ge=0)
    unlabelled: float = Field(default=0.1, ge=0, le=1)

    def build(self) -> "MeanFlow":
        return MeanFlow(self)


@final
class MeanFlow(Stateless):
    """Reads what denoising reads. The metric `mean_flow` is the mean squared error a dimension, which `power` leaves alone.

    Cost: one pass of the backbone with the derivative along one direction, about two and a half passes, and one backward.
    Raises ValueError for a model that is not told the gap between the times, or learns no velocity of flow matching.
    """

    name = MeanFlowConfig.kind

    def __init__(self, config: MeanFlowConfig) -> None:
        self.config = config

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        denoiser, config = cast(Denoiser, model), self.config
        _require_mean_flow(denoiser)
        process, x_0 = denoiser.process, denoiser.normed(part(batch, "x"))
        eps = process.noise(x_0.shape[1:], rng.split("noise")).to(x_0)
        pair = config.drawn(process, rng.split("time").uniform(2).flatten()).view(-1, 2)
        apart = rng.split("apart").uniform() < config.apart
        t, gap = pair.amax(1), torch.where(apart, pair.amax(1) - pair.amin(1), 0.0)
        velocity = eps - x_0
        label = labels(denoiser, batch, config.unlabelled, rng)

        def mean_velocity(x: Tensor, t: Tensor, gap: Tensor) -> Tensor:
            return denoiser.network(x, t, label, gap.unsqueeze(1))[0]

        at = (diffuse(process, x_0, t, eps), t.to(x_0), gap.to(x_0))
        ones = torch.ones_like(at[1])
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no derivative forwards
            found, rate = cast(tuple[Tensor, Tensor], torch.func.jvp(mean_velocity, at, (velocity, ones, ones)))
        error = (found - (velocity - spread(gap, rate) * rate).detach()).square().flatten(1)
        total = error.sum(1)
        value = (total / (total.detach() + _FLOOR) ** config.power).mean()
        return Loss(value, len(x_0), {"mean_flow": error.detach().mean()})


def _require_mean_flow(model: Denoiser) -> None:
    if model.config.told != "gap":
        raise ValueError(f"model.told={model.config.told!r}: mean flow tells how far a step goes; set model.told='gap'")
    if not (isinstance(model.process, FlowConfig) and isinstance(model.parameterisation, VelocityConfig)):
        raise ValueError(
            f"model.parameterisation={model.parameterisation.kind!r}: mean flow learns a velocity of straight lines; "
            "set model.process='flow' and model.parameterisation='velocity'"
        )
