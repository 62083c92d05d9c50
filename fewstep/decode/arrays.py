"""Samples of continuous data from a trained denoiser or flow, as a request asks for them. The loop itself is `denoise`."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.core.event import Cost, Event
from fewstep.core.process import Denoise, Process
from fewstep.core.random import CounterRng
from fewstep.core.recipe import Config, choice, parse
from fewstep.decode.denoise import Sampled, denoise, start
from fewstep.diffusion.grids import GRIDS, KarrasConfig, LearnedConfig
from fewstep.diffusion.guidance import Guided
from fewstep.diffusion.parameterisations import ConsistencyConfig
from fewstep.diffusion.processes import PROCESSES
from fewstep.diffusion.solvers import SOLVERS
from fewstep.diffusion.solvers.consistency import ConsistencySamplerConfig
from fewstep.diffusion.solvers.ode import DEISConfig
from fewstep.diffusion.solvers.sde import DDIMConfig
from fewstep.diffusion.solvers.unipc import UniPCConfig
from fewstep.models.denoiser import Denoiser
from fewstep.models.flow import Flow

Watch = Callable[[Event[Sampled]], None]


@final
class SampleConfig(Config):
    """How samples are made: `count` of them, `batch` at a time, along `steps` steps of a grid.

    `process`: the one to sample in (None: the model's own), for any model runs in any. `label`: the class of all rows, or one a
    row; (): none. `guidance` w moves estimates by w - 1 times what the class changes, where sigma / alpha lies in `interval`.
    Sample i depends on `seed` + i alone. A model that looks ahead (mean flow) does so under a solver of one call a step, order 1
    and no noise, such as DDIM; under any other it is a denoiser like all.
    """

    count: int = Field(default=64, ge=1)
    batch: int = Field(default=256, ge=1)
    steps: int = Field(default=18, ge=1)
    solver: choice(lambda: SOLVERS, "solver") = DEISConfig()  # type: ignore[valid-type]
    grid: choice(lambda: GRIDS, "grid") = KarrasConfig()  # type: ignore[valid-type]
    process: choice(lambda: PROCESSES, "process") | None = None  # type: ignore[valid-type]
    label: tuple[int, ...] = ()
    guidance: float = Field(default=1.0, ge=0)
    interval: tuple[float, float] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _grid_fits_solver(self) -> "SampleConfig":
        fitted = isinstance(self.grid, LearnedConfig) and not self.grid.ratios
        if fitted and not (isinstance(self.solver, UniPCConfig) and self.solver.terms == 3):
            raise ValueError("grid='learned': shipped ones were fitted to solver='unipc' with terms=3; set these, or give ratios")
        return self


@final
@dataclass(frozen=True, slots=True)
class Samples:
    """`x` [N, *shape] in the data's own unit, and what they cost: calls of the network over all rows, and seconds."""

    x: Tensor
    cost: Cost


def requested(model: Denoiser | Flow, fields: Mapping[str, object]) -> SampleConfig:
    """The request of `fields` by name, and for what they leave out, how a model of this kind is best sampled.

    One call for a consistency model, one of DDIM for mean flow, the defaults for others. Raises ValueError for a bad field.
    """
    own: dict[str, object] = {}
    if isinstance(model, Denoiser) and model.parameterisation.kind == ConsistencyConfig.kind:
        own = {"solver": {"kind": ConsistencySamplerConfig.kind}, "steps": 1}
    elif isinstance(model, Denoiser) and model.config.told == "gap":
        own = {"solver": {"kind": DDIMConfig.kind}, "steps": 1}
    return parse(SampleConfig, {**(own if "solver" not in fields else {}), **fields})


@torch.no_grad()
def sample(model: Denoiser | Flow, config: SampleConfig = SampleConfig(), watch: Watch | None = None) -> Samples:
    """Samples of `model` as `config` asks; `watch` sees every event of every batch. A flow takes one call and has no events.

    Raises ValueError for labels that are neither one nor as many as the samples or that the model does not take, for guidance
    without a class, and for what solver, grid and process refuse.
    """
    if isinstance(model, Flow):
        return _in_one_pass(model, config)
    if len(config.label) not in (0, 1, config.count):
        raise ValueError(f"label: {len(config.label)} classes for {config.count} samples; give one, or one for each")
    if config.guidance != 1 and not config.label:
        raise ValueError(f"guidance={config.guidance}: there is no class to be guided by; set label, or guidance=1")
    weight = next(model.parameters())
    process = model.process if config.process is None else cast(Process, cast(Any, config.process).build())
    solver, grid = cast(Any, config.solver).build(), cast(Any, config.grid).build(process, config.steps).to(weight.device)
    ahead = grid if (solver.order, solver.calls, solver.stochastic) == (1, 1, False) else None
    labels = list(config.label) * (config.count if len(config.label) == 1 else 1)
    made, cost = [], Cost()
    for first in range(0, config.count, config.batch):
        rows = range(first, min(first + config.batch, config.count))
        rng = CounterRng.seeded([config.seed + row for row in rows], weight.device)
        x = start(process, grid, model.shape, rng, weight.dtype)
        denoiser = _conditioned(model, process, ahead, labels[rows.start : rows.stop], config)
        for event in denoise(denoiser, process, solver, grid, x, rng):
            if watch is not None:
                watch(event)
        made.append(event.payload.x)
        cost = cost + event.cost
    return Samples(model.unnormed(torch.cat(made)), cost)


def _conditioned(model: Denoiser, process: Process, ahead: Tensor | None, labels: Sequence[int], config: SampleConfig) -> Denoise:
    """The model as a denoiser of `process`, told the class of each row and guided by it."""
    told = torch.tensor(labels, device=next(model.parameters()).device) if labels else None
    given = model.denoiser(told, process, ahead)
    if config.guidance == 1:
        return given
    if told is None or not model.classes:
        raise ValueError(f"guidance={config.guidance}: this model tells no classes apart; set guidance=1")

    def free(x: Tensor, t: Tensor) -> Any:
        return model.denoiser(None, process, ahead)(x, t)

    return Guided(given, free, process, config.guidance, config.interval or (0.0, float("inf")))


def _in_one_pass(flow: Flow, config: SampleConfig) -> Samples:
    begun = time.perf_counter()
    rows = range(config.seed, config.seed + config.count)
    if config.label and not flow.config.context:
        raise ValueError(f"label={list(config.label)}: this flow has no condition; leave it out")
    c = None
    if flow.config.context:
        labels = torch.tensor(list(config.label) * (config.count if len(config.label) == 1 else 1), dtype=torch.int64)
        if len(labels) != config.count or not 0 <= int(labels.min()) <= int(labels.max()) < flow.config.context:
            top = flow.config.context - 1
            raise ValueError(
                f"label={list(config.label)}: this flow is conditional; give one class of 0 .. {top}, or one for each"
            )
        c = torch.nn.functional.one_hot(labels, flow.config.context).to(next(flow.parameters()))
    x = flow.sample(CounterRng.seeded(list(rows)), c)
    return Samples(x, Cost(calls=config.count, seconds=time.perf_counter() - begun, bytes=x.nbytes))
