"""EDM's stochastic sampler beside its deterministic one: new noise corrects what a network got wrong, and costs steps.

Samples are compared with fresh data by energy distance, which is not resolved below what two sets of data have.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.core.process import Denoise
from fewstep.core.random import CounterRng
from fewstep.diffusion.grids import KarrasConfig
from fewstep.diffusion.mixture import Mixture
from fewstep.diffusion.processes import EDMConfig
from fewstep.diffusion.solvers.heun import ChurnConfig, HeunConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.denoisers import drawn, trained
from fewstep.report.quality import energy_distance
from fewstep.training.data.points import DENSITIES

_PROCESS, _LAW, _MOST = EDMConfig(), "checkerboard", 8192
_BRIEF, _LONG = 300, 3000  # steps of training
_FEW, _MANY = 9, 128  # steps of sampling

HARMS = Criterion(
    "few-steps",
    f"energy distance with churn over that without, {_FEW} steps, exact denoiser of a mixture",
    "arXiv 2206.00364, section 4 and figure 4; the threshold is fewstep's own",
    "at least",
    1.0,
)
HELPS = Criterion(
    "many-steps",
    f"energy distance without churn over that with it, {_MANY} steps, network trained for {_BRIEF} steps",
    "arXiv 2206.00364, section 4 and figure 4; the threshold is fewstep's own",
    "at least",
    1.0,
)
FADES = Criterion(
    "better-network",
    f"what churn gains for the network of {_BRIEF} steps over what it gains for that of {_LONG}, {_MANY} steps",
    "arXiv 2206.00364, section 5: less as training improves; the threshold is fewstep's own",
    "at least",
    1.0,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    seed, count = bench.effort.seed, min(bench.effort.draws, _MOST)
    mixture = Mixture.drawn(seed)
    first, second = mixture.sample(count, seed), mixture.sample(count, seed + 1)
    least = abs(energy_distance(first, second))
    quiet, stirred = _distances(mixture.denoiser(_PROCESS), first, _FEW, seed, torch.float64)
    yield Finding(
        HARMS,
        max(stirred, least) / max(quiet, least),
        f"{stirred:.2g} for {quiet:.2g}",
        {"churn": stirred, "none": quiet, "fresh data": least},
    )
    first, second = (DENSITIES[_LAW].sample(CounterRng.seeded(range(start, start + count))) for start in (seed, seed + count))
    floor = abs(energy_distance(first, second))
    gains, numbers = [], {"fresh data": floor}
    for steps in (_BRIEF, _LONG):
        parts = {"process": {"kind": "edm"}, "parameterisation": {"kind": "edm", "sigma_data": 1.2}}
        model = trained(bench, _LAW, steps, parts)
        quiet, stirred = _distances(model.denoiser(), first, _MANY, seed, torch.float32)
        gains.append(max(quiet, floor) / max(stirred, floor))
        numbers |= {f"none, {steps} steps": quiet, f"churn, {steps} steps": stirred}
    found = ", ".join(f"{name} {value:.2g}" for name, value in numbers.items())
    yield Finding(HELPS, gains[0], found, numbers)
    yield Finding(FADES, gains[0] / gains[1], f"{gains[0]:.2f} and {gains[1]:.2f}", numbers)


def _distances(denoiser: Denoise, data: Tensor, steps: int, seed: int, dtype: torch.dtype) -> tuple[float, float]:
    """Of samples from data, without churn and with EDM's."""
    grid = KarrasConfig().build(_PROCESS, steps)
    solvers = (HeunConfig().build(), ChurnConfig().build())
    samples = (drawn(denoiser, _PROCESS, solver, grid, len(data), seed, dtype).double() for solver in solvers)
    quiet, stirred = (energy_distance(x, data) for x in samples)
    return quiet, stirred


CLAIM = Claim(
    "churn",
    "Karras et al. 2022, arXiv 2206.00364, section 4",
    "New noise before a step harms at few steps, helps a poor network at many, and the better the network the less.",
    (HARMS, HELPS, FADES),
    measure,
)
