"""Gaussian mixtures, whose density, moments and denoiser are known in closed form under any process.

What samplers and likelihoods are checked on, and what shipped grids are fitted to.
"""

from typing import final

import torch
from torch import Tensor

from fewstep.core.process import Denoise, Process
from fewstep.core.random import CounterRng


@final
class Mixture:
    """`means` [M,d], isotropic `deviations` [M] and `weights` [M] that sum to 1, float64."""

    def __init__(self, means: Tensor, deviations: Tensor, weights: Tensor) -> None:
        self.means, self.deviations, self.weights = means.double(), deviations.double(), weights.double()

    @classmethod
    def drawn(cls, seed: int, modes: int = 5, d: int = 2, spread: float = 1.0) -> "Mixture":
        """A random mixture of about unit scale with modes of deviation 0.1 to 0.4."""
        rng = CounterRng.seeded([seed])
        weights = 0.5 + rng.split("weights").uniform(modes)[0]
        return cls(spread * rng.normal(modes, d)[0], 0.1 + 0.3 * rng.uniform(modes)[0], weights / weights.sum())

    @property
    def d(self) -> int:
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        centred = self.means - self.mean
        within = (self.weights * self.deviations**2).sum() * torch.eye(self.d, dtype=torch.float64)
        return within + centred.T @ (self.weights.unsqueeze(1) * centred)

    def sample(self, count: int, seed: int) -> Tensor:
        """[count,d] draws."""
        rng = CounterRng.seeded([seed])
        mode = torch.searchsorted(self.weights.cumsum(0), rng.uniform(count)[0]).clamp(max=len(self.weights) - 1)
        return self.means[mode] + self.deviations[mode, None] * rng.split("x").normal(count, self.d)[0]

    def log_prob(self, x: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> Tensor:
        """ln p of alpha x_0 + sigma eps at x [B,d]; alpha, sigma numbers or [B]."""
        return torch.logsumexp(self._terms(x, torch.as_tensor(alpha).view(-1, 1), torch.as_tensor(sigma).view(-1, 1)), 1)

    def _terms(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        variance = (alpha * self.deviations) ** 2 + sigma**2
        away = (x.unsqueeze(1) - alpha.unsqueeze(2) * self.means).square().sum(2)
        return self.weights.log() - away / (2 * variance) - self.d / 2 * torch.log(2 * torch.pi * variance)

    def denoiser(self, process: Process) -> Denoise:
        """E[x_0 | x_t], computed in float64 and returned in the dtype of x."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = process.alpha(t).unsqueeze(1), process.sigma(t).unsqueeze(1)
            wide = x.double()
            share = torch.softmax(self._terms(wide, alpha, sigma), 1).unsqueeze(2)
            gain = alpha * self.deviations**2 / ((alpha * self.deviations) ** 2 + sigma**2)
            modes = self.means + gain.unsqueeze(2) * (wide.unsqueeze(1) - alpha.unsqueeze(2) * self.means)
            return (share * modes).sum(1).to(x.dtype)

        return denoise
