"""Who races in `race images`, on what: grounds (data), trainings (networks) and methods (ways to sample one), a line each.

A method names the training whose network it samples, so that methods of one training share one network. This file trains and
measures nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, final

from fewstep.core.recipe import Recipe, parse
from fewstep.decode.arrays import SampleConfig
from fewstep.recipes import SECTIONS
from fewstep.training.data.arrays import ArraysConfig, DigitsConfig
from fewstep.training.data.points import PointsConfig

SIGMA_DATA = 0.7  # of x_0 on every ground: the scales below see to that
_SHORT, _LONG = (5, 10, 20, 40), (5, 10, 20, 50)  # steps of solvers that follow the ODE, and of those that add noise
_HALF = (3, 5, 10, 20)  # of solvers with two calls a step
_FEW = (1, 2, 4)  # of networks made for few
EVEN = MappingProxyType({"kind": "uniform", "most": 1e300, "least": 1e-6, "to_zero": False})  # flow matching from t = 1 to 0


@final
@dataclass(frozen=True, slots=True)
class Pace:
    """How a network is trained: `steps` of `batch` rows at `rate`, and what share of the time it may take, in `weight`."""

    steps: int
    batch: int
    rate: float
    weight: float


@final
@dataclass(frozen=True, slots=True)
class Ground:
    """Data to race on. `data`: their config; `noisy`: the same for models of real numbers. `scale`: data over x_0, `centre` its
    zero. `levels`: of whole numbers (0: real ones). `backbone`: of denoisers; `sizes`: of flows, by their kind. `view`: pictures
    of points show [-view, view]^2. `pairs` of noise and data that a teacher makes."""

    title: str
    data: ArraysConfig
    noisy: ArraysConfig
    shape: tuple[int, ...]
    scale: float
    denoiser: Pace
    flow: Pace
    backbone: Mapping[str, Any]
    centre: float = 0.0
    levels: int = 0
    view: float = 0.0
    pairs: int = 2560
    sizes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def ranked(self) -> str:
        """The measure that methods are ranked by: of images Frechet's distance in features, else the energy distance."""
        return "frechet" if self.levels else "energy"


@final
@dataclass(frozen=True, slots=True)
class Training:
    """A network. `title` for people; `kind` of model; `model`: what sets it apart; `objective`: what it minimises.

    `teacher`: the training whose network it begins as and learns from, if there is one; `data`: what it reads in place of the
    ground's own, if anything. Of its ground's pace it takes a `share` of the steps, at `rate` times the rate; a step takes
    `price` times as long as a plain one. `likely`: whether it has a likelihood.
    """

    title: str
    kind: Literal["denoiser", "flow"]
    model: Mapping[str, Any]
    objective: Mapping[str, Any]
    teacher: str = ""
    data: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    share: float = 1.0
    rate: float = 1.0
    price: float = 1.0
    likely: bool = True

    def pace(self, ground: Ground) -> Pace:
        """How it is trained there."""
        whole = ground.denoiser if self.kind == "denoiser" else ground.flow
        return Pace(round(self.share * whole.steps), whole.batch, self.rate * whole.rate, self.share * self.price * whole.weight)


@final
@dataclass(frozen=True, slots=True)
class Method:
    """A way to sample the network of `training`, in each of `steps` numbers of steps; `sampling`: fields of a `SampleConfig`."""

    title: str
    training: str
    sampling: Mapping[str, Any]
    steps: tuple[int, ...]

    def config(self, steps: int, count: int, seed: int, batch: int) -> SampleConfig:
        """The request for `count` samples."""
        asked = {"count": count, "seed": seed, "batch": batch, "steps": steps}
        return parse(SampleConfig, {**asked, **self.sampling})


def _points(law: Literal["ring", "moons", "checkerboard"], title: str, scale: float, view: float) -> Ground:
    data = PointsConfig(density=law)
    backbone = MappingProxyType({"kind": "points", "width": 128, "depth": 3})
    return Ground(
        title, data, data, (2,), scale, Pace(4000, 1024, 2e-3, 2.0), Pace(1500, 512, 2e-3, 1.0), backbone, view=view, pairs=32768
    )


GROUNDS: Mapping[str, Ground] = MappingProxyType(
    {
        "ring": _points("ring", "Ring of eight Gaussians", 2.0, 3.2),
        "moons": _points("moons", "Two moons", 1.0, 2.2),
        "checkerboard": _points("checkerboard", "Checkerboard", 1.65, 2.6),
        "digits": Ground(
            "Handwritten digits, 8x8 pixels",
            DigitsConfig(held_out=0.15),
            DigitsConfig(held_out=0.15, dequantised=True),
            (1, 8, 8),
            8.5,
            Pace(3000, 64, 1e-3, 5.0),
            Pace(1500, 128, 1e-3, 1.5),
            MappingProxyType({"kind": "unet", "width": 32, "multiples": [1, 2], "blocks": 1, "attention": 4}),
            centre=8.5,
            levels=17,
            sizes=MappingProxyType({"nice": {"hidden": 256}, "maf": {"hidden": 256}, "nsf_ar": {"layers": 3}}),
        ),
    }
)

_EDM = MappingProxyType({"process": {"kind": "edm"}, "parameterisation": {"kind": "edm", "sigma_data": SIGMA_DATA}})
_VP = MappingProxyType({"process": {"kind": "vp"}, "parameterisation": {"kind": "eps"}})
_FLOW = MappingProxyType({"process": {"kind": "flow"}, "parameterisation": {"kind": "velocity"}})
_GAP = MappingProxyType({**_FLOW, "told": "gap", "backbone": {"turns": 2}})  # slow waves: the loss differentiates them by time
_CONSISTENT = MappingProxyType({"parameterisation": {"kind": "consistency", "sigma_data": SIGMA_DATA}})
_PAIRS = MappingProxyType(
    {"kind": "coupling", "held_out": 256, "shard": 256, "steps": 20, "grid": {"kind": "uniform", "most": 1e300}}
)


def _flow(title: str, kind: str) -> Training:
    return Training(title, "flow", {"bijections": [{"kind": kind}]}, {"kind": "likelihood"})


TRAININGS: Mapping[str, Training] = MappingProxyType(
    {
        "edm": Training("EDM", "denoiser", _EDM, {"kind": "denoising", "times": "log-normal", "location": -1.2, "spread": 1.4}),
        "vp": Training("Score SDE (VP)", "denoiser", _VP, {"kind": "denoising", "times": "uniform"}),
        "fm": Training("Flow matching", "denoiser", _FLOW, {"kind": "denoising", "times": "uniform"}),
        "reflow": Training(
            "2-rectified flow",
            "denoiser",
            {},
            {"kind": "denoising", "times": "uniform", "pairing": "given"},
            teacher="fm",
            data=_PAIRS,
            share=0.2,
            rate=0.5,
            price=1.5,
        ),
        "consistency": Training(
            "Consistency distillation",
            "denoiser",
            _CONSISTENT,
            {"kind": "consistency", "steps": 17, "decay": 0.9},  # an average soon enough for so few steps of training
            teacher="edm",
            share=0.2,
            rate=0.5,
            price=2.5,
            likely=False,
        ),
        "mean-flow": Training(
            "Mean flow",
            "denoiser",
            _GAP,
            {"kind": "mean-flow", "times": "uniform", "apart": 0.5},
            share=0.25,
            rate=0.5,
            price=2.5,
            likely=False,
        ),
        "nice": _flow("NICE", "nice"),
        "realnvp": _flow("RealNVP", "realnvp"),
        "maf": _flow("MAF", "maf"),
        "glow": _flow("Glow", "glow"),
        "nsf": _flow("Neural spline flow", "nsf_ar"),
    }
)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "edm-ddim": Method("EDM, Euler (DDIM)", "edm", {"solver": {"kind": "euler"}}, _SHORT),
        "edm-heun": Method("EDM, Heun", "edm", {"solver": {"kind": "heun"}}, _HALF),
        "edm-2m": Method("EDM, DPM-Solver++ 2M", "edm", {"solver": {"kind": "dpm++", "terms": 2}}, _SHORT),
        "edm-unipc": Method("EDM, UniPC", "edm", {"solver": {"kind": "unipc"}}, _SHORT),
        "edm-deis": Method("EDM, DEIS", "edm", {"solver": {"kind": "deis"}}, _SHORT),
        "edm-churn": Method("EDM, churn", "edm", {"solver": {"kind": "churn"}}, _HALF),
        "edm-sde": Method("EDM, SDE-DPM-Solver++", "edm", {"solver": {"kind": "sde-dpm++"}}, _SHORT),
        "vp-em": Method("VP, Euler-Maruyama", "vp", {"solver": {"kind": "euler-maruyama"}, "grid": {"kind": "uniform"}}, _LONG),
        "vp-pc": Method(
            "VP, predictor-corrector",
            "vp",
            {"solver": {"kind": "predictor-corrector"}, "grid": {"kind": "uniform"}},
            (5, 10, 25),
        ),
        "vp-ddpm": Method("VP, ancestral (DDPM)", "vp", {"solver": {"kind": "ancestral"}, "grid": {"kind": "uniform"}}, _LONG),
        "vp-ode": Method("VP, ODE by Heun", "vp", {"solver": {"kind": "heun"}}, _HALF),
        "fm-euler": Method("FM, Euler", "fm", {"solver": {"kind": "euler"}, "grid": EVEN}, _SHORT),
        "fm-heun": Method("FM, Heun", "fm", {"solver": {"kind": "heun"}, "grid": EVEN}, _HALF),
        "reflow": Method("2-rectified flow, Euler", "reflow", {"solver": {"kind": "euler"}, "grid": EVEN}, _FEW),
        "consistency": Method(
            "Consistency distillation",
            "consistency",
            {"solver": {"kind": "consistency"}, "grid": {"kind": "karras", "least": 0.5}},
            _FEW,
        ),
        "mean-flow": Method("Mean flow", "mean-flow", {"solver": {"kind": "ddim"}, "grid": EVEN}, _FEW),
        "nice": Method("NICE", "nice", {}, (1,)),
        "realnvp": Method("RealNVP", "realnvp", {}, (1,)),
        "maf": Method("MAF", "maf", {}, (1,)),
        "glow": Method("Glow", "glow", {}, (1,)),
        "nsf": Method("NSF", "nsf", {}, (1,)),
    }
)


def recipe_of(ground: str, training: str, share: float, seconds: float, seed: int, teacher: Path | None = None) -> Recipe:
    """How the network of `training` is trained on `ground`: a `share` of the full steps, in `seconds` at most.

    `teacher`: the run folder of its teacher's network, where it has one.
    """
    place, row = GROUNDS[ground], TRAININGS[training]
    pace = row.pace(place)
    steps = max(1, round(share * pace.steps))
    values = {
        "model": _model(place, row, teacher),
        "data": _data(place, row, share),
        "objective": dict(row.objective),
        "optim": {"kind": "adamw", "lr": pace.rate, "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "floor": 0.0},
        "precision": {"kind": "fp32"},
        "budget": {"steps": steps, "seconds": seconds},
        "run": {
            "batch": pace.batch,
            "seed": seed,
            "ema": 0.999 if row.kind == "denoiser" and steps >= 500 else 0.0,
            "validate_every": 0,
            "checkpoint_steps": 0,
            "checkpoint_seconds": 60.0,
            "log_every": 50,
        },
    }
    return Recipe.from_values(f"{ground}-{training}", values, registries=SECTIONS)


def _model(place: Ground, row: Training, teacher: Path | None) -> dict[str, Any]:
    if teacher is not None:
        return {"kind": "student", "teacher": str(teacher), **row.model}
    model: dict[str, Any] = {"kind": row.kind, "shape": list(place.shape), **row.model}
    if row.kind == "denoiser":
        backbone = {**place.backbone, **row.model.get("backbone", {})}
        return {**model, "centre": place.centre, "scale": place.scale, "backbone": backbone}
    bijections = [{**part, **place.sizes.get(part["kind"], {})} for part in row.model["bijections"]]
    return {**model, "levels": place.levels, "bijections": bijections}


def _data(place: Ground, row: Training, share: float) -> dict[str, Any]:
    if row.data:  # pairs in proportion to the steps that go over them
        return {**row.data, "count": max(row.pace(place).batch, round(share * place.pairs))}
    return (place.noisy if row.kind == "denoiser" else place.data).model_dump()
