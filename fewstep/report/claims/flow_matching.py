"""Flow matching against score matching at equal compute: the same network and as many steps of training on each law of the plane.

Score matching learns eps of the VP process; EDM, which is younger than the claim, is measured beside them. Likelihoods are taken
along the ODE as `race images` takes them. Every network is sampled by Euler in its own time and by EDM's Heun, in even steps of
that time, as in the paper, and on EDM's grid; the better grid counts. Samples are compared with fresh data by energy distance,
which is not resolved below what two sets of data have.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from fewstep.core.recipe import parse
from fewstep.decode.arrays import SampleConfig, sample
from fewstep.hub.arrays import load_arrays
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.images_cells import Reference, Setup, learn, reference
from fewstep.report.images_methods import EVEN
from fewstep.report.quality import energy_distance

_LAWS, _TRAININGS = ("ring", "moons", "checkerboard"), ("fm", "vp", "edm")
_SHARE, _ROWS, _MOST = 0.25, 64, 4096  # of the race's full training; 16 times as many points for likelihoods; samples at most
_UNHURRIED = 1e9  # seconds of a training: all have their steps, however slow the machine
_THROUGH = MappingProxyType({"kind": "uniform", "to_zero": False})
_KARRAS = MappingProxyType({"kind": "karras"})
_GRIDS: Mapping[str, tuple[Mapping[str, Any], ...]] = MappingProxyType(
    {"fm": (EVEN, _KARRAS), "vp": (_THROUGH, _KARRAS), "edm": (_THROUGH, _KARRAS)}
)
_WAYS: Mapping[tuple[str, int], int] = MappingProxyType(  # a solver and its calls at most, and the steps that they make
    {("euler", 10): 10, ("euler", 20): 20, ("heun", 10): 5, ("heun", 20): 10}
)
_OWN = "the threshold is fewstep's own"

LIKELIHOOD = Criterion(
    "likelihood",
    "nats above the entropy, mean of three laws, of flow matching over those of score matching",
    f"arXiv 2210.02747, table 1, CIFAR-10: 2.99 bits/dim, DDPM 3.12, score matching 3.16; recalled; {_OWN}",
    "at most",
    1.0,
)
QUALITY: Mapping[tuple[str, int], Criterion] = MappingProxyType(
    {
        (solver, calls): Criterion(
            f"{solver}-{calls}",
            f"energy distance, mean of three laws, of flow matching over that of score matching, {solver}, at most {calls} calls",
            f"arXiv 2210.02747, table 1, CIFAR-10: FID 6.35 with 142 calls, DDPM 7.48 with 274; recalled; {_OWN}",
            "at most",
            1.0,
        )
        for solver, calls in _WAYS
    }
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    setup = Setup(bench.scratch, _SHARE, min(bench.effort.draws, _MOST), 1, _ROWS, bench.effort.seed)
    gaps: dict[str, dict[str, float]] = {training: {} for training in _TRAININGS}
    far: dict[tuple[str, int], dict[str, dict[str, float]]] = {way: {training: {} for training in _TRAININGS} for way in _WAYS}
    for law in _LAWS:
        held = reference(setup, law)
        floor = abs(energy_distance(held.new, held.data))
        for training in _TRAININGS:
            learnt = learn(setup, law, training, _UNHURRIED)
            gaps[training][law] = learnt["nll"]["gap"]
            told = (
                f"{learnt['steps']} steps, {gaps[training][law]:.3f} +- {learnt['nll']['gap_error']:.2g} nats above the entropy"
            )
            bench.console.print(f"{training} on {law}: {told}", highlight=False)
            for way in _WAYS:
                far[way][training][law] = max(floor, nearest(setup, held, law, training, way))
    yield _finding(LIKELIHOOD, gaps)
    for way, criterion in QUALITY.items():
        yield _finding(criterion, far[way])


def nearest(setup: Setup, held: Reference, law: str, training: str, way: tuple[str, int]) -> float:
    """The energy distance from data of what the network samples this way on the better grid."""
    model = load_arrays(setup.run(law, training))
    asked: dict[str, Any] = {
        "count": setup.count,
        "batch": setup.count,
        "seed": setup.seed,
        "solver": way[0],
        "steps": _WAYS[way],
    }
    requests = (parse(SampleConfig, {**asked, "grid": grid}) for grid in _GRIDS[training])
    return min(energy_distance(sample(model, request).x, held.data) for request in requests)


def _finding(criterion: Criterion, found: Mapping[str, Mapping[str, float]]) -> Finding:
    """Flow matching's mean over laws over score matching's."""
    means = {training: sum(by_law.values()) / len(by_law) for training, by_law in found.items()}
    how = ", ".join(f"{training} {value:.3g}" for training, value in means.items())
    return Finding(criterion, means["fm"] / means["vp"], how, found)


CLAIM = Claim(
    "flow-matching",
    "Lipman et al. 2023, arXiv 2210.02747",
    "At equal compute flow matching on straight lines fits densities better than score matching, and needs fewer calls.",
    (LIKELIHOOD, *QUALITY.values()),
    measure,
)
