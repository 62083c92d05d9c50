"""Sliced score matching: the score without a target, from its own derivative along random directions."""

from typing import ClassVar, Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.diffusion.parameterisations import Point
from fewstep.diffusion.processes import diffuse, spread
from fewstep.models.denoiser import Denoiser
from fewstep.training.objectives.rows import labels, part
from fewstep.training.objectives.stateless import Stateless
from fewstep.training.objectives.times import TimesConfig


@final
class SlicedConfig(TimesConfig):
    """E of 2 v . d(v . s) + (v . s)^2 at noisy data, for the model's score s and `probes` directions v of a `law`.

    `form` "reduced" has |s|^2 in place of (v . s)^2, which is its mean and varies less. The weights are those of denoising score
    matching: what the two lose differs by a constant, in expectation.
    """

    kind: ClassVar[str] = "sliced"
    source: ClassVar[str] = (
        "Song et al. 2019, arXiv 1905.07088, equations 7 and 8; noisy data: Song and Ermon 2019, arXiv 1907.05600"
    )

    form: Literal["plain", "reduced"] = "reduced"
    law: Literal["rademacher", "gaussian"] = "rademacher"
    probes: int = Field(default=1, ge=1)
    unlabelled: float = Field(default=0.1, ge=0, le=1)

    def build(self) -> "Sliced":
        return Sliced(self)


@final
class Sliced(Stateless):
    """Reads what denoising reads. Cost: one pass of the backbone, and per probe a backward pass that is differentiated."""

    name = SlicedConfig.kind

    def __init__(self, config: SlicedConfig) -> None:
        self.config = config

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        denoiser, config = cast(Denoiser, model), self.config
        process, x_0 = denoiser.process, denoiser.normed(part(batch, "x"))
        at = Point(process, config.drawn(process, rng.split("time").uniform()))
        x_t = diffuse(process, x_0, at.t, process.noise(x_0.shape[1:], rng.split("noise")))
        label = labels(denoiser, batch, config.unlabelled, rng)
        trained = torch.is_grad_enabled()
        with torch.enable_grad():
            x_t.requires_grad_()
            score = (spread(at.alpha, x_t) * denoiser(x_t, at.t, label) - x_t) / spread(at.sigma**2, x_t)
            directions = (self._direction(x_t, rng.split("probe").at(n)) for n in range(config.probes))
            each = [self._along(score, x_t, v, trained) for v in directions]
        _, c_out = denoiser.parameterisation.unmix(at)
        weight = denoiser.parameterisation.weight(at) * (at.sigma**2 / (at.alpha * c_out)) ** 2
        value = (weight.to(x_0) * torch.stack(each).mean(0)).mean() / x_0[0].numel()
        return Loss(value if trained else value.detach(), len(x_0), {"sliced": value.detach()})

    def _along(self, score: Tensor, x_t: Tensor, v: Tensor, trained: bool) -> Tensor:
        """[B] the loss of the direction `v`."""
        projected = (score * v).flatten(1).sum(1)
        (slope,) = torch.autograd.grad(projected.sum(), x_t, create_graph=trained, retain_graph=True)
        size = projected.square() if self.config.form == "plain" else score.square().flatten(1).sum(1)
        return 2 * (slope * v).flatten(1).sum(1) + size

    def _direction(self, x: Tensor, rng: Rng) -> Tensor:
        shape = x.shape[1:]
        v = rng.normal(*shape) if self.config.law == "gaussian" else torch.where(rng.uniform(*shape) < 0.5, -1.0, 1.0)
        return v.to(x)
