"""Denoising score matching: the one loss of score models, diffusion and flow matching, at times drawn by a law.

What sets them apart is the model's process and parameterisation. This file knows neither by name.
"""

from typing import ClassVar, Literal, cast, final

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.models.denoiser import Denoiser
from fewstep.training.objectives.augmentation import augment
from fewstep.training.objectives.rows import labels, part
from fewstep.training.objectives.stateless import Stateless
from fewstep.training.objectives.times import TimesConfig


@final
class DenoisingConfig(TimesConfig):
    """The weighted squared error of the network's output over data, noise and times.

    `pairing`: "optimal" gives each datum of a batch the noise that moves them all least; "given" takes the noise that comes with
    it, as in a coupling (reflow). `unlabelled`: the share of rows whose class is withheld, so that guidance can ask for none.
    `augmented`: the probability of each transformation of an image, which the network is told, so that samples show none.
    """

    kind: ClassVar[str] = "denoising"
    source: ClassVar[str] = (
        "Ho et al. 2020, arXiv 2006.11239; Karras et al. 2022, arXiv 2206.00364; Lipman et al. 2023, arXiv 2210.02747; "
        "reflow: Liu et al. 2023, arXiv 2209.03003"
    )
    claims: ClassVar[tuple[str, ...]] = ("flow-matching", "reflow")

    pairing: Literal["independent", "optimal", "given"] = "independent"
    unlabelled: float = Field(default=0.1, ge=0, le=1)
    augmented: float = Field(default=0.0, ge=0, le=1)

    def build(self) -> "Denoising":
        return Denoising(self)


@final
class Denoising(Stateless):
    """Reads `extra["x"]` [B,*shape] and, for a model with classes, `extra["c"]` [B,classes], one of them 1.

    Given pairs have their noise in `extra["eps"]` [B,*shape]. Cost: one pass of the backbone; the optimal pairing B^3 operations
    on the host more (Tong et al. 2023, arXiv 2302.00482). Raises ValueError for a batch without what is read, and for
    augmentations that the model is not told of.
    """

    name = DenoisingConfig.kind

    def __init__(self, config: DenoisingConfig) -> None:
        self.config = config

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        denoiser, config = cast(Denoiser, model), self.config
        x_0, told = denoiser.normed(part(batch, "x")), None
        if config.augmented and denoiser.config.told != "augmentation":
            raise ValueError(f"objective.augmented={config.augmented}: the model is not told; set model.told='augmentation'")
        if config.augmented and denoiser.training:
            x_0, told = augment(x_0, config.augmented, rng.split("augmentation"))
        process = denoiser.process
        given = config.pairing == "given"
        eps = (part(batch, "eps") if given else process.noise(x_0.shape[1:], rng.split("noise"))).to(x_0)
        if config.pairing == "optimal":
            eps = eps[_nearest(x_0, eps)]
        t = config.drawn(process, rng.split("time").uniform())
        example = denoiser.parameterisation.example(process, x_0, t, eps)
        output, _ = denoiser.network(example.inputs, example.c_noise, labels(denoiser, batch, config.unlabelled, rng), told)
        error = (output - example.target).square().flatten(1).mean(1)
        value = (example.weight * error).mean()
        return Loss(value, len(x_0), {"denoising": value.detach()})


def _nearest(x_0: Tensor, eps: Tensor) -> Tensor:
    """For each row of x_0 the row of eps that a matching of least squared distance gives it."""
    cost = torch.cdist(x_0.flatten(1), eps.flatten(1)).square()
    _, chosen = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(chosen, device=eps.device)
