"""Grids fitted to a solver and a number of steps: the error against a fine reference falls by gradient through the solver."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.process import Denoise, Process, Solver
from fewstep.core.random import CounterRng
from fewstep.diffusion.grids import LearnedConfig


class Task(NamedTuple):
    """What a grid is fitted on: a denoiser, noise `x` [B, ...] at the first time, and where it should arrive."""

    denoise: Denoise
    x: Tensor
    reference: Tensor


class Fit(NamedTuple):
    """How a grid is fitted: from `most` to `least`, and from there to t = 0 if `to_zero`; `iterations` of Adam at `rate`."""

    most: float = 80.0
    least: float = 0.002
    to_zero: bool = True
    iterations: int = 200
    rate: float = 0.05


def task(denoise: Denoise, process: Process, solver: Solver[Any], grid: Tensor, x: Tensor) -> Task:
    """The task whose reference a deterministic solver reaches along a fine `grid`."""
    with torch.no_grad():
        return Task(denoise, x, _carried(denoise, process, solver, grid, x))


def fit_grid(
    tasks: Sequence[Task],
    process: Process,
    solver: Solver[Any],
    steps: int,
    fit: Fit = Fit(),
    watch: Callable[[int, float], None] | None = None,
) -> LearnedConfig:
    """The grid of `steps` with the least mean squared error (its log, averaged over the tasks) that was found.

    It starts uniform in (sigma / alpha)^(1/7); the first ratio stays, the last above 0 does too unless the grid goes on to t = 0.
    `watch` is told the iteration and the loss. Cost: per iteration and task, `steps` calls forward and backward.
    Raises ValueError for a stochastic solver.
    """
    if solver.stochastic:
        raise ValueError("solver: adds noise, so there is no reference to arrive at; fit the grid to a deterministic one")
    gaps = _first(steps, fit).requires_grad_()
    adam = torch.optim.Adam([gaps], lr=fit.rate)
    best, found = math.inf, ()
    for n in range(fit.iterations + 1):
        ratios = _ratios(gaps, fit)
        losses = []
        for given in tasks:
            arrived = _carried(given.denoise, process, solver, process.time(ratios), given.x)
            losses.append((arrived - given.reference).square().mean().log())
        loss = torch.stack(losses).mean()
        if float(loss.detach()) < best:
            best, found = float(loss.detach()), tuple(ratios.detach().tolist())
        if watch is not None:
            watch(n, float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return LearnedConfig(ratios=found)


def _first(steps: int, fit: Fit) -> Tensor:
    """The logits of the gaps in ln(sigma / alpha), a share of the whole each."""
    place = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    ratios = torch.lerp(torch.tensor(fit.most ** (1 / 7)).double(), torch.tensor(fit.least ** (1 / 7)).double(), place) ** 7
    return -ratios.log().diff().neg().reciprocal().log()


def _ratios(gaps: Tensor, fit: Fit) -> Tensor:
    """[steps + 1]: from `most` down by the gaps; the last gap is left out where the grid goes on to 0."""
    fallen = torch.softmax(gaps, 0).cumsum(0) * math.log(fit.most / fit.least)
    ratios = fit.most * torch.exp(-torch.cat((fallen.new_zeros(1), fallen)))
    return torch.cat((ratios[:-1], ratios.new_zeros(1))) if fit.to_zero else ratios


def _carried(denoise: Denoise, process: Process, solver: Solver[Any], grid: Tensor, x: Tensor) -> Tensor:
    """x / alpha at the grid's end."""
    memory, rng = solver.init(x, process, grid), CounterRng.seeded([0] * len(x))
    for i in range(grid.shape[-1] - 1):
        x, memory = solver.step(denoise, x, i, memory, rng)
    return x / process.alpha(grid[-1]).to(x.dtype)
