"""A denoiser: a backbone, what its output means, and the process it is trained on. This file knows all three by contract only."""

from pathlib import Path
from typing import Any, ClassVar, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.process import Denoise, Process
from fewstep.core.recipe import Config, choice
from fewstep.diffusion.parameterisations import PARAMETERISATIONS, EDMPreconditioningConfig, ParameterisationConfig
from fewstep.diffusion.processes import PROCESSES, EDMConfig, translate
from fewstep.models.stored import restore, store
from fewstep.nn.backbones import BACKBONES
from fewstep.nn.backbones.points import PointsConfig


@final
class DenoiserConfig(Config):
    """A network that estimates x_0 of arrays of `shape`, with `classes` of them (0: none) to be told apart.

    x_0 is (data - `centre`) / `scale`, so that processes and parameterisations meet numbers of the order of one.
    """

    kind: ClassVar[str] = "denoiser"
    source: ClassVar[str] = "Karras et al. 2022, arXiv 2206.00364, section 5"

    shape: tuple[int, ...] = (2,)
    classes: int = Field(default=0, ge=0)
    centre: float = 0.0
    scale: float = Field(default=1.0, gt=0)
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
        self.backbone: nn.Module = cast(Any, config.backbone).build(config.shape, config.classes)

    def normed(self, data: Tensor) -> Tensor:
        """x_0 of data, in the dtype of the weights."""
        weight = next(self.parameters())
        return ((data - self.config.centre) / self.config.scale).to(weight)

    def unnormed(self, x_0: Tensor) -> Tensor:
        """Data of x_0."""
        return x_0 * self.config.scale + self.config.centre

    def network(self, inputs: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """The backbone's own output F, as the parameterisation means it; `label` [B] int64, -1 or None for no class."""
        output: Tensor = self.backbone(inputs, c_noise, label)
        return output

    def denoiser(self, label: Tensor | None = None, process: Process | None = None) -> Denoise:
        """The estimate for rows of the classes `label`, as a denoiser of `process` (None: the one it was trained on).

        Another process is reached by a change of variables: any model runs under any sampler.
        """
        own = self.parameterisation.denoiser(lambda x, noise: self.network(x, noise, label), self.process)
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
        return cast(Tensor, self.denoiser(label)(x, t))
