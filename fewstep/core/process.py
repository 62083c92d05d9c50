"""Continuous diffusion: x_t = alpha(t) x_0 + sigma(t) eps, t = 0 data and t = 1 noise. Contracts only.

Times and what follows from them are float64 whatever the network computes in; arrays have the dtype of x.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, final

from torch import Tensor

from fewstep.core.random import Rng


class Process(Protocol):
    """A corruption process on 0 <= t <= 1. Everything that samplers and losses need follows from `alpha` and `sigma`.

    `sigma / alpha` rises strictly with t from 0, to infinity where alpha(1) = 0. `span`: the first and last time that a model
    sees in training. `gaussian`: whether eps is; solvers that add noise on the way ask for it.
    """

    @property
    def span(self) -> tuple[float, float]: ...

    @property
    def gaussian(self) -> bool: ...

    def alpha(self, t: Tensor) -> Tensor:
        """float64, of t's shape. Raises ValueError for t outside [0, 1]."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """float64, of t's shape. Raises ValueError for t outside [0, 1]."""
        ...

    def time(self, ratio: Tensor) -> Tensor:
        """The inverse of sigma / alpha, infinity included. Raises ValueError for a ratio that the process never has."""
        ...

    def noise(self, shape: Sequence[int], rng: Rng) -> Tensor:
        """eps [B, *shape] float64, a sample of the given shape for each row of `rng`."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Denoised:
    """What a denoiser returns if it has more to say than E[x_0 | x_t].

    `variance`: where the variance of an ancestral step lies on the log scale from its least (0) to its greatest (1), for models
    that learn it. `calls`: rows of the network that were evaluated, if not one for each row of x.
    """

    mean: Tensor
    variance: Tensor | None = None
    calls: int | None = None


class Denoise(Protocol):
    """(x_t [B, ...], t [B] float64) -> E[x_0 | x_t]. What it is conditioned on is its own affair."""

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor | Denoised: ...


M = TypeVar("M")


class Solver(Protocol[M]):
    """Goes from noise to data along a grid of times; written so that alpha_t = 0 and sigma_s = 0 are places like any other.

    `order` of the global error as the steps shrink, `calls` of the denoiser a step (0: as many as it takes). A solver keeps
    nothing between calls: what it knows of a run is in M.
    """

    @property
    def order(self) -> int: ...

    @property
    def calls(self) -> int: ...

    @property
    def stochastic(self) -> bool: ...

    def init(self, x: Tensor, process: Process, grid: Tensor) -> M:
        """`x` [B, ...] the noise, `grid` [K+1] or [B,K+1] float64 times that fall strictly; M holds the coefficient table.

        Raises ValueError for a grid that does not, or a process that the solver does not admit.
        """
        ...

    def step(self, denoise: Denoise, x: Tensor, i: int, memory: M, rng: Rng) -> tuple[Tensor, M]:
        """x at `grid[i + 1]` from x at `grid[i]`; `rng` is the step's own. Leaves x and `memory` as they were."""
        ...
