"""Grids fitted to a solver and a number of steps: the error against a fine reference falls by gradient through the solver.

`python -m fewstep.diffusion.learned` fits the grids that are shipped, on random Gaussian mixtures whose denoisers are known, and
writes them beside this file; `LearnedConfig` reads them. This file knows no network.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewstep.core.process import Denoise, Process, Solver
from fewstep.core.random import CounterRng
from fewstep.diffusion.grids import SHIPPED, KarrasConfig, LearnedConfig, LogSNRConfig
from fewstep.diffusion.mixture import Mixture
from fewstep.diffusion.processes import EDMConfig
from fewstep.diffusion.solvers.unipc import UniPCConfig

MOST, LEAST = 50.0, 0.02  # of shipped grids; every process reaches both
SOLVER: Solver[Any] = UniPCConfig(terms=3).build()


class Family(NamedTuple):
    """Random mixtures of a kind: of `modes` in `d` dimensions, whose means have the deviation `spread`."""

    d: int = 2
    modes: int = 5
    spread: float = 1.0


FAMILIES = (Family(), Family(modes=3, spread=0.7), Family(modes=8, spread=1.5), Family(d=4), Family(d=8, modes=4))


class Task(NamedTuple):
    """What a grid is fitted on: a denoiser, noise `x` [B, ...] at the first time, and where it should arrive.

    `groups`: how many laws of data the rows are of, B / groups in turn of each; the error of each counts the same.
    """

    denoise: Denoise
    x: Tensor
    reference: Tensor
    groups: int = 1


class Fit(NamedTuple):
    """How a grid is fitted: from `most` to `least`, on to t = 0 if `to_zero`; `iterations` of Adam from `rate` to 0."""

    most: float = 80.0
    least: float = 0.002
    to_zero: bool = True
    iterations: int = 200
    rate: float = 0.08


def task(denoise: Denoise, process: Process, solver: Solver[Any], grid: Tensor, x: Tensor, groups: int = 1) -> Task:
    """The task whose reference a deterministic solver reaches along a fine `grid`."""
    with torch.no_grad():
        return Task(denoise, x, _carried(denoise, process, solver, grid, x), groups)


def errors(given: Task, process: Process, solver: Solver[Any], grid: Tensor) -> Tensor:
    """[groups] mean squared errors of an entry of x_0, where `solver` arrives along `grid`."""
    missed = _carried(given.denoise, process, solver, grid, given.x) - given.reference
    return missed.square().reshape(given.groups, -1).mean(1)


def fit_grid(
    tasks: Sequence[Task],
    process: Process,
    solver: Solver[Any],
    steps: int,
    fit: Fit = Fit(),
    watch: Callable[[int, float], None] | None = None,
) -> LearnedConfig:
    """The grid of `steps` with the least mean squared error (its log, averaged over groups) that was found.

    It starts uniform in (sigma / alpha)^(1/7); the first ratio stays, the last above 0 does too unless the grid goes on to t = 0.
    `watch` is told the iteration and the loss. Cost: per iteration and task, `steps` calls forward and backward.
    Raises ValueError for a stochastic solver.
    """
    if solver.stochastic:
        raise ValueError("solver: adds noise, so there is no reference to arrive at; fit the grid to a deterministic one")
    gaps = _first(steps, fit).requires_grad_()
    adam = torch.optim.Adam([gaps], lr=fit.rate, betas=(0.9, 0.99))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, fit.iterations)
    best, found = math.inf, ()
    for n in range(fit.iterations + 1):
        ratios = _ratios(gaps, fit)
        loss = torch.cat([errors(given, process, solver, process.time(ratios)) for given in tasks]).log().mean()
        reached = loss.item()
        if reached < best:
            best, found = reached, tuple(ratios.detach().tolist())
        if watch is not None:
            watch(n, reached)
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
    return LearnedConfig(ratios=found)


def _first(steps: int, fit: Fit) -> Tensor:
    """The logits of the gaps in ln(sigma / alpha), a share of the whole each."""
    ratios = torch.linspace(fit.most ** (1 / 7), fit.least ** (1 / 7), steps + 1, dtype=torch.float64) ** 7
    return (-ratios.log().diff()).log()


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


def together(mixtures: Sequence[Mixture], process: Process) -> Denoise:
    """The denoiser of rows that belong to several mixtures, as many to each and those of the first one first.

    Their dimension is the largest: coordinates beyond a mixture's own are 0. The mean is computed in float64.
    """
    d, modes = max(m.d for m in mixtures), max(len(m.weights) for m in mixtures)
    groups = len(mixtures)
    means = torch.stack([pad(m.means, (0, d - m.d, 0, modes - len(m.means))) for m in mixtures])
    lengths = means.square().sum(2).unsqueeze(1)
    variances = torch.stack([pad(m.deviations**2, (0, modes - len(m.means)), value=1.0) for m in mixtures]).unsqueeze(1)
    weights = torch.stack([pad(m.weights, (0, modes - len(m.means))) for m in mixtures]).unsqueeze(1)
    half = torch.tensor([m.d / 2 for m in mixtures], dtype=torch.float64).view(-1, 1, 1)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (factor.view(groups, -1, 1) for factor in (process.alpha(t), process.sigma(t)))
        y, variance = x.double().view(groups, -1, d) / alpha, variances + (sigma / alpha) ** 2
        away = y.square().sum(2, keepdim=True) - 2 * torch.bmm(y, means.mT) + lengths
        share = torch.softmax(weights.log() - away / (2 * variance) - half * torch.log(variance), 2)
        gain = share * variances / variance
        return (torch.bmm(share - gain, means) + gain.sum(2, keepdim=True) * y).view_as(x).to(x.dtype)

    return denoise


def mixed(process: Process, to_zero: bool, seed: int, families: Sequence[Family], groups: int, rows: int) -> Task:
    """`rows` samples of each of `groups` random mixtures of each family, drawn with `seed` and those after it."""
    kinds = [kind for kind in families for _ in range(groups)]
    mixtures = [Mixture.drawn(seed + n, kind.modes, kind.d, kind.spread) for n, kind in enumerate(kinds)]
    d = max(kind.d for kind in families)
    eps = torch.cat([pad(CounterRng.seeded([seed + n]).normal(rows, m.d)[0], (0, d - m.d)) for n, m in enumerate(mixtures)])
    fine = LogSNRConfig(most=MOST, least=LEAST / 10 if to_zero else LEAST, to_zero=to_zero).build(process, 400)
    x = eps * process.sigma(fine[0])
    return task(together(mixtures, process), process, SOLVER, fine, x, len(mixtures))


def error(given: Task, process: Process, solver: Solver[Any], grid: Tensor) -> float:
    """The root mean squared error, its geometric mean over the groups."""
    with torch.no_grad():
        return math.exp(errors(given, process, solver, grid).log().mean().item() / 2)


def main(options: argparse.Namespace) -> None:
    """Fit every grid that is shipped, tell each as it is done, and write all of them."""
    torch.set_num_threads(1)
    process, grids = EDMConfig(), []
    for to_zero in (False, True):
        given = mixed(process, to_zero, options.seed, FAMILIES, options.groups, options.rows)
        for steps in options.steps:
            begun = time.perf_counter()
            ratios = fit_grid([given], process, SOLVER, steps, Fit(MOST, LEAST, to_zero, options.iterations)).ratios
            kept = [float(f"{ratio:.6g}") for ratio in ratios]
            found = error(given, process, SOLVER, process.time(torch.tensor(kept, dtype=torch.float64)))
            even = error(given, process, SOLVER, KarrasConfig(most=MOST, least=LEAST, to_zero=to_zero).build(process, steps))
            grids.append({"to_zero": to_zero, "ratios": kept, "error": round(found, 6), "karras": round(even, 6)})
            print(json.dumps(grids[-1]), f"{time.perf_counter() - begun:.0f} s", flush=True)
    how = {key: value for key, value in vars(options).items() if key not in ("out", "steps")}
    lines = ",\n".join("  " + json.dumps(grid) for grid in grids)
    options.out.write_text(f'{{"solver": "unipc, terms 3", "fitted": {json.dumps(how)}, "grids": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15, 20])
    parser.add_argument("--seed", type=int, default=1000, help="of the first mixture; those that tests draw are others")
    parser.add_argument("--groups", type=int, default=12, help="mixtures of each family")
    parser.add_argument("--rows", type=int, default=32, help="samples of each mixture")
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    main(parser.parse_args())
