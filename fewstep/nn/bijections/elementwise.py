"""Increasing maps of single numbers, steered by the numbers a network gives for each. Coupling and autoregression share them.

This file knows no network. Zeros give the identity, so a flow whose networks end in zeros begins as the identity.
"""

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor


class Elementwise(Protocol):
    """y = f(x; p), increasing in x. x, y [...] and p [...,numbers]; each direction gives the logarithm of its own slope [...]."""

    @property
    def numbers(self) -> int: ...

    def forward(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, y: Tensor, p: Tensor) -> tuple[Tensor, Tensor]: ...


@final
@dataclass(frozen=True)
class Additive:
    """y = x + t, whose slope is 1. Source: Dinh et al. 2014, arXiv 1410.8516, section 3.2."""

    numbers = 1

    def forward(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return x + p[..., 0], torch.zeros_like(x)

    def inverse(self, y: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return y - p[..., 0], torch.zeros_like(y)


@final
@dataclass(frozen=True)
class Affine:
    """y = x e^s + t with |s| < `bound`; p = (t, raw), s = raw / (1 + |raw| / bound).

    Source: Dinh et al. 2016, arXiv 1605.08803, equation 7. Differs: the bound is soft and fixed (theirs: a learned multiple of
    tanh). With a wide one a layer or two far from the data send a row to where its density is no number.
    """

    bound: float = 2.0
    numbers = 2

    def forward(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        t, raw = p.unbind(-1)
        s = raw / (1 + raw.abs() / self.bound)
        return x * s.exp() + t, s

    def inverse(self, y: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        t, raw = p.unbind(-1)
        s = raw / (raw.abs() / -self.bound - 1)  # of the inverse
        return (y - t) * s.exp(), s
