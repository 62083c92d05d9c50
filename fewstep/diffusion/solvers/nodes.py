"""A grid as solvers see it: checked, with alpha, sigma and the log-SNR at its places, and integrals between them.

On the clock of lambda = -ln(sigma / alpha) every process has the same ODE, d(x/alpha)/d lambda = D - x/alpha, whose linear part
is solved exactly; what is left are integrals of polynomials against exp(lambda). Everything is float64, [K] or [B,K] for the K
steps, and differentiable in the grid.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fewstep.core.process import Process


@final
@dataclass(frozen=True)
class Nodes:
    """The K+1 places of a grid. `t`, `alpha`, `sigma` [K+1] or [B,K+1]; `start` and `end` of the steps are views of K."""

    process: Process
    t: Tensor

    @classmethod
    def of(cls, x: Tensor, process: Process, grid: Tensor, solver: str, noisy: bool = False) -> "Nodes":
        """Raises ValueError for a grid or an array that no solver takes, or noise that is not Gaussian where noise is added."""
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"x: {x.dtype}; solvers take float32 or float64, let the network cast to less itself")
        if grid.dim() not in (1, 2) or grid.shape[-1] < 2 or (grid.dim() == 2 and len(grid) != len(x)):
            raise ValueError(f"grid: shape {tuple(grid.shape)}; give [K+1] times, or [{len(x)},K+1] for a grid of each row's own")
        if not bool((grid.diff(dim=-1) < 0).all()):
            raise ValueError("grid: must fall strictly from noise (t near 1) to data (t near 0); sort it and drop repeated times")
        if noisy and not process.gaussian:
            raise ValueError(
                f"solver={solver!r}: adds Gaussian noise, which this process does not have; choose a deterministic one"
            )
        return cls(process, grid.double())

    @cached_property
    def alpha(self) -> Tensor:
        return self.process.alpha(self.t)

    @cached_property
    def sigma(self) -> Tensor:
        return self.process.sigma(self.t)

    @property
    def steps(self) -> int:
        return self.t.shape[-1] - 1

    @property
    def starts(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma where each step starts."""
        return self.alpha[..., :-1], self.sigma[..., :-1]

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma where each step ends."""
        return self.alpha[..., 1:], self.sigma[..., 1:]

    @cached_property
    def shrink(self) -> Tensor:
        """[.., K] ratio at the end of a step over that at its start, 0 <= . < 1; 0 where alpha_t = 0 or sigma_s = 0."""
        (alpha, sigma), (alpha_s, sigma_s) = self.starts, self.ends
        return alpha * sigma_s / (sigma * alpha_s)

    @cached_property
    def finite(self) -> Tensor:
        """[.., K+1] whether the log-SNR is: neither alpha nor sigma is 0."""
        return (self.alpha > 0) & (self.sigma > 0)

    @cached_property
    def log_snr(self) -> Tensor:
        """[.., K+1] lambda = ln(alpha / sigma); where it is infinite some number, whose gradient is 0."""
        ones = torch.ones_like(self.alpha)
        return torch.log(torch.where(self.finite, self.alpha, ones) / torch.where(self.finite, self.sigma, ones))

    @cached_property
    def smooth(self) -> Tensor:
        """[.., K] whether the log-SNR is finite at both ends of a step; others are taken at first order."""
        return self.finite[..., :-1] & self.finite[..., 1:]

    @cached_property
    def h(self) -> Tensor:
        """[.., K] the length of a step in lambda, 1 where it is infinite."""
        return torch.where(self.smooth, self.log_snr.diff(dim=-1), 1.0)

    def past(self, count: int) -> Tensor:
        """[.., K, count] lambda at step i's start less that of the start of step i - 1 - j, in units of h: places behind, < 0.

        Where there is no such place, or its log-SNR is infinite, some other place within the step: `known` tells.
        """
        behind = torch.stack([self.log_snr[..., :-1] - _later(self.log_snr[..., :-1], j + 1) for j in range(count)], -1)
        spare = torch.arange(1, count + 1, dtype=self.h.dtype, device=self.h.device) / (count + 1)
        places = -behind / self.h.unsqueeze(-1)
        return torch.where(torch.arange(count, device=self.h.device) < (self.known(count) - 1).unsqueeze(-1), places, spare)

    def known(self, most: int) -> Tensor:
        """[.., K] the denoised estimates, its own included, that step i may use: at most 1 + `most`, 1 at first order."""
        count = torch.zeros_like(self.smooth, dtype=torch.int64)
        unbroken = self.smooth
        for j in range(1, most + 1):
            unbroken = unbroken & _later(self.smooth, j)
            count = count + unbroken.long()
        return 1 + count

    @property
    def clean(self) -> tuple[bool, ...]:
        """Of each step, whether it ends at sigma = 0. Raises ValueError if some rows of the grid do and others do not."""
        clean = self.ends[1] == 0
        if clean.dim() == 2 and bool((clean.any(0) != clean.all(0)).any()):
            raise ValueError("grid: some rows end at t=0 and others do not, which this solver does not take; end all rows alike")
        return tuple((clean if clean.dim() == 1 else clean[0]).tolist())

    def times(self, batch: int) -> tuple[Tensor, ...]:
        """K+1 tensors [B]: the time of each row at each place."""
        return self.t.expand(batch, -1).unbind(1)


def _later(values: Tensor, steps: int) -> Tensor:
    """`values` [.., K] moved towards later steps; zeros come in."""
    return pad(values, (steps, 0))[..., : values.shape[-1]]


def moments(h: Tensor, count: int) -> Tensor:
    """[.., count] integrals of h exp(-h (1 - u)) u^k over 0 <= u <= 1, to rounding for any h > 0.

    By recursion where h is large, by Gauss-Legendre quadrature where that would cancel.
    """
    nodes, weights = legendre(12, h)
    powers = torch.stack([nodes**k for k in range(count)])
    small = h.clamp(max=1.0).unsqueeze(-1)
    summed = ((small * torch.exp(small * (nodes - 1)) * weights).unsqueeze(-2) * powers).sum(-1)
    large = h.clamp(min=1.0)
    run = [-torch.expm1(-large)]
    for k in range(1, count):
        run.append(1 - k * run[-1] / large)
    return torch.where(h.unsqueeze(-1) < 1, summed, torch.stack(run, -1))


def interpolation(places: Tensor, integrals: Tensor) -> Tensor:
    """Weights [.., m] on values at `places` [.., m] whose sum is the integral of the polynomial through them.

    `integrals` [.., m]: those of the powers 0 to m - 1.
    """
    powers = torch.stack([places**k for k in range(places.shape[-1])], -2)
    return torch.linalg.solve(powers, integrals)


def exponential(h: Tensor, places: Tensor) -> Tensor:
    """Weights [.., m], of sum 1 - e^-h, of an exponential integrator for D at `places` [.., m]: 0 a step's start, 1 its end.

    Source: Hochbruck and Ostermann 2010, section 2.5 (exponential Adams); Zhang and Chen 2023, arXiv 2204.13902.
    """
    return interpolation(places, moments(h, places.shape[-1]))


def legendre(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes in (0, 1) and weights of Gauss-Legendre quadrature with `count` places."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return like.new_tensor((nodes + 1) / 2), like.new_tensor(weights / 2)
