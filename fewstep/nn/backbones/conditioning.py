"""What a backbone is told besides its input: the noise level, and a class or none. This file knows no backbone."""

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

LOW, HIGH = 0.25, 64.0  # turns per unit of the noise level: levels are logarithms or fractions, of the order of one


@final
class Conditioning(nn.Module):
    """Waves of the noise level, and an embedding of the class, through one hidden layer: [B,C].

    Source: Fourier features, Tancik et al. 2020, arXiv 2006.10739, at fixed frequencies; class 0 of the table is "none", so that
    guidance needs no second network (Ho and Salimans 2022, arXiv 2207.12598).
    """

    frequencies: Tensor

    def __init__(self, width: int, classes: int) -> None:
        """`width` C, even; `classes`: how many there are, 0 if the data has none."""
        super().__init__()
        self.classes = classes
        turns = torch.logspace(math.log2(LOW), math.log2(HIGH), width // 2, base=2.0)
        self.register_buffer("frequencies", 2 * math.pi * turns, persistent=False)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, noise: Tensor, label: Tensor | None) -> Tensor:
        """`noise` [B]; `label` [B] int64 in -1 .. classes - 1, -1 standing for none; None: none in every row.

        Raises ValueError for a label of data that has no classes, or outside the range.
        """
        angle = noise.unsqueeze(1) * self.frequencies.to(noise)
        h = torch.cat([angle.cos(), angle.sin()], 1).to(self.hidden.weight)
        if self.label is not None:
            h = h + self.label(torch.zeros_like(noise, dtype=torch.int64) if label is None else self._checked(label) + 1)
        elif label is not None:
            raise ValueError("label: given to a model without classes; leave it out")
        return silu(self.out(silu(self.hidden(h))))

    def _checked(self, label: Tensor) -> Tensor:
        low, high = (int(edge) for edge in label.aminmax())
        if low < -1 or high >= self.classes:
            raise ValueError(f"label={low if low < -1 else high}: outside 0 .. {self.classes - 1}; -1 stands for none")
        return label
