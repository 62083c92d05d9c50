"""DDPM's variational bound: what a chain of ancestral steps says of the data, in nats, for fixed and for learned variances."""

import math
from typing import ClassVar, Literal, NamedTuple, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.objective import Batch, Loss
from fewstep.core.process import Process
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.diffusion.parameterisations import Point
from fewstep.diffusion.processes import spread
from fewstep.models.denoiser import Denoiser
from fewstep.training.objectives.rows import labels, part
from fewstep.training.objectives.stateless import Stateless


@final
class VariationalConfig(Config):
    """The bound of the chain t_j = j / `steps`, one step j of it drawn for each row.

    `variance` of a step, if the model learns none: the least, the posterior's, or the greatest, the forward step's. `loss`: the
    "bound" alone, or "hybrid", the simple loss and a `share` of the bound that only the variance learns from. `level`: the
    distance between the levels that the data have (None: they have a density); their last step is the mass of a level's cell.
    """

    kind: ClassVar[str] = "variational"
    source: ClassVar[str] = (
        "Ho et al. 2020, arXiv 2006.11239, equations 5 and 13; Nichol and Dhariwal 2021, arXiv 2102.09672, equations 15 and 16"
    )

    steps: int = Field(default=1000, ge=2)
    variance: Literal["small", "large"] = "large"
    loss: Literal["bound", "hybrid"] = "bound"
    share: float = Field(default=1e-3, gt=0)
    level: float | None = Field(default=None, gt=0)
    unlabelled: float = Field(default=0.1, ge=0, le=1)

    def build(self) -> "Variational":
        return Variational(self)


class Step(NamedTuple):
    """A step of the chain: the weight of x_0, or its estimate, in the mean of x_s given x_t; the least and greatest variances;
    and whether it is the last one. Each [B]."""

    weight: Tensor
    small: Tensor
    large: Tensor
    last: Tensor

    @classmethod
    def of(cls, process: Process, j: Tensor, steps: int) -> "Step":
        """Step `j` [B] of 1 .. `steps`. The posterior of the last one has no variance: it has that of the one before."""
        (weight, small, large), (_, before, _) = _posterior(process, j, steps), _posterior(process, j.clamp(min=2), steps)
        return cls(weight, torch.where(j == 1, before, small), large, j == 1)


@final
class Variational(Stateless):
    """Reads what denoising reads; nats a dimension of the data, in their own unit. Cost: one pass of the backbone.

    Without bias, but a row stands for all its steps: the metrics want averaging over many times `steps` rows. Raises ValueError
    for a hybrid loss of a model that learns no variance.
    """

    name = VariationalConfig.kind

    def __init__(self, config: VariationalConfig) -> None:
        self.config = config

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        denoiser, config = cast(Denoiser, model), self.config
        if config.loss == "hybrid" and denoiser.config.variance == "fixed":
            raise ValueError("model.variance='fixed': the hybrid loss teaches a variance; set model.variance='learned'")
        process, x_0 = denoiser.process, denoiser.normed(part(batch, "x"))
        j = 1 + (rng.split("time").uniform() * config.steps).long()
        t, eps = j.double() / config.steps, process.noise(x_0.shape[1:], rng.split("noise")).to(x_0)
        example = denoiser.parameterisation.example(process, x_0, t, eps)
        label = labels(denoiser, batch, config.unlabelled, rng)
        output, learned = denoiser.network(example.inputs, example.c_noise, label)
        simple = (example.weight * (output - example.target).square().flatten(1).mean(1)).mean()
        known = output.detach() if config.loss == "hybrid" else output
        off = denoiser.parameterisation.estimate(known, example.x_t, Point(process, t)) - x_0
        bound = config.steps * self._nats(Step.of(process, j, config.steps), off, learned, denoiser.config.scale).mean()
        nats = bound + _first(process, x_0).mean()
        if config.level is None:
            nats = nats + math.log(denoiser.config.scale)
        value = simple + config.share * bound if config.loss == "hybrid" else nats
        metrics = {"simple": simple.detach(), "nats": nats.detach(), "bits_per_dim": nats.detach() / math.log(2)}
        return Loss(value, len(x_0), metrics)

    def _nats(self, step: Step, off: Tensor, learned: Tensor | None, scale: float) -> Tensor:
        """[B] nats a dimension of a step whose estimate is `off` from x_0."""
        small, large = (spread(variance, off) for variance in (step.small.log(), step.large.log()))
        if learned is None:
            log_variance = (small if self.config.variance == "small" else large).expand_as(off)
        else:
            log_variance = torch.lerp(small.expand_as(off), large.expand_as(off), (1 + learned) / 2)
        ratio, away = small - log_variance, (spread(step.weight, off) * off).square() * torch.exp(-log_variance)
        divergence = (ratio.exp() - 1 - ratio + away) / 2
        if self.config.level is None:
            end = (away + log_variance + math.log(2 * math.pi)) / 2
        else:
            end = -_log_mass(off, self.config.level / scale, torch.exp(log_variance / 2))
        return torch.where(spread(step.last, off).bool(), end, divergence).flatten(1).mean(1)


def _posterior(process: Process, j: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The weight of x_0 in the mean of x_s given x_t, the posterior's variance and the forward step's."""
    t, s = j.double() / steps, (j - 1).double() / steps
    alpha, sigma, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
    shrink = alpha * sigma_s / (sigma * alpha_s)
    forward = (1 - shrink) * (1 + shrink)
    return alpha_s * forward, sigma_s**2 * forward, sigma**2 * forward


def _first(process: Process, x_0: Tensor) -> Tensor:
    """[B] nats a dimension between x_1 of the data and pure noise of its variance for data of variance 1."""
    end = torch.ones(len(x_0), dtype=torch.float64, device=x_0.device)
    alpha, sigma = process.alpha(end), process.sigma(end)
    prior = alpha**2 + sigma**2
    size = x_0.double().square().flatten(1).mean(1)
    return (((sigma**2 + alpha**2 * size) / prior - 1 - torch.log(sigma**2 / prior)) / 2).to(x_0.dtype)


def _log_mass(off: Tensor, width: float, deviation: Tensor) -> Tensor:
    """ln of a Gaussian's mass within `width` around a place that lies `off` its mean, finite however far out that is.

    Differs: the outermost cells end like all others.
    """
    near, far = (off.abs() - width / 2) / deviation, (off.abs() + width / 2) / deviation
    upper, lower = torch.special.log_ndtr(-near), torch.special.log_ndtr(-far)
    return upper + torch.log(-torch.expm1((lower - upper).clamp(max=-1e-12)))
