"""Grids learned for few steps, on Gaussian mixtures that they were not fitted to, beside the solvers of `diffusers` and `azula`.

Every peer may choose its solver, its order and either of two grids; the best of all, for each number of calls, is what counts.
Peers that are not installed are left out, and the findings say so.
"""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any, final

import torch
from torch import Tensor

from fewstep.diffusion.grids import LearnedConfig
from fewstep.diffusion.learned import LEAST, MOST, SOLVER, Family, Task, error, mixed
from fewstep.diffusion.processes import EDMConfig, VPConfig, translate
from fewstep.diffusion.solvers.multistep import mean
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding

CALLS = (8, 10, 20)
UNSEEN, ELSEWHERE = 5000, 9000  # seeds of mixtures, of the kind of the peers' published errors and of kinds never fitted to
_OTHERS = (Family(d=3, modes=6, spread=1.2), Family(d=6, modes=5, spread=0.8))
_PROCESS, _THEIRS = EDMConfig(), VPConfig()
Run = Callable[[Task, Tensor], Tensor]  # the samples of a peer along ratios [K+1]


def _criteria(name: str, where: str) -> tuple[Criterion, ...]:
    statement = "error at {} calls with the learned grid over that of the best peer, on {}"
    return tuple(
        Criterion(f"{name}-{calls}", statement.format(calls, where), "fewstep's own aim", "at most", 0.6) for calls in CALLS
    )


PLANE = _criteria("plane", "32 unseen mixtures of five modes in the plane")
OTHERS = _criteria("others", "32 mixtures of kinds that no grid was fitted to, in 3 and 6 dimensions")


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    runs = {**diffusers_runs(), **azula_runs()}
    missing = [name for name in ("diffusers", "azula") if not any(run.startswith(name) for run in runs)]
    for criteria, seed, families, groups in ((PLANE, UNSEEN, (Family(),), 32), (OTHERS, ELSEWHERE, _OTHERS, 16)):
        given = mixed(_PROCESS, False, seed, families, groups, rows=64)
        for criterion, calls in zip(criteria, CALLS, strict=True):
            own = error(given, _PROCESS, SOLVER, LearnedConfig(to_zero=False).build(_PROCESS, calls))
            if not runs:
                yield Finding(criterion, None, f"no peer: pip install diffusers azula; here {own:.2g}", {"fewstep": own})
                continue
            theirs = {
                f"{name}, {kind} grid": missed(given, run, grid(calls)) for name, run in runs.items() for kind, grid in GRIDS
            }
            best = min(theirs, key=lambda name: theirs[name])
            even = min(value for name, value in theirs.items() if "Karras" in name)
            how = f"{own:.2g} here, {theirs[best]:.2g} {best}; {even:.2g} the best on a Karras grid" + (
                f"; not installed: {', '.join(missing)}" if missing else ""
            )
            yield Finding(criterion, own / theirs[best], how, {"fewstep": own, **theirs})


def missed(given: Task, run: Run, ratios: Tensor) -> float:
    """The root mean squared error of a peer's samples, its geometric mean over the mixtures; infinite where it gave NaN."""
    squares = (run(given, ratios) - given.reference).square().reshape(given.groups, -1).mean(1)
    return math.exp(float(squares.log().mean()) / 2) if bool(torch.isfinite(squares).all()) else math.inf


def _karras(calls: int) -> Tensor:
    return torch.linspace(MOST ** (1 / 7), LEAST ** (1 / 7), calls + 1, dtype=torch.float64) ** 7


def _exponential(calls: int) -> Tensor:
    return torch.logspace(math.log10(MOST), math.log10(LEAST), calls + 1, dtype=torch.float64)


GRIDS = (("Karras", _karras), ("exponential", _exponential))


def diffusers_runs() -> dict[str, Run]:
    """Its multistep schedulers of every order, ending at lower order, as is their default for few steps, and not."""
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError:
        return {}
    kinds: list[tuple[str, Mapping[str, object]]] = [
        *(("DPMSolverMultistepScheduler", {"solver_order": order, "final_sigmas_type": "sigma_min"}) for order in (2, 3)),
        *(("DEISMultistepScheduler", {"solver_order": order}) for order in (2, 3)),
        *(("UniPCMultistepScheduler", {"solver_order": n, "solver_type": b}) for n, b in product((2, 3), ("bh1", "bh2"))),
    ]
    runs: dict[str, Run] = {}
    for (kind, options), lower in product(kinds, (True, False)):
        name = " ".join(["diffusers", kind.removesuffix("MultistepScheduler"), *map(str, options.values())])
        make = partial(getattr(diffusers, kind), prediction_type="sample", lower_order_final=lower, **options)
        runs[f"{name}{', lower order at the end' if lower else ''}"] = partial(_scheduled, make)
    return runs


def _scheduled(make: Callable[[], Any], given: Task, ratios: Tensor) -> Tensor:
    scheduler, grid = make(), _THEIRS.time(ratios)
    scheduler.set_timesteps(len(ratios) - 1)
    scheduler.sigmas = ratios.float()
    scheduler.timesteps = torch.arange(len(ratios) - 1)
    denoise = translate(given.denoise, _PROCESS, _THEIRS)
    x = given.x * _THEIRS.alpha(grid[:1])
    for i, t in enumerate(scheduler.timesteps):
        estimate = mean(denoise(x.double(), grid[i].expand(len(x))))
        x = scheduler.step(estimate.float(), t, x.float()).prev_sample
    return x.double() / _THEIRS.alpha(grid[-1:])


def azula_runs() -> dict[str, Run]:
    """Its Adams-Bashforth samplers of orders 2 to 4, for noise and data, exponential and not."""
    try:
        samplers = importlib.import_module("azula.sample")
    except ImportError:
        return {}
    kinds = product(("zEABSampler", "xEABSampler", "zABSampler", "vABSampler"), (2, 3, 4))
    return {f"azula {kind} {order}": partial(_sampled, getattr(samplers, kind), order) for kind, order in kinds}


def _sampled(kind: Any, order: int, given: Task, ratios: Tensor) -> Tensor:
    """Its times are those places in a table of ratios, 1 the first."""
    last = len(ratios) - 1

    @final
    class Exact(torch.nn.Module):
        def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
            sigma = ratios[((1 - t) * last).round().long()]
            return torch.ones_like(sigma), sigma

        def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
            time = _PROCESS.time(self.schedule(t)[1]).expand(len(x))
            return SimpleNamespace(mean=mean(given.denoise(x, time)))

    sampler = kind(Exact(), order=order, steps=last, silent=True, dtype=torch.float64)
    samples: Tensor = sampler(given.x)
    return samples


CLAIM = Claim(
    "learned-grid",
    "Tong et al. 2025, arXiv 2405.15506; Karras et al. 2022, arXiv 2206.00364; Zhang and Chen 2023, arXiv 2204.13902",
    "With a grid learned for the number of calls, eight to twenty calls arrive nearer to the end of the path than with any peer.",
    (*PLANE, *OTHERS),
    measure,
)
