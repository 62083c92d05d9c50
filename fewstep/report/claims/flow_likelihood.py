"""Normalizing flows compared by likelihood: how many nats a point each wastes on laws of the plane whose density is known.

Every flow has its default size and the same training. The gap to the true density is measured on points that were not trained
on: it is the Kullback-Leibler divergence of the flow from the law, so at least 0 but for the error of its estimate.
"""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fewstep.core.random import CounterRng
from fewstep.core.recipe import Recipe
from fewstep.models.flow import Flow
from fewstep.recipes import SECTIONS
from fewstep.recipes.run import train
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.training.data.points import DENSITIES, Density

_FLOWS = ("nice", "realnvp", "maf", "glow", "nsf_ar")
_LAWS: Mapping[str, float] = MappingProxyType({"ring": 0.08, "moons": 0.05, "checkerboard": 0.15})  # and thresholds in nats
_STEPS, _BATCH, _RATE = 1500, 512, 2e-3
_OWN = "the threshold is fewstep's own"

SPLINES = tuple(
    Criterion(
        f"splines-{law}",
        f"gap of the autoregressive spline flow to the true density on {law}, nats",
        f"arXiv 1906.04032, figure 1 shows the kind; {_OWN}",
        "at most",
        threshold,
    )
    for law, threshold in _LAWS.items()
)


def _order(worse: str, better: str, origin: str) -> Criterion:
    statement = f"mean gap of {worse} over that of {better}"
    return Criterion(f"{worse}-above-{better}", statement, f"{origin}; {_OWN}", "at least", 1.0)


ORDER = (
    _order("nice", "realnvp", "arXiv 1605.08803, section 3.1"),
    _order("realnvp", "maf", "arXiv 1705.07057, table 1"),
    _order("realnvp", "glow", "arXiv 1807.03039, table 2"),
    _order("maf", "nsf_ar", "arXiv 1906.04032, table 1"),
    _order("glow", "nsf_ar", "arXiv 1906.04032, table 1"),
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    gaps: dict[str, dict[str, float]] = {kind: {} for kind in _FLOWS}
    for criterion, law in zip(SPLINES, _LAWS, strict=True):
        density, error = DENSITIES[law], 0.0
        for kind in _FLOWS:
            gaps[kind][law], error = gap(trained(bench, kind, law), density, bench.effort.draws, bench.effort.seed)
            bench.console.print(f"{kind} on {law}: {gaps[kind][law]:.4f} nats above the entropy", highlight=False)
        found = {kind: gaps[kind][law] for kind in _FLOWS}
        how = f"{bench.effort.draws} points, standard error {error:.1g}; entropy {density.entropy():.4f}"
        yield Finding(criterion, found["nsf_ar"], how, found)
    means = {kind: sum(by_law.values()) / len(by_law) for kind, by_law in gaps.items()}
    for criterion in ORDER:
        worse, better = criterion.name.split("-above-")
        yield Finding(criterion, means[worse] / means[better], f"{means[worse]:.3g} for {means[better]:.3g} nats", gaps)


def trained(bench: Bench, kind: str, law: str) -> Flow:
    """The flow `kind` of default size after `_STEPS` steps on fresh points of `law`."""
    values = {
        "model": {"kind": "flow", "bijections": [kind]},
        "data": {"kind": "points", "density": law},
        "objective": {"kind": "likelihood"},
        "optim": {"kind": "adamw", "lr": _RATE, "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "floor": 0.0},
        "budget": {"steps": _STEPS},
        "run": {"batch": _BATCH, "seed": bench.effort.seed, "validate_every": 0, "checkpoint_steps": 0, "checkpoint_seconds": 0},
    }
    recipe = Recipe.from_values(f"{law}-{kind}", values, registries=SECTIONS)
    model = train(recipe, directory=bench.scratch / recipe.name, console=bench.console).model
    assert isinstance(model, Flow)
    return model


def gap(flow: Flow, density: Density, count: int, seed: int) -> tuple[float, float]:
    """The mean of log p - log q over `count` points of the law p, where q is the flow's density, and its standard error."""
    numbers = torch.arange(count)
    rng = CounterRng.seeded([seed]).split("held out").fork(torch.zeros_like(numbers)).at(numbers)
    x = density.sample(rng)
    with torch.inference_mode():
        wasted: Tensor = density.log_density(x) - flow.log_prob(x.to(next(flow.parameters()))).double()
    return float(wasted.mean()), float(wasted.std()) / math.sqrt(count)


CLAIM = Claim(
    "flow-likelihood",
    "Dinh et al. 2014 to Durkan et al. 2019, arXiv 1410.8516 to 1906.04032",
    "Each generation of flows fits densities better: additive, affine, autoregressive or mixed, and splines almost exactly.",
    (*SPLINES, *ORDER),
    measure,
)
