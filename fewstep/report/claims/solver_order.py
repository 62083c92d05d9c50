"""Orders of solvers, measured on a Gaussian mixture whose denoiser is known, beside what `diffusers` does on the same grids.

No network is needed. Without `diffusers` its criteria are not measured.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.core.process import Process, Solver
from fewstep.core.random import CounterRng
from fewstep.decode.denoise import sample
from fewstep.diffusion.grids import LogSNRConfig
from fewstep.diffusion.mixture import Mixture
from fewstep.diffusion.processes import VPConfig
from fewstep.diffusion.solvers.heun import HeunConfig
from fewstep.diffusion.solvers.multistep import mean
from fewstep.diffusion.solvers.ode import DEISConfig, DPMSolverConfig, EulerConfig
from fewstep.diffusion.solvers.unipc import UniPCConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding

_STEPS, _ROWS, _MOST, _LEAST = (96, 192, 384), 8, 50.0, 0.1  # at the most noise the estimate hardly moves in the first steps
_FINE = 1024
_PROCESS: Process = VPConfig()
_MIXTURE = Mixture(
    torch.tensor([[1.0, 0.0], [-0.7, 0.6], [0.0, -1.0]]), torch.tensor([0.4, 0.36, 0.44]), torch.tensor([0.3, 0.3, 0.4])
)

_STATED: Mapping[str, tuple[Solver[Any], float]] = {
    "Euler": (EulerConfig().build(), 1.0),
    "1M": (DPMSolverConfig(terms=1).build(), 1.0),
    "2M": (DPMSolverConfig().build(), 2.0),
    "Heun": (HeunConfig().build(), 2.0),
    "DEIS-2": (DEISConfig(terms=2).build(), 2.0),
    "DEIS-3": (DEISConfig().build(), 3.0),
    "UniPC-2": (UniPCConfig().build(), 3.0),
}
_THREE, _PUBLISHED = DPMSolverConfig(terms=3).build(), DPMSolverConfig(terms=3, published=True).build()

STATED = Criterion(
    "stated-orders",
    f"the furthest measured order of {', '.join(_STATED)} from the one stated",
    "arXiv 2206.00364, 2211.01095, 2204.13902, 2302.04867; the threshold is fewstep's own",
    "at most",
    0.15,
)
THIRD = Criterion(
    "third-order",
    "DPM-Solver++ 3M, its second difference with the factor 2: order",
    "arXiv 2211.01095, section 4",
    "at least",
    2.75,
)
FOURTH = Criterion("unipc-3", "UniPC-3: order", "arXiv 2302.04867, theorem 3.1", "at least", 3.6)
AS_PUBLISHED = Criterion("published-3M", "DPM-Solver++ 3M as its code has it: order, here", "fewstep's own", "at most", 2.25)
DEVIATES = Criterion("diffusers-3M", "the same of diffusers, in float64: order", "fewstep's own", "at most", 2.25)
SAME = Criterion(
    "same-steps", "the largest difference between 3M as published here and in diffusers", "fewstep's own", "at most", 1e-6
)
RISES = Criterion(
    "diffusers-float32",
    "diffusers' DEIS-3: error at 256 steps over that at 128, by its own grid in float32",
    "fewstep's own",
    "at least",
    1.0,
)
ENDS = Criterion(
    "diffusers-ends", "grids of 20 and 50 steps on which diffusers' 3M ends in NaN", "fewstep's own", "at least", 1.0
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    eps = CounterRng.seeded(range(bench.effort.seed, bench.effort.seed + _ROWS)).normal(2)
    wanted = arrive(UniPCConfig(terms=3).build(), eps, _FINE)

    def order(run: Callable[[Tensor, int], Tensor]) -> tuple[float, dict[str, float]]:
        errors = {steps: float((run(eps, steps) - wanted).square().mean().sqrt()) for steps in _STEPS}
        slope = math.log(errors[_STEPS[0]] / errors[_STEPS[-1]]) / math.log(_STEPS[-1] / _STEPS[0])
        return slope, {f"error at {steps}": error for steps, error in errors.items()}

    how = f"{_ROWS} samples, {_STEPS[0]} to {_STEPS[-1]} steps, float64"
    found = {name: order(partial(arrive, solver))[0] for name, (solver, _) in _STATED.items()}
    yield Finding(STATED, max(abs(found[name] - stated) for name, (_, stated) in _STATED.items()), how, found)
    for criterion, solver in ((THIRD, _THREE), (FOURTH, UniPCConfig(terms=3).build()), (AS_PUBLISHED, _PUBLISHED)):
        slope, numbers = order(partial(arrive, solver))
        yield Finding(criterion, slope, how, numbers)
    if importlib.util.find_spec("diffusers") is None:
        yield from (
            Finding(c, None, "diffusers is not installed; pip install 'fewstep[peers]'") for c in (DEVIATES, SAME, RISES, ENDS)
        )
        return
    slope, numbers = order(of_diffusers)
    yield Finding(DEVIATES, slope, how, numbers)
    yield Finding(SAME, float((of_diffusers(eps, 96) - arrive(_PUBLISHED, eps, 96)).abs().max()), "96 steps, float64")
    rough = {steps: in_float32(eps, steps) for steps in (128, 256)}
    yield Finding(
        RISES, rough[256] / rough[128], "its Karras grid from 20 to 0.05", {f"error at {n}": e for n, e in rough.items()}
    )
    yield Finding(ENDS, float(sum(ends_in_nan(steps) for steps in (20, 50))), "Karras sigmas, final_sigmas_type sigma_min")


def grid_of(steps: int, most: float = _MOST, least: float = _LEAST) -> Tensor:
    """[steps + 1] times, even in the log-SNR."""
    return LogSNRConfig(most=most, least=least, to_zero=False).build(_PROCESS, steps)


def arrive(solver: Solver[Any], eps: Tensor, steps: int) -> Tensor:
    """x at the least noise from unit noise `eps` at the most."""
    rng = CounterRng.seeded([0] * len(eps))
    return sample(_MIXTURE.denoiser(_PROCESS), _PROCESS, solver, grid_of(steps), eps, rng).payload.x


def of_diffusers(eps: Tensor, steps: int) -> Tensor:
    """The same by diffusers' updates of DPM-Solver++ 3M, called one by one since its `step` casts to float32."""
    scheduler = _scheduler("DPMSolverMultistepScheduler", steps)
    grid, x = grid_of(steps), eps
    scheduler.sigmas = _PROCESS.sigma(grid) / _PROCESS.alpha(grid)
    updates = (
        scheduler.dpm_solver_first_order_update,
        scheduler.multistep_dpm_solver_second_order_update,
        scheduler.multistep_dpm_solver_third_order_update,
    )
    held: list[Tensor] = []
    for i in range(steps):
        scheduler._step_index = i
        held = [*held, _estimate(x, grid[i])][-3:]
        x = updates[len(held) - 1](held[-1] if i == 0 else held, sample=x)
    return x


def in_float32(eps: Tensor, steps: int) -> float:
    """The error of diffusers' DEIS-3 as it is used, against a fine reference between the same ends."""
    scheduler = _scheduler("DEISMultistepScheduler", steps)
    place = torch.linspace(0, 1, steps + 1)
    ratios = torch.lerp(torch.tensor(20.0 ** (1 / 7)), torch.tensor(0.05 ** (1 / 7)), place) ** 7
    scheduler.sigmas = ratios
    scheduler.timesteps = torch.arange(steps)
    grid = _PROCESS.time(ratios)
    x = (_PROCESS.sigma(grid[0]) * eps).float()
    fine = LogSNRConfig(most=float(ratios[0]), least=float(ratios[-1]), to_zero=False).build(_PROCESS, _FINE)
    rng = CounterRng.seeded([0] * len(eps))
    denoise = _MIXTURE.denoiser(_PROCESS)
    wanted = sample(denoise, _PROCESS, UniPCConfig(terms=3).build(), fine, x.double(), rng).payload.x
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(_estimate(x.double(), grid[i]).float(), t, x).prev_sample
    return float((x - wanted).square().mean().sqrt())


def ends_in_nan(steps: int) -> bool:
    """Whether diffusers' 3M on its Karras sigmas, ended at the least of them, gives NaN."""
    scheduler = _scheduler("DPMSolverMultistepScheduler", steps, use_karras_sigmas=True)
    x = torch.ones(1, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(0.5 * x, t, x).prev_sample
    return bool(x.isnan().any())


def _scheduler(kind: str, steps: int, **options: object) -> Any:
    try:
        import diffusers
    except ImportError:
        raise ValueError("diffusers: not installed; install fewstep[peers]") from None
    ending = {} if kind.startswith("DEIS") else {"final_sigmas_type": "sigma_min"}
    made = getattr(diffusers, kind)(prediction_type="sample", solver_order=3, lower_order_final=False, **ending, **options)
    made.set_timesteps(steps)
    return made


def _estimate(x: Tensor, t: Tensor) -> Tensor:
    return mean(_MIXTURE.denoiser(_PROCESS)(x, t.expand(len(x))))


CLAIM = Claim(
    "solver-order",
    "Lu et al. 2022, arXiv 2211.01095; Zhang and Chen 2023, arXiv 2204.13902; Zhao et al. 2023, arXiv 2302.04867",
    "Every solver has its stated order in float64; 3M as published has the second, and other code deviates in more places.",
    (STATED, THIRD, FOURTH, AS_PUBLISHED, DEVIATES, SAME, RISES, ENDS),
    measure,
)
