"""Who is asked for the fewest calls on digits: solvers and grids here, and schedulers of `diffusers`, all with the same weights.

Both sides go from sigma 80 to 0.002 and, most of them, on to 0; only the learned grid has other ends. This file measures nothing.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast, final

import torch
from torch import Tensor

from fewstep.core.recipe import Config
from fewstep.diffusion.grids import GridConfig, KarrasConfig, LearnedConfig, LogSNRConfig
from fewstep.diffusion.processes import ratio
from fewstep.diffusion.solvers.heun import HeunConfig
from fewstep.diffusion.solvers.multistep import mean
from fewstep.diffusion.solvers.ode import DEISConfig, DPMSolverConfig
from fewstep.diffusion.solvers.unipc import UniPCConfig
from fewstep.models.denoiser import Denoiser
from fewstep.report.claims.denoisers import arrive
from fewstep.report.claims.digits import DEVIATION

COUNTS = (4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 25, 30, 40)
_IN_PAIRS = (5, 7, 9, 11, 13, 15, 17, 19, 21, 25, 31, 41)  # of solvers with two calls a step, one in the last
_LEARNED = (5, 8, 10, 15, 20)  # for which there are such grids
_MOST, _LEAST = 80.0, 0.002
KARRAS, _EXPONENTIAL = KarrasConfig(most=_MOST, least=_LEAST), LogSNRConfig(most=_MOST, least=_LEAST)
_GRIDS: tuple[tuple[str, GridConfig], ...] = (("Karras grid", KARRAS), ("exponential grid", _EXPONENTIAL))
Draw = Callable[[Denoiser, Tensor, int, int], Tensor]
Options = Mapping[str, object]


@final
@dataclass(frozen=True, slots=True)
class Entrant:
    """A way of sampling: `draw` makes x_0 [N, ...] with a model, from unit noise [N, ...], a seed for noise of its own, and one
    of the numbers of calls in `counts`, which rise."""

    name: str
    draw: Draw
    counts: tuple[int, ...] = COUNTS


def here() -> list[Entrant]:
    """The solvers of this library. Those that are likely the best come first, which saves calls."""
    unipc, deis, learned = UniPCConfig(terms=3), DEISConfig(), LearnedConfig(scale=DEVIATION)
    pair = (("UniPC-3", unipc), ("DEIS-3", deis))
    others = (("DPM-Solver++ 3M", DPMSolverConfig(terms=3)), ("UniPC-2", UniPCConfig()), ("DPM-Solver++ 2M", DPMSolverConfig()))
    ends = tuple((f"{name} to {_LEAST}", grid.model_copy(update={"to_zero": False})) for name, grid in _GRIDS)
    spaced = product((*pair, *others), (*_GRIDS, *ends))
    return [
        Entrant("UniPC-3, learned grid", partial(sampled, unipc, learned), _LEARNED),
        Entrant(
            "UniPC-3, learned grid to 0.015", partial(sampled, unipc, learned.model_copy(update={"to_zero": False})), _LEARNED
        ),
        *(Entrant(f"{name}, {kind}", partial(sampled, solver, grid)) for (name, solver), (kind, grid) in spaced),
        Entrant("Heun, Karras grid", partial(sampled, HeunConfig(), KARRAS), _IN_PAIRS),
    ]


def of_diffusers() -> list[Entrant]:
    """Its schedulers, none where it is not installed.

    Those made for EDM's networks have their own grids and are told what the network says. The others are handed sigmas and
    estimates of the data; multistep ones end at the least sigma, where lower order at the end is their caller's choice, or at 0.
    """
    if importlib.util.find_spec("diffusers") is None:
        return []
    edm, (deis, unipc, dpm) = "EDMDPMSolverMultistepScheduler", (f"{k}MultistepScheduler" for k in ("DEIS", "UniPC", "DPMSolver"))
    whole, least = {"lower_order_final": False}, {"final_sigmas_type": "sigma_min", "lower_order_final": False}
    multistep: tuple[tuple[str, Options, bool], ...] = (  # its class, its options, whether it ends at 0
        (deis, {"solver_order": 3, **whole}, False),
        (unipc, {"solver_order": 3}, True),
        (deis, {"solver_order": 3}, False),
        (unipc, {"solver_order": 3, **whole}, False),
        (unipc, {"solver_order": 2}, True),
        (dpm, {"solver_order": 3, **least}, False),
        (dpm, {"solver_order": 2, **least}, False),
        (deis, {"solver_order": 2}, False),
    )
    native: tuple[tuple[str, Options], ...] = (
        (edm, {"solver_order": 3, "sigma_schedule": "exponential"}),
        (edm, {"solver_order": 3, "sigma_schedule": "karras"}),
        (edm, {"solver_order": 2, "sigma_schedule": "exponential"}),
        (edm, {"solver_order": 2, "sigma_schedule": "karras"}),
        (edm, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
        ("EDMEulerScheduler", {}),
    )
    heun = "HeunDiscreteScheduler"
    return [
        *(
            Entrant(_title(kind, options, name), partial(_estimated, kind, options, grid.model_copy(update={"to_zero": zero})))
            for (kind, options, zero), (name, grid) in product(multistep, _GRIDS)
        ),
        *(Entrant(_title(kind, options, "own grid"), partial(_preconditioned, kind, options)) for kind, options in native),
        Entrant(_title(heun, {}, "Karras grid"), partial(_estimated, heun, {}, KARRAS), _IN_PAIRS),
    ]


def _title(kind: str, options: Options, grid: str) -> str:
    told = " ".join(f"{name}={value}" for name, value in options.items())
    return f"{kind} {told}".strip() + f", {grid}"


def sampled(config: Config, grid: GridConfig | LearnedConfig, model: Denoiser, noise: Tensor, seed: int, calls: int) -> Tensor:
    """x_0 by a solver of this library, in at most so many calls."""
    solver = cast(Any, config).build()
    places = grid.build(model.process, -(-calls // solver.calls))
    return arrive(model.denoiser(), model.process, solver, places, noise, seed)


@torch.no_grad()
def _preconditioned(kind: str, options: Options, model: Denoiser, noise: Tensor, seed: int, calls: int) -> Tensor:
    """By a scheduler that knows EDM's preconditioning: it scales the network's input and is told the network's output."""
    data = cast(Any, model.parameterisation).sigma_data
    scheduler = _made(kind, {"sigma_min": _LEAST, "sigma_max": _MOST, "sigma_data": data, **options})
    scheduler.set_timesteps(calls)
    x, generator = noise * scheduler.sigmas[0], torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps:
        output, _ = model.network(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


@torch.no_grad()
def _estimated(kind: str, options: Options, grid: GridConfig, model: Denoiser, noise: Tensor, seed: int, calls: int) -> Tensor:
    """By a scheduler that is told the estimate of the data: Heun's keeps x as EDM does, multistep ones as VP does."""
    paired = kind.startswith("Heun")
    steps = -(-calls // 2) if paired else calls
    places = ratio(model.process, grid.build(model.process, steps)).float()
    scheduler = _made(kind, {"prediction_type": "sample", **options})
    scheduler.set_timesteps(steps)  # it takes any sigmas of as many steps
    sigmas = torch.cat((places[:1], places[1:-1].repeat_interleave(2), places[-1:])) if paired else places
    scheduler.sigmas, scheduler.timesteps = sigmas, torch.arange(len(sigmas) - 1)
    alphas = torch.ones_like(sigmas) if paired else (1 + sigmas**2).rsqrt()
    denoise, x = model.denoiser(), noise * sigmas[0] * alphas[0]
    for i, t in enumerate(scheduler.timesteps):
        time = model.process.time(sigmas[i].double()).expand(len(x))
        x = scheduler.step(mean(denoise(x / alphas[i], time)), t, x).prev_sample
    return x / alphas[-1]


def _made(kind: str, options: Options) -> Any:
    return getattr(importlib.import_module("diffusers"), kind)(**options)
