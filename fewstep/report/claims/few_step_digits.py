"""Digits in one call and in two: a student distilled from the shipped model, beside its teacher at ten calls.

The student is trained by its recipe, in the bench's folder that stays, where a killed claim goes on. All are sampled without a
class, as many as there are training digits, from several seeds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from fewstep.decode.arrays import SampleConfig, sample
from fewstep.diffusion.grids import KarrasConfig, LearnedConfig
from fewstep.diffusion.solvers.consistency import ConsistencySamplerConfig
from fewstep.diffusion.solvers.heun import HeunConfig
from fewstep.diffusion.solvers.ode import DPMSolverConfig, EulerConfig
from fewstep.diffusion.solvers.unipc import UniPCConfig
from fewstep.hub.arrays import load_arrays
from fewstep.models.denoiser import Denoiser
from fewstep.models.flow import Flow
from fewstep.recipes.run import train
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.digits import DEVIATION, TEACHER, Digits
from fewstep.report.claims.tuning import finished
from fewstep.report.contest import Spread

RECIPE = "digits-consistency"
_AGAIN = KarrasConfig(least=1.2)  # where two calls meet: the 0.821 of arXiv 2310.14189, recalled, is for data of deviation 0.5
_UNIPC = UniPCConfig(terms=3)
_TEACHER: Mapping[str, SampleConfig] = MappingProxyType(
    {
        "DEIS-3, Karras grid": SampleConfig(steps=10),
        "UniPC-3, Karras grid": SampleConfig(steps=10, solver=_UNIPC),
        "UniPC-3, learned grid": SampleConfig(steps=10, solver=_UNIPC, grid=LearnedConfig(scale=DEVIATION)),
        "DPM-Solver++ 2M, Karras grid": SampleConfig(steps=10, solver=DPMSolverConfig()),
        "DPM-Solver++ 3M, Karras grid": SampleConfig(steps=10, solver=DPMSolverConfig(terms=3)),
        "Heun, Karras grid, 9 calls": SampleConfig(steps=5, solver=HeunConfig()),
    }
)
_STUDENT = tuple(SampleConfig(steps=calls, solver=ConsistencySamplerConfig(), grid=_AGAIN) for calls in (1, 2))
_UNTAUGHT = SampleConfig(steps=2, solver=EulerConfig(), grid=_AGAIN)
_FRECHET = "Frechet distance of {} over that of {}"

STUDENT = tuple(
    Criterion(
        name,
        _FRECHET.format(f"a student's samples in {calls}", f"its teacher's in 10 by the best of {len(_TEACHER)} solvers"),
        "fewstep's own aim; distillation as in arXiv 2303.01469",
        "at most",
        1.0,
    )
    for name, calls in (("one-call", "1 call"), ("two-calls", "2 calls"))
)
CONTROL = Criterion(
    "untaught",
    _FRECHET.format("the teacher's samples in 2 calls of Euler", "the student's in 2, on one grid"),
    "fewstep's own control",
    "at least",
    1.0,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    digits = Digits(bench.effort.seed)
    student, teacher = taught(bench), load_arrays(TEACHER).eval()

    def scored(model: Denoiser | Flow, config: SampleConfig) -> dict[str, Spread]:
        return scores(digits, model, config, bench.effort.seed, bench.effort.rounds)

    rivals = {name: scored(teacher, config) for name, config in _TEACHER.items()}
    best = min(rivals, key=lambda name: rivals[name]["frechet"].median)
    floor = digits.scores(digits.held_out)
    against = f"for {_told(rivals[best])} by {best}; {len(digits.held_out)} held-out digits {floor['frechet']:.2f}"
    others = {"teacher": {name: _numbers(found) for name, found in rivals.items()}, "held-out digits": floor}
    for criterion, config in zip(STUDENT, _STUDENT, strict=True):
        own = scored(student, config)
        ratio = own["frechet"].median / rivals[best]["frechet"].median
        yield Finding(criterion, ratio, f"{_told(own)} {against}", {"student": _numbers(own), **others})
    untaught = scored(teacher, _UNTAUGHT)
    ratio = untaught["frechet"].median / own["frechet"].median
    yield Finding(CONTROL, ratio, f"{_told(untaught)} for {_told(own)}", {"untaught": _numbers(untaught)})


def taught(bench: Bench) -> Denoiser | Flow:
    """The student of the shipped recipe, trained now unless it is at hand. Raises ValueError if that is stopped."""
    directory = (bench.kept or bench.scratch) / RECIPE
    bench.console.print(f"student: {RECIPE} in {directory}, trained there if it is not yet", highlight=False)
    finished(train(RECIPE, directory=directory, resume=directory.is_dir(), console=bench.console).summary)
    return load_arrays(directory).eval()


def scores(digits: Digits, model: Denoiser | Flow, config: SampleConfig, seed: int, rounds: int) -> dict[str, Spread]:
    """Every measure of as many samples as there are training digits, over the seeds; no two samples have the same noise."""
    found = []
    for first in range(seed, seed + rounds * digits.count, digits.count):
        asked = config.model_copy(update={"count": digits.count, "seed": first})
        found.append(digits.scores(sample(model, asked).x))
    return {name: Spread.of([one[name] for one in found]) for name in found[0]}


def _told(found: Mapping[str, Spread]) -> str:
    """Frechet distance with its spread, precision, recall and copying, in words."""
    frechet, precision, recall, copies = (found[name] for name in ("frechet", "precision", "recall", "copying"))
    spread = f"{frechet.median:.2f} [{frechet.low:.2f}, {frechet.high:.2f}]"
    return f"{spread} (precision {precision.median:.2f}, recall {recall.median:.2f}, copying {copies.median:.2f})"


def _numbers(found: Mapping[str, Spread]) -> dict[str, Any]:
    return {name: asdict(spread) for name, spread in found.items()}


CLAIM = Claim(
    "few-step-digits",
    "Song et al. 2023, arXiv 2303.01469; Song and Dhariwal 2023, arXiv 2310.14189",
    "A student distilled from a diffusion model of digits makes in one call, or in two, samples as good as its teacher's in ten.",
    (*STUDENT, CONTROL),
    measure,
)
