"""The one loop of sampling continuous arrays: along a grid from noise to data, step by step of a solver.

This file knows processes, solvers and denoisers through their contracts only, and no network.
"""

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
    begun, watched = time.perf_counter(), _Watched(denoiser)
    memory = solver.init(x, process, grid)
    yield Event(Sampled(0, x, None), Cost(bytes=x.nbytes))
    for i in range(grid.shape[-1] - 1):
        x, memory = solver.step(watched, x, i, memory, rng.at(i))
        cost = Cost(calls=watched.calls, seconds=time.perf_counter() - begun, bytes=x.nbytes)
        yield Event(Sampled(i + 1, x, watched.last), cost)


def sample(denoiser: Denoise, process: Process, solver: Solver[Any], grid: Tensor, x: Tensor, rng: Rng) -> Event[Sampled]:
    """The last event of `denoise`."""
    *_, last = denoise(denoiser, process, solver, grid, x, rng)
    return last


@final
@dataclass(slots=True)
class _Watched:
    """A denoiser whose calls are counted and whose estimates are looked at. `last`: the latest of them."""

    denoiser: Denoise
    calls: int = 0
    last: Tensor | None = field(default=None)

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor | Denoised:
        estimate = self.denoiser(x, t)
        mean, calls = (estimate.mean, estimate.calls) if isinstance(estimate, Denoised) else (estimate, None)
        self.calls += len(x) if calls is None else calls
        if mean.shape != x.shape:
            raise ValueError(f"denoiser: returned {tuple(mean.shape)} for x of {tuple(x.shape)}; E[x_0 | x_t] has the shape of x")
        finite = torch.isfinite(mean)
        if not bool(finite.all()):
            row = int((~finite).flatten(1).any(1).nonzero()[0])
            where = f"t={float(t[row]):.6g}, row {row}, call {self.calls}"
            raise ValueError(f"denoiser: not finite at {where}; look at the network there, or begin the grid later")
        self.last = mean
        return estimate
