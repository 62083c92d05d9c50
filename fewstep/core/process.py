"""Continuous diffusion: x_t = alpha(t) x_0 + sigma(t) eps, with t = 0 data and t = 1 noise. Contracts only."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from fewstep.core.random import Rng


class Denoised(NamedTuple):
    """E[x_0 | x_t] and, where a model learns it, the log variance of the reverse step."""

    mean: Tensor
    log_var: Tensor


Denoise = Callable[[Tensor, Tensor], "Tensor | Denoised"]  # (x_t, t [B]) -> E[x_0 | x_t]


class Process(Protocol):
    """A Gaussian corruption process over the time `span`."""

    span: tuple[float, float]

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def time(self, ratio: Tensor) -> Tensor:
        """The inverse of sigma / alpha."""
        ...

    def noise(self, shape: Sequence[int], rng: Rng) -> Tensor: ...


M = TypeVar("M")


class Solver(Protocol[M]):
    """Written as x_s = alpha_s D + (sigma_s / sigma_t)(x_t - alpha_t D): finite where alpha_t = 0."""

    order: int
    stochastic: bool

    def init(self, x: Tensor, process: Process, grid: Tensor) -> M:
        """`grid` [K+1] or [B,K+1], from noise to data; M holds the coefficient table."""
        ...

    def step(self, denoise: Denoise, x: Tensor, i: int, memory: M, rng: Rng) -> tuple[Tensor, M]:
        """One step of the grid, any number of denoise calls; the loop counts them."""
        ...
