"""Denoising score matching: the one loss of score models, diffusion and flow matching, at times drawn by a law.

What sets them apart is the model's process and parameterisation. This file knows neither by name.
"""

import math
from typing import ClassVar, Literal, cast, final

import torch
from pydantic import Field, model_validator
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fewstep.core.objective import Batch, Loss
from fewstep.core.process import Process
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.models.denoiser import Denoiser
from fewstep.training.objectives.stateless import Stateless

_STEEPEST = 2 / (math.pi - 2)  # beyond it the mode's law runs backwards


@final
class DenoisingConfig(Config):
    """The weighted squared error of the network's output over data, noise and times.

    `times`: uniform over the process's span; the log of sigma / alpha normal around `location` with deviation `spread` (for flow
    matching this is the logit of t, SD3's law); that log uniform over the span; or SD3's mode of weight `spread`.
    `pairing`: "optimal" gives each datum of a batch the noise that moves them all least. `unlabelled`: the share of rows whose
    class is withheld, so that guidance can ask for none.
    """

    kind: ClassVar[str] = "denoising"
    source: ClassVar[str] = (
        "Ho et al. 2020, arXiv 2006.11239; Karras et al. 2022, arXiv 2206.00364; Lipman et al. 2023, arXiv 2210.02747"
    )

    times: Literal["uniform", "log-normal", "log-uniform", "mode"] = "log-normal"
    location: float = -1.2
    spread: float = Field(default=1.2, gt=0)
    pairing: Literal["independent", "optimal"] = "independent"
    unlabelled: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _runs_forwards(self) -> "DenoisingConfig":
        if self.times == "mode" and self.spread > _STEEPEST:
            raise ValueError(f"spread={self.spread}: times='mode' takes at most 2 / (pi - 2) = {_STEEPEST:.2f}; lower it")
        return self

    def build(self) -> "Denoising":
        return Denoising(self)

    def drawn(self, process: Process, uniform: Tensor) -> Tensor:
        """Times [B] of this law inside the process's span, from uniform numbers [B] of [0, 1).

        Source of "mode": Esser et al. 2024, arXiv 2403.03206, section 3.1.
        """
        first, last = process.span
        if self.times == "uniform":
            return first + (last - first) * uniform
        if self.times == "mode":
            t = 1 - uniform - self.spread * (torch.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)
            return t.clamp(first, last)
        edges = torch.tensor([max(first, 1e-5), last], dtype=torch.float64, device=uniform.device)
        low, high = (process.sigma(edges).log() - process.alpha(edges).log()).clamp(-20, 20)
        if self.times == "log-uniform":
            log_ratio = low + (high - low) * uniform
        else:
            log_ratio = self.location + self.spread * torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
        return process.time(log_ratio.clamp(low, high).exp()).clamp(first, last)


@final
class Denoising(Stateless):
    """Reads `extra["x"]` [B,*shape] and, for a model with classes, `extra["c"]` [B,classes], one of them 1.

    Cost: one pass of the backbone; the optimal pairing B^3 operations on the host more (Tong et al. 2023, arXiv 2302.00482).
    Raises ValueError for a batch without "x" or without the classes that the model tells apart.
    """

    name = DenoisingConfig.kind

    def __init__(self, config: DenoisingConfig) -> None:
        self.config = config

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        denoiser, config = cast(Denoiser, model), self.config
        x_0 = denoiser.normed(_rows(batch, "x"))
        process = denoiser.process
        eps = process.noise(x_0.shape[1:], rng.split("noise")).to(x_0)
        if config.pairing == "optimal":
            eps = eps[_nearest(x_0, eps)]
        t = config.drawn(process, rng.split("time").uniform())
        example = denoiser.parameterisation.example(process, x_0, t, eps)
        output = denoiser.network(example.inputs, example.c_noise, self._labels(denoiser, batch, rng))
        error = (output - example.target).square().flatten(1).mean(1)
        value = (example.weight * error).mean()
        return Loss(value, len(x_0), {"denoising": value.detach()})

    def _labels(self, denoiser: Denoiser, batch: Batch, rng: Rng) -> Tensor | None:
        if not denoiser.classes:
            return None
        label = _rows(batch, "c").argmax(1)
        if not denoiser.training:
            return label
        return label.masked_fill(rng.split("label").uniform() < self.config.unlabelled, -1)


def _rows(batch: Batch, name: str) -> Tensor:
    if name not in batch.extra:
        raise ValueError(f"batch: no {name!r}; choose data of arrays{' with classes' if name == 'c' else ''}")
    return batch.extra[name]


def _nearest(x_0: Tensor, eps: Tensor) -> Tensor:
    """For each row of x_0 the row of eps that a matching of least squared distance gives it."""
    cost = torch.cdist(x_0.flatten(1), eps.flatten(1)).square()
    _, chosen = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(chosen, device=eps.device)
