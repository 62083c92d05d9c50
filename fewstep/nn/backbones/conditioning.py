"""What a backbone is told besides its input: the noise level, a class or none, further numbers. This file knows no backbone."""

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

LOW, HIGH = 0.25, 64.0  # turns per unit of the noise level: levels are logarithms or fractions, of the order of one


@final
class Conditioning(nn.Module):
    """Waves of the noise level, an embedding of the class and `told` further numbers, through one hidden layer: [B,C].

    Source: Fourier features, Tancik et al. 2020, arXiv 2006.10739, at fixed frequencies; class 0 of the table is "none", so that
    guidance needs no second network (Ho and Salimans 2022, arXiv 2207.12598). Further numbers enter linearly and without a bias,
    so that zeros say nothing (Karras et al. 2022, arXiv 2206.00364, appendix F.2).
    """

    frequencies: Tensor

    def __init__(self, width: int, classes: int, told: int = 0, turns: float = HIGH) -> None:
        """`width` C, even; `classes`: how many there are, 0 if the data has none; `turns`: of the fastest wave."""
        super().__init__()
        self.classes = classes
        waves = torch.logspace(math.log2(LOW), math.log2(turns), width // 2, base=2.0)
        self.register_buffer("frequencies", 2 * math.pi * waves, persistent=False)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.told = nn.Linear(told, width, bias=False) if told else None
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, noise: Tensor, label: Tensor | None, told: Tensor | None = None) -> Tensor:
        """`noise` [B]; `label` [B] int64 in -1 .. classes - 1, -1 standing for none; None: none in every row; `told` [B,E].

        Raises ValueError for a label of data that has no classes, or outside the range, and for numbers that nothing listens to.
        """
        angle = noise.unsqueeze(1) * self.frequencies.to(noise)
        h = torch.cat([angle.cos(), angle.sin()], 1).to(self.hidden.weight)
        if self.label is not None:
            h = h + self.label(torch.zeros_like(noise, dtype=torch.int64) if label is None else self._checked(label) + 1)
        elif label is not None:
            raise ValueError("label: given to a model without classes; leave it out")
        if self.told is not None and told is not None:
            h = h + self.told(told.to(h))
        elif told is not None:
            raise ValueError("told: given to a model that is told nothing but noise and class; set model.told, or leave it out")
        return silu(self.out(silu(self.hidden(h))))

    def _checked(self, label: Tensor) -> Tensor:
        low, high = (int(edge) for edge in label.aminmax())
        if low < -1 or high >= self.classes:
            raise ValueError(f"label={low if low < -1 else high}: outside 0 .. {self.classes - 1}; -1 stands for none")
        return label
