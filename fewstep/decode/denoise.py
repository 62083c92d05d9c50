"""The one loop of sampling continuous arrays: along a grid from noise to data, step by step of a solver.

This file knows processes, solvers and denoisers through their contracts only, and no network.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from fewstep.core.event import Cost, Event
from fewstep.core.process import Denoise, Denoised, Process, Solver
from fewstep.core.random import Rng


@final
@dataclass(frozen=True, slots=True)
class Sampled:
    """Where a step arrived: place `i` of the grid, `x` [B, ...] there, and the step's last estimate of the data (None at the
    start). At the last event x is the sample."""

    i: int
    x: Tensor
    denoised: Tensor | None


def start(process: Process, grid: Tensor, shape: Sequence[int], rng: Rng, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise [B, *shape] at the grid's first time, a sample for each row of `rng`."""
    noise = process.noise(shape, rng.split("start"))
    sigma = process.sigma(grid[..., 0]).to(noise).reshape(-1, *(1,) * len(shape))
    return (sigma * noise).to(dtype)


@torch.no_grad()
def denoise(
    denoiser: Denoise, process: Process, solver: Solver[Any], grid: Tensor, x: Tensor, rng: Rng
) -> Iterator[Event[Sampled]]:
    """Carry noise `x` [B, ...], as `start` gives it, along `grid` [K+1] or [B,K+1] to data: K + 1 events, the noise first.

    `rng` one row per row of x; a row's sample depends on its own noise, grid and seed alone. Costs are cumulative, and a call is
    a row of the network evaluated. Raises ValueError for a grid or process that the solver does not take before any call, and
    for an estimate of another shape or that is not finite when it is made.
    """
    watched = _Watched(denoiser)
    for i, arrived in enumerate(_along(watched, process, solver, grid, x, rng)):
        yield watched.event(i, arrived)


@torch.no_grad()
def sample(denoiser: Denoise, process: Process, solver: Solver[Any], grid: Tensor, x: Tensor, rng: Rng) -> Event[Sampled]:
    """The last event of `denoise`, a little cheaper than all of them."""
    watched = _Watched(denoiser)
    for arrived in _along(watched, process, solver, grid, x, rng):  # noqa: B007  the last one is wanted
        pass
    return watched.event(grid.shape[-1] - 1, arrived)


def _along(denoiser: Denoise, process: Process, solver: Solver[Any], grid: Tensor, x: Tensor, rng: Rng) -> Iterator[Tensor]:
    """x at every place of the grid."""
    memory = solver.init(x, process, grid)
    yield x
    for i in range(grid.shape[-1] - 1):
        x, memory = solver.step(denoiser, x, i, memory, rng.at(i))
        yield x


@final
@dataclass(slots=True)
class _Watched:
    """A denoiser whose calls are counted and whose estimates are looked at. `last`: the latest of them."""

    denoiser: Denoise
    calls: int = 0
    last: Tensor | None = None
    begun: float = field(default_factory=time.perf_counter)

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor | Denoised:
        estimate = self.denoiser(x, t)
        mean, calls = (estimate.mean, estimate.calls) if isinstance(estimate, Denoised) else (estimate, None)
        self.calls += x.shape[0] if calls is None else calls
        if mean.shape != x.shape:
            raise ValueError(f"denoiser: returned {tuple(mean.shape)} for x of {tuple(x.shape)}; E[x_0 | x_t] has the shape of x")
        if not math.isfinite(mean.sum().item()):  # never finite if an entry is not, and several times cheaper to ask
            self._require_finite(mean, t)
        self.last = mean
        return estimate

    def event(self, i: int, x: Tensor) -> Event[Sampled]:
        """That x arrived at place i."""
        cost = Cost(calls=self.calls, seconds=time.perf_counter() - self.begun, bytes=x.nbytes)
        return Event(Sampled(i, x, self.last), cost)

    def _require_finite(self, mean: Tensor, t: Tensor) -> None:
        finite = torch.isfinite(mean).flatten(1).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            where = f"t={float(t[row]):.6g}, row {row}, call {self.calls}"
            raise ValueError(f"denoiser: not finite at {where}; look at the network there, or begin the grid later")
