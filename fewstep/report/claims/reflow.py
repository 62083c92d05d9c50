"""Reflow: a flow refitted on the pairs that it makes of noise and data, once and twice, beside the one it began as.

Every flow has the same network and as many steps of training, of the shipped recipes; a refitted one begins with the weights of
its teacher. Samples are compared with fresh data by energy distance, which is not resolved below what two sets of data have.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from fewstep.core.random import CounterRng
from fewstep.decode.denoise import denoise, start
from fewstep.diffusion.solvers.ode import EulerConfig
from fewstep.diffusion.straightness import straightness
from fewstep.models.denoiser import Denoiser
from fewstep.recipes.run import train
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.denoisers import drawn
from fewstep.report.quality import energy_distance
from fewstep.training.data.points import DENSITIES

_LAWS = ("ring", "checkerboard")
_STEPS, _BATCH, _PAIRS = 3000, 512, 65536  # of a training; pairs that a refit goes over
_MOST, _PATHS, _FINE = 8192, 2048, 64  # samples at most; paths whose straightness is measured, and their steps
_FEW, _MANY = (1, 2), 32  # steps of Euler
_EULER = EulerConfig().build()
_OWN = "the threshold is fewstep's own"


def _criteria(law: str) -> tuple[Criterion, ...]:
    few = tuple(
        Criterion(
            f"{law}-{steps}-step{'s' if steps > 1 else ''}",
            f"energy distance of the first flow's samples over that of the refitted one's, {steps} of Euler, {law}",
            f"arXiv 2209.03003, table 1, CIFAR-10: FID 378 and 12.21 at one step; recalled; {_OWN}",
            "at least",
            2.0,
        )
        for steps in _FEW
    )
    return (
        Criterion(
            f"{law}-straight",
            f"straightness of the refitted flow over that of the first, 0 being straight, {law}",
            f"arXiv 2209.03003, theorem 3.7 and section 5; {_OWN}",
            "at most",
            0.5,
        ),
        *few,
        Criterion(
            f"{law}-{_MANY}-steps",
            f"energy distance of the refitted flow's samples over that of the first one's, {_MANY} steps of Euler, {law}",
            f"arXiv 2209.03003, table 1, CIFAR-10: FID 3.36 and 2.58 by RK45, 1.3 times; recalled; {_OWN}",
            "at most",
            2.0,
        ),
        Criterion(
            f"{law}-twice",
            f"straightness of the flow refitted twice over that of the one refitted once, {law}",
            f"arXiv 2209.03003, theorem 3.7: the least of K refits falls as 1 / K; {_OWN}",
            "at most",
            1.0,
        ),
    )


CRITERIA: Mapping[str, tuple[Criterion, ...]] = MappingProxyType({law: _criteria(law) for law in _LAWS})


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    seed, count = bench.effort.seed, min(bench.effort.draws, _MOST)
    for law in _LAWS:
        data, fresh = (DENSITIES[law].sample(CounterRng.seeded(range(first, first + count))) for first in (seed, seed + count))
        floor = abs(energy_distance(data, fresh))
        once, twice, thrice = (_Found.of(model, data, seed) for model in rectified(bench, law))
        straight, *few, many, again = CRITERIA[law]
        yield _ratio(straight, twice.bent, once.bent, once.error)
        for criterion, steps in zip(few, _FEW, strict=True):
            yield _far(criterion, once, twice, steps, floor)
        yield _far(many, twice, once, _MANY, floor)
        yield _ratio(again, thrice.bent, twice.bent, twice.error)


def rectified(bench: Bench, law: str) -> Iterator[Denoiser]:
    """The 1-, 2- and 3-rectified flow of `law`, each refitted on new pairs of the one before."""
    seed, runs = bench.effort.seed, [bench.scratch / f"{law}-{k}-rectified" for k in (1, 2, 3)]
    shared: dict[str, Any] = {
        "budget.steps": _STEPS,
        "run.batch": _BATCH,
        "run.seed": seed,
        "run.validate_every": 0,
        "run.checkpoint_seconds": 0,
    }
    for k, directory in enumerate(runs):
        teacher = {"model.teacher": str(runs[k - 1]), "data.count": _PAIRS, "data.seed": seed + k}
        name, own = ("points-reflow", teacher) if k else ("points-flow-matching", {"data.density": law})
        bench.console.print(f"training the {k + 1}-rectified flow of {law} for {_STEPS} steps")
        model = train(name, {**shared, **own}, directory=directory, console=bench.console).model
        assert isinstance(model, Denoiser)
        yield model.eval()


@final
@dataclass(frozen=True, slots=True)
class _Found:
    """Of one flow: how `bent` its paths are, the standard `error` of that, and how `far` its samples are, by steps of Euler."""

    bent: float
    error: float
    far: dict[int, float]

    @classmethod
    def of(cls, model: Denoiser, data: Tensor, seed: int) -> "_Found":
        process, denoiser = model.process, model.denoiser()
        far = {}
        for steps in (*_FEW, _MANY):
            x = drawn(denoiser, process, _EULER, _grid(steps), len(data), seed, torch.float32)
            far[steps] = energy_distance(x.double(), data)
        rng, grid = CounterRng.seeded(range(seed, seed + _PATHS)), _grid(_FINE)
        path = denoise(denoiser, process, _EULER, grid, start(process, grid, (2,), rng), rng)
        bent = straightness(process, grid, [event.payload.x for event in path])
        return cls(float(bent.mean()), float(bent.std()) / _PATHS**0.5, far)


def _grid(steps: int) -> Tensor:
    """From t = 1 to 0, evenly, as the paper's Euler."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def _ratio(criterion: Criterion, above: float, below: float, error: float) -> Finding:
    how = f"{above:.3g} for {below:.3g} (standard error {error:.1g}), {_PATHS} paths of {_FINE} steps"
    return Finding(criterion, above / below, how, {"above": above, "below": below})


def _far(criterion: Criterion, above: _Found, below: _Found, steps: int, floor: float) -> Finding:
    """The distance of one flow's samples over that of the other's, both at least the `floor`."""
    worse, better = (max(found.far[steps], floor) for found in (above, below))
    how = f"{above.far[steps]:.2g} for {below.far[steps]:.2g}; fresh data {floor:.1g}"
    return Finding(criterion, worse / better, how, {"above": above.far, "below": below.far, "fresh data": floor})


CLAIM = Claim(
    "reflow",
    "Liu et al. 2023, arXiv 2209.03003",
    "Refitted on its own pairs a flow has straighter paths, far better samples at 1 and 2 steps, and little worse ones at many.",
    tuple(criterion for law in _LAWS for criterion in CRITERIA[law]),
    measure,
)
