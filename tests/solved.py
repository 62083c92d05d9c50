"""Solvers, processes and grids that the laws of diffusion run on."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.core.process import Process, Solver
from fewstep.core.random import CounterRng
from fewstep.core.recipe import Config
from fewstep.decode.denoise import sample
from fewstep.diffusion.grids import LogSNRConfig
from fewstep.diffusion.mixture import Mixture
from fewstep.diffusion.processes import PROCESSES, Defined
from fewstep.diffusion.solvers import SOLVERS
from fewstep.diffusion.solvers.ancestral import AncestralConfig
from fewstep.diffusion.solvers.langevin import AnnealedLangevinConfig
from fewstep.diffusion.solvers.ode import DEISConfig, DPMSolverConfig
from fewstep.diffusion.solvers.sde import DDIMConfig, SDEDPMSolverConfig
from fewstep.diffusion.solvers.unipc import UniPCConfig

CONFIGS: Mapping[str, Config] = {
    **{name: config() for name, config in SOLVERS.items()},
    "annealed-langevin": AnnealedLangevinConfig(moves=20),
    "1M": DPMSolverConfig(terms=1),
    "3M": DPMSolverConfig(terms=3),
    "3M-published": DPMSolverConfig(terms=3, published=True),
    "deis-1": DEISConfig(terms=1),
    "deis-2": DEISConfig(terms=2),
    "deis-ratio": DEISConfig(clock="ratio"),
    "deis-t": DEISConfig(clock="t"),
    "unipc-1": UniPCConfig(terms=1),
    "unipc-2-bh1": UniPCConfig(variant="bh1"),
    "unipc-3": UniPCConfig(terms=3),
    "unipc-3-bh1": UniPCConfig(terms=3, variant="bh1"),
    "ddim-0.5": DDIMConfig(eta=0.5),
    "ancestral-large": AncestralConfig(variance="large"),
    "sde-dpm++-1": SDEDPMSolverConfig(terms=1),
}
BUILT: Mapping[str, Solver] = {name: config.build() for name, config in CONFIGS.items()}  # type: ignore[attr-defined]
DETERMINISTIC = [name for name, solver in BUILT.items() if not solver.stochastic]
STOCHASTIC = [name for name, solver in BUILT.items() if solver.stochastic]
OWN_TIME = ("euler", "deis-t", "euler-maruyama", "predictor-corrector", "ancestral-large")  # what depends on the process itself
STEPPED = [name for name in DETERMINISTIC if BUILT[name].calls > 0]

SMOOTH: Mapping[str, Process] = {
    **{name: config() for name, config in PROCESSES.items() if name != "pfgm++"},
    "defined": Defined(lambda t: 1 - t**2, lambda t: t**1.5),
}
MIXTURE = Mixture(
    torch.tensor([[1.0, 0.0], [-0.7, 0.6], [0.0, -1.0]]), torch.tensor([0.4, 0.36, 0.44]), torch.tensor([0.3, 0.3, 0.4])
)
MOST, LEAST = 50.0 * (1 - 1e-9), 0.1  # where estimates hardly move, so that the first steps' lower order does not show


def rows(count: int, seed: int = 0) -> CounterRng:
    return CounterRng.seeded(range(seed, seed + count))


def between(process: Process, steps: int, most: float = MOST, least: float = LEAST) -> Tensor:
    return LogSNRConfig(most=most, least=least, to_zero=False).build(process, steps)


def arrive(name: str, process: Process, grid: Tensor, eps: Tensor, seed: int = 0, mixture: Mixture = MIXTURE) -> Tensor:
    """x / alpha at the grid's end, of noise `eps` at its start with a variance that includes unit data."""
    first = grid[..., :1]
    x = eps * torch.hypot(process.alpha(first), process.sigma(first)).to(eps.dtype)
    last = sample(mixture.denoiser(process), process, BUILT[name], grid, x, rows(len(x), seed)).payload.x
    return last / process.alpha(grid[..., -1:]).to(eps.dtype)


def slope(steps: tuple[int, ...], errors: list[float]) -> float:
    """The order at which errors fall."""
    return -math.log(errors[-1] / errors[0]) / math.log(steps[-1] / steps[0])


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean().sqrt())
