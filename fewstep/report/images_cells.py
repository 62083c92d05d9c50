"""The work of `race images`, a piece at a time: train a network and take its likelihood, or sample it one way and score that.

A piece is a pure function of its names and the `Setup`, and can be done in any process. This file knows no folder but the
networks'. Who races is in `images_methods`, who shares the work in `images_race`.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, final

import torch
from rich.console import Console
from torch import Tensor

from fewstep.core.event import Event
from fewstep.core.random import CounterRng
from fewstep.decode.arrays import Samples, sample
from fewstep.decode.denoise import Sampled
from fewstep.diffusion.grids import LogSNRConfig
from fewstep.diffusion.likelihood import Prior, log_likelihood
from fewstep.hub.arrays import load_arrays
from fewstep.models.denoiser import Denoiser
from fewstep.models.flow import Flow
from fewstep.recipes.run import train
from fewstep.report.contest import Spread
from fewstep.report.images_methods import GROUNDS, METHODS, TRAININGS, Ground, recipe_of
from fewstep.report.images_pictures import Way, draw
from fewstep.report.quality import copying, coverage, energy_distance, frechet_distance, mmd
from fewstep.report.quality_features import classifier_of, features
from fewstep.report.turns import clock
from fewstep.training.data.arrays import PARTS, Table
from fewstep.training.data.points import DENSITIES, Points

_BATCH = 1024  # rows sampled together
_NEAR, _FAR = 0.01, 80.0  # sigma / alpha where likelihoods begin, and where the prior takes over
_POINT_STEPS, _IMAGE_STEPS = 40, 20  # of the ODE, each of four calls
_PROBES = 4  # of a trace of more than four dimensions
_COMPARED = 4096  # rows that the MMD, which takes longest, is of
_WATCHED = 48  # rows whose way is drawn
_CPU = torch.device("cpu")


@final
@dataclass(frozen=True, slots=True)
class Setup:
    """What is equal for everybody. `folder`: of networks and pictures; `share` of the full training; `count` points a sample;
    `seeds`: samples of each method; `rows` that likelihoods by the ODE are taken of; `seed` of everything."""

    folder: Path
    share: float
    count: int
    seeds: int
    rows: int
    seed: int

    def run(self, ground: str, training: str) -> Path:
        """The run folder of a network."""
        return self.folder / "runs" / f"{ground}-{training}"

    def picture(self, ground: str, name: str) -> Path:
        """The picture of that name, without its ending."""
        return self.folder / "pictures" / f"{ground}-{name}"


@final
@dataclass(frozen=True, slots=True)
class Reference:
    """What samples are held against: `data` [N,d] that networks learn, `new` rows that they never saw, and features of images."""

    data: Tensor
    new: Tensor
    shape: tuple[int, ...]
    classifier: Any = None

    def scores(self, x: Tensor) -> dict[str, float]:
        """The measures of samples x [M,*shape], or of held-out rows in their place."""
        flat = x.float().flatten(1)
        found = {"energy": energy_distance(flat, self.data), "mmd": mmd(flat[:_COMPARED], self.data[:_COMPARED])}
        if self.classifier is None:
            return found
        told, known = (features(self.classifier, rows.view(-1, *self.shape)) for rows in (flat, self.data))
        some = known[CounterRng.seeded([0]).uniform(len(known))[0].argsort(stable=True)[: len(flat)]]
        covered = coverage(told, some)
        return {
            **found,
            "frechet": frechet_distance(told, known),
            "precision": covered.precision,
            "recall": covered.recall,
            "copying": copying(flat, self.data, self.new),
        }


def reference(setup: Setup, ground: str) -> Reference:
    """Fresh points of a law and others, or the training and held-out rows of a table."""
    place = GROUNDS[ground]
    source = place.data.build()
    if isinstance(source, Points):
        data, new = (_fresh(source, setup, part) for part in ("reference", "fresh 0"))
        return Reference(data, new, place.shape)
    table = cast(Table, source)
    data, new = (table.rows(part).extra["x"].flatten(1) for part in PARTS)
    told = place.data.model_copy(update={"classes": True})
    return Reference(data, new, place.shape, classifier_of(told, max(1, round(600 * setup.share)), setup.seed))


def floor(setup: Setup, ground: str) -> dict[str, Any]:
    """The scores of data that nobody made: what a perfect sampler would get."""
    held, source = reference(setup, ground), GROUNDS[ground].data.build()
    fresh = [held.new.view(-1, *held.shape)]
    if isinstance(source, Points):
        fresh += [_fresh(source, setup, f"fresh {k}") for k in range(1, setup.seeds)]
    draw(setup.picture(ground, "data"), held.data.view(-1, *held.shape), None, ground)
    return {"ground": ground, "rows": len(fresh[0]), "scores": _spreads([held.scores(x) for x in fresh])}


def learn(setup: Setup, ground: str, training: str, seconds: float) -> dict[str, Any]:
    """Train the network in `seconds` at most, and take its likelihood if it has one. A run that was cut short goes on."""
    row = TRAININGS[training]
    taught = setup.run(ground, row.teacher) if row.teacher else None
    recipe = recipe_of(ground, training, setup.share, seconds, setup.seed, taught)
    directory = setup.run(ground, training)
    trained = train(recipe, directory=directory, resume=directory.is_dir(), console=Console(quiet=True))
    if trained.summary.interrupted:
        raise KeyboardInterrupt
    model, used = cast(Denoiser | Flow, trained.model), trained.summary.used
    return {
        "ground": ground,
        "training": training,
        "steps": used.steps,
        "asked": cast(Any, recipe["budget"]).steps,
        "seconds": used.seconds,
        "parameters": sum(each.numel() for each in model.parameters()),
        "nll": _nll(setup, ground, model) if row.likely else None,
    }


def race(setup: Setup, ground: str, method: str, steps: int) -> dict[str, Any]:
    """Sample the method's network with as many seeds as the setup says, score each sample and draw the first."""
    entrant, held = METHODS[method], reference(setup, ground)
    model = load_arrays(setup.run(ground, entrant.training))
    count = setup.count if held.classifier is None else len(held.new)
    samples, spent, way = list[Samples](), list[float](), Way(_WATCHED)
    for k in range(setup.seeds):
        config = entrant.config(steps, count, setup.seed + k * count, min(_BATCH, count))
        begun = clock(_CPU)
        made = sample(model, config)
        spent.append((clock(_CPU) - begun) / count)
        samples.append(made)
    if isinstance(model, Denoiser):  # once more, watched, so that watching is not timed
        config = entrant.config(steps, _WATCHED, setup.seed, _WATCHED)
        seen: list[Event[Sampled]] = []
        sample(model, config, seen.append)
        way.follow([event.payload.x for event in seen], model, config)
    draw(setup.picture(ground, f"{method}-{steps}"), _whole(samples[0].x, GROUNDS[ground]), way, ground)
    return {
        "ground": ground,
        "method": method,
        "steps": steps,
        "calls": samples[0].cost.calls / count,
        "samples": count,
        "seconds": asdict(Spread.of(spent)),
        "scores": _spreads([held.scores(_whole(made.x, GROUNDS[ground])) for made in samples]),
    }


def _fresh(source: Points, setup: Setup, part: str) -> Tensor:
    numbers = torch.arange(setup.count)
    rng = CounterRng.seeded([setup.seed]).split(part).fork(torch.zeros_like(numbers)).at(numbers)
    return source.density.sample(rng).float()


def _whole(x: Tensor, place: Ground) -> Tensor:
    """Samples as data are: whole levels where these have them."""
    return x.floor().clamp(0, place.levels - 1) if place.levels else x


def _spreads(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: asdict(Spread.of([scores[name] for scores in found])) for name in found[0]}


def _held_out(setup: Setup, place: Ground, noisy: bool) -> Tensor:
    """The rows whose likelihood is taken: so many images, or sixteen times as many points."""
    source, wanted = (place.noisy if noisy else place.data).build(), setup.rows
    found = torch.cat([batch.extra["x"] for batch in source.validation(4096)])
    return found[: wanted if place.levels else 16 * wanted]


def _nll(setup: Setup, ground: str, model: Denoiser | Flow) -> dict[str, Any]:
    """The likelihood, and the seconds that it took."""
    begun = time.perf_counter()
    found = _flow_nll(setup, ground, model) if isinstance(model, Flow) else _ode_nll(setup, ground, model)
    return {**found, "seconds": time.perf_counter() - begun}


def _flow_nll(setup: Setup, ground: str, model: Flow) -> dict[str, Any]:
    """Exact, all held-out rows being cheap."""
    place = GROUNDS[ground]
    source = place.data.build()
    x = torch.cat([batch.extra["x"] for batch in source.validation(4096)])
    rng = CounterRng.seeded([setup.seed]).fork(torch.zeros(len(x), dtype=torch.int64)).at(torch.arange(len(x)))
    with torch.inference_mode():
        nats = -model.log_prob(model.corrupted(x, rng), None, rng).double()
    return _told(ground, x, nats, torch.zeros_like(nats), 0.0, "exact")


def _ode_nll(setup: Setup, ground: str, model: Denoiser) -> dict[str, Any]:
    """By the probability-flow ODE; what half as many steps say differently is the stated error of the steps."""
    place, points = GROUNDS[ground], not GROUNDS[ground].levels
    x = _held_out(setup, place, noisy=True)
    source = place.noisy.build()
    known = source.rows("train") if isinstance(source, Table) else source.train(4096, setup.seed).batch(0)
    prior = Prior.of(model.normed(known.extra["x"]))
    size, steps = x[0].numel(), _POINT_STEPS if points else _IMAGE_STEPS
    rng = CounterRng.seeded([setup.seed]).fork(torch.zeros(len(x), dtype=torch.int64)).at(torch.arange(len(x)))
    found = []
    for k in (steps, steps // 2):
        grid = LogSNRConfig(most=_FAR, least=_NEAR, to_zero=False).build(model.process, k)
        probes = None if size <= 4 else _PROBES
        likely = log_likelihood(model.denoiser(), model.process, grid, model.normed(x), prior, rng, probes)
        found.append((-likely.log_prob + size * math.log(place.scale), likely.error))
    (nats, probing), (coarse, _) = found
    how = f"ODE, {4 * steps} calls" + ("" if size <= 4 else f", {_PROBES} probes")
    return _told(ground, x, nats, probing, float((nats - coarse).mean().abs()), how)


def _told(ground: str, x: Tensor, nats: Tensor, probing: Tensor, stepping: float, how: str) -> dict[str, Any]:
    """The mean of `nats` [N] of rows x, in bits a dimension where levels are whole, with the error of rows, probes and steps.

    `gap`: by how much the law's own density is better on the same points, and its standard error, which is far less than that of
    the mean itself.
    """
    place, count = GROUNDS[ground], len(nats)
    scale = 1 / (math.prod(place.shape) * math.log(2)) if place.levels else 1.0
    gap, gap_error = None, None
    if not place.levels:
        wasted = nats + DENSITIES[ground].log_density(x.double())
        wasted = wasted[wasted.isfinite()]  # rounding may move a point over the edge of a law
        gap, gap_error = float(wasted.mean()), float(wasted.std()) / math.sqrt(len(wasted))
    return {
        "value": scale * float(nats.mean()),
        "error": scale * float(nats.std()) / math.sqrt(count),  # the probes' part of it is in the deviation of the rows
        "probe_error": scale * float(probing.square().sum().sqrt()) / count,
        "step_error": scale * stepping,
        "unit": "bits/dim" if place.levels else "nats",
        "gap": gap,
        "gap_error": gap_error,
        "rows": count,
        "how": how,
    }
