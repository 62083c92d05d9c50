"""A denoiser: a backbone, what its output means, and the process it is trained on. This file knows all three by contract only."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.process import Denoise, Denoised, Process
from fewstep.core.recipe import Config, choice
from fewstep.diffusion.parameterisations import PARAMETERISATIONS, EDMPreconditioningConfig, ParameterisationConfig, Point
from fewstep.diffusion.processes import PROCESSES, EDMConfig, ratio, translate
from fewstep.diffusion.solvers.multistep import mean
from fewstep.models.stored import restore, store
from fewstep.nn.backbones import BACKBONES
from fewstep.nn.backbones.points import PointsConfig

AUGMENTATIONS = 9  # numbers that tell how an image was transformed
TOLD: Mapping[str, int] = MappingProxyType({"nothing": 0, "gap": 1, "augmentation": AUGMENTATIONS})


@final
class DenoiserConfig(Config):
    """A network that estimates x_0 of arrays of `shape`, with `classes` of them (0: none) to be told apart.

    x_0 is (data - `centre`) / `scale`, so that processes and parameterisations meet numbers of the order of one.
    `told`, besides noise and class: the `gap` of time over which the output is a mean (mean flow), or the `augmentation` of a
    training image; zeros say nothing. `variance` learned: a second output says how much noise an ancestral step adds.
    """

    kind: ClassVar[str] = "denoiser"
    source: ClassVar[str] = "Karras et al. 2022, arXiv 2206.00364, section 5"

    shape: tuple[int, ...] = (2,)
    classes: int = Field(default=0, ge=0)
    centre: float = 0.0
    scale: float = Field(default=1.0, gt=0)
    told: Literal["nothing", "gap", "augmentation"] = "nothing"
    variance: Literal["fixed", "learned"] = "fixed"
    backbone: choice(lambda: BACKBONES, "backbone") = PointsConfig()  # type: ignore[valid-type]
    process: choice(lambda: PROCESSES, "process") = EDMConfig()  # type: ignore[valid-type]
    parameterisation: choice(lambda: PARAMETERISATIONS, "parameterisation") = EDMPreconditioningConfig()  # type: ignore[valid-type]

    def build(self) -> "Denoiser":
        return Denoiser(self)


@final
class Denoiser(nn.Module):
    """E[x_0 | x_t] of rows [B, *shape]. Cost of a call: the backbone's, and three multiplications of x."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config, self.shape, self.classes = config, config.shape, config.classes
        self.process = cast(Process, cast(Any, config.process).build())
        self.parameterisation = cast(ParameterisationConfig, config.parameterisation)
        self._learns_variance = config.variance == "learned"
        self.backbone: nn.Module = cast(Any, config.backbone).build(
            config.shape, config.classes, TOLD[config.told], outputs=1 + self._learns_variance
        )

    def normed(self, data: Tensor) -> Tensor:
        """x_0 of data, in the dtype of the weights."""
        weight = next(self.parameters())
        return ((data - self.config.centre) / self.config.scale).to(weight)

    def unnormed(self, x_0: Tensor) -> Tensor:
        """Data of x_0."""
        return x_0 * self.config.scale + self.config.centre

    def network(
        self, inputs: Tensor, c_noise: Tensor, label: Tensor | None = None, told: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The backbone's own output F, as the parameterisation means it, and its second one where it learns a variance.

        `label` [B] int64, -1 or None for no class; `told` [B,E] what the config names, None for zeros.
        """
        output: Tensor = self.backbone(inputs, c_noise, label, told)
        if not self._learns_variance:
            return output, None
        first, second = output.chunk(2, 1)
        return first, second

    def denoiser(self, label: Tensor | None = None, process: Process | None = None, grid: Tensor | None = None) -> Denoise:
        """The estimate for rows of the classes `label`, as a denoiser of `process` (None: the one it was trained on).

        Another process is reached by a change of variables: any model runs under any sampler. A model that is told a gap looks
        ahead along `grid` [K+1] or [B,K+1], times of `process`: its estimate at a place is then the one from which a step that
        holds it fast, DDIM's, goes where the model says that the next place is; without a grid it is E[x_0 | x_t].
        """
        if grid is not None and process is not None:
            grid = self.process.time(ratio(process, grid))
        ahead = grid if self.config.told == "gap" else None

        def own(x: Tensor, t: Tensor) -> Tensor | Denoised:
            at = Point(self.process, t)
            told = None if ahead is None else (t - _next(t, ahead)).unsqueeze(1)
            output, variance = self.network(*self.parameterisation.inputs(x, at), label, told)
            estimate = self.parameterisation.estimate(output, x, at)
            return estimate if variance is None else Denoised(estimate, (1 + variance) / 2)

        return own if process is None else translate(own, self.process, process)

    def save(self, directory: Path | str) -> None:
        """Write the model directory: recipe and weights. Raises ValueError when the disk refuses."""
        store(self, self.config, directory)

    @classmethod
    def load(cls, directory: Path | str, device: torch.device | str = "cpu") -> "Denoiser":
        """Read what `save` or a run wrote. Raises ValueError for a missing, damaged or mismatched file."""
        return cast(Denoiser, restore(directory, {DenoiserConfig.kind: DenoiserConfig}, device))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """x_t [B, *shape] at times t [B] -> E[x_0 | x_t] [B, *shape]."""
        return mean(self.denoiser(label)(x, t))


def _next(t: Tensor, grid: Tensor) -> Tensor:
    """[B]: the latest time of a falling grid before `t` [B] on the way to the data; `t` itself at the end."""
    rising = grid.flip(-1).expand(len(t), -1).contiguous()
    place = torch.searchsorted(rising, (t * (1 - 1e-9)).unsqueeze(1)) - 1  # times that differ by rounding are one
    return torch.where(place.squeeze(1) < 0, t, rising.gather(1, place.clamp(min=0)).squeeze(1))
