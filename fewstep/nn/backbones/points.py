"""A multilayer perceptron for points: a few numbers that lie in no order. This file knows no noise."""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from fewstep.core.recipe import Config
from fewstep.nn.backbones.conditioning import HIGH, Conditioning


@final
class PointsConfig(Config):
    """`depth` hidden layers of `width`, each scaled and shifted by the noise level, told in waves of up to `turns`, and class."""

    kind: ClassVar[str] = "points"
    source: ClassVar[str] = "scale and shift by a condition: Perez et al. 2018, FiLM, arXiv 1709.07871"

    width: int = Field(default=128, ge=2, multiple_of=2)
    depth: int = Field(default=3, ge=1)
    turns: float = Field(default=HIGH, gt=0)

    def build(self, shape: tuple[int, ...], classes: int = 0, told: int = 0, outputs: int = 1) -> "Points":
        return Points(self, shape, Conditioning(self.width, classes, told, self.turns), outputs)


@final
class Points(nn.Module):
    """Cost: about depth (width^2 + 2 width C) multiply-adds a row, C the condition's width, which is `width` too."""

    def __init__(self, config: PointsConfig, shape: tuple[int, ...], condition: Conditioning, outputs: int) -> None:
        """`shape` of a row, any; it is flattened."""
        super().__init__()
        count, width = torch.Size(shape).numel(), config.width
        self.condition = condition
        self.layers = nn.ModuleList(nn.Linear(count if i == 0 else width, width) for i in range(config.depth))
        self.films = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(config.depth))
        self.out = nn.Linear(width, outputs * count)
        nn.init.zeros_(self.out.weight)  # so that training starts from the preconditioning alone
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None, told: Tensor | None = None) -> Tensor:
        """x [B,N,...], noise [B], label [B] or None, told [B,E] or None -> [B, outputs N,...]."""
        condition, h = self.condition(noise, label, told), x.flatten(1)
        for layer, film in zip(self.layers, self.films, strict=True):
            scale, shift = film(condition).chunk(2, -1)
            h = silu(layer(h) * (1 + scale) + shift)
        return self.out(h).view(len(x), -1, *x.shape[2:])
