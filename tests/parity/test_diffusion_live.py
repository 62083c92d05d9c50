"""Solvers here and those of `diffusers` and `azula` take the same steps on the same grids."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from solved import MIXTURE, rows
from torch import Tensor

from fewstep.core.process import Process, Solver
from fewstep.decode.denoise import denoise, start
from fewstep.diffusion.grids import KarrasConfig
from fewstep.diffusion.processes import DDPMConfig, EDMConfig, FlowConfig, VPConfig
from fewstep.diffusion.solvers.heun import HeunConfig
from fewstep.diffusion.solvers.multistep import mean
from fewstep.diffusion.solvers.ode import DEISConfig, DPMSolverConfig, EulerConfig
from fewstep.diffusion.solvers.sde import DDIMConfig
from fewstep.diffusion.solvers.unipc import UniPCConfig

pytestmark = pytest.mark.claims
STEPS = 12


def path(process: Process, solver: Solver[Any], grid: Tensor, x: Tensor) -> list[Tensor]:
    return [event.payload.x for event in denoise(MIXTURE.denoiser(process), process, solver, grid, x, rows(len(x)))][1:]


def assert_agree(mine: list[Tensor], theirs: list[Tensor], label: str) -> None:
    worst = max(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(mine, theirs, strict=True))
    print(f"{label}: largest difference of {len(mine)} steps {worst:.1e}")
    assert worst < 1e-5


def scheduled(scheduler: Any, process: Process, grid: Tensor, x: Tensor) -> list[Tensor]:
    """The steps of a scheduler of diffusers that predicts x_0, on the ratios of `grid`; first, it takes any grid of as many."""
    scheduler.set_timesteps(STEPS)
    ratios = (process.sigma(grid) / process.alpha(grid)).float()
    scheduler.sigmas = ratios
    scheduler.timesteps = torch.arange(len(ratios) - 1)
    path = []
    for i, t in enumerate(scheduler.timesteps):
        estimate = mean(MIXTURE.denoiser(process)(x.double(), grid[i].expand(len(x)))).float()
        x = scheduler.step(estimate, t, x).prev_sample
        path.append(x)
    return path


FAMILIES = {
    "1M": ("DPMSolverMultistepScheduler", {"solver_order": 1, "final_sigmas_type": "sigma_min"}, DPMSolverConfig(terms=1)),
    "2M": ("DPMSolverMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "sigma_min"}, DPMSolverConfig()),
    "3M as published": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "final_sigmas_type": "sigma_min"},
        DPMSolverConfig(terms=3, published=True),
    ),
    "UniPC-2 bh1": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}, UniPCConfig(variant="bh1")),
    "UniPC-2 bh2": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}, UniPCConfig()),
    "UniPC-3 bh1": ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}, UniPCConfig(terms=3, variant="bh1")),
    "UniPC-3 bh2": ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh2"}, UniPCConfig(terms=3)),
    "DEIS-2": ("DEISMultistepScheduler", {"solver_order": 2}, DEISConfig(terms=2)),
    "DEIS-3": ("DEISMultistepScheduler", {"solver_order": 3}, DEISConfig()),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_multistep_solvers_of_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    kind, options, config = FAMILIES[name]
    scheduler = getattr(diffusers, kind)(prediction_type="sample", lower_order_final=False, **options)
    process = VPConfig()
    grid = KarrasConfig(most=20.0, least=0.05, to_zero=False).build(process, STEPS)
    x = start(process, grid, (2,), rows(16))
    assert_agree(path(process, config.build(), grid, x), scheduled(scheduler, process, grid, x), name)


@pytest.mark.parametrize(("kind", "config"), [("EulerDiscreteScheduler", EulerConfig()), ("HeunDiscreteScheduler", HeunConfig())])
def test_solvers_of_diffusers_on_edms_clock(kind: str, config: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    process = EDMConfig(sigma_max=200.0)
    scheduler = getattr(diffusers, kind)(prediction_type="epsilon", use_karras_sigmas=True)
    scheduler.set_timesteps(STEPS)
    ratios = scheduler.sigmas.double()
    places = ratios if kind.startswith("Euler") else torch.cat((ratios[:1], ratios[1:-1:2], ratios[-1:]))
    grid = process.time(places)
    x = start(process, grid, (2,), rows(16))
    mine, theirs, y = path(process, config.build(), grid, x), [], x
    for i, t in enumerate(scheduler.timesteps):
        noise = ratios[i]
        estimate = mean(MIXTURE.denoiser(process)(y.double(), process.time(noise).expand(len(y))))
        scheduler.scale_model_input(y, t)
        y = scheduler.step(((y.double() - estimate) / noise).float(), t, y).prev_sample
        theirs.append(y)
    theirs = theirs if kind.startswith("Euler") else [*theirs[1::2], theirs[-1]]
    assert_agree(mine, theirs, kind)


def test_ddim_and_ddpm_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    process = DDPMConfig()
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    grid = torch.cat(((scheduler.timesteps.double() + 1) / 1000, torch.zeros(1)))
    x = start(process, grid, (2,), rows(16))
    mine, theirs, y = path(process, DDIMConfig().build(), grid, x), [], x
    for i, t in enumerate(scheduler.timesteps):
        estimate = mean(MIXTURE.denoiser(process)(y.double(), grid[i].expand(len(y))))
        eps = (y.double() - process.alpha(grid[i]) * estimate) / process.sigma(grid[i])
        y = scheduler.step(eps.float(), t, y).prev_sample
        theirs.append(y)
    assert_agree(mine[:-1], theirs[:-1], "DDIM")  # its last step ends at the chain's first level, not at 0
    ddpm = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    ddpm.set_timesteps(20)
    for variance, name in (("fixed_small", "small"), ("fixed_large", "large")):
        for step in (900, 500, 50):
            now, before = torch.tensor([(step + 1) / 1000, (step - 49) / 1000]).double()
            shrink = process.alpha(now) * process.sigma(before) / (process.sigma(now) * process.alpha(before))
            large = float(process.sigma(now) ** 2 * (1 - shrink**2))
            wanted = large if name == "large" else large * float(process.sigma(before) / process.sigma(now)) ** 2
            assert float(ddpm._get_variance(step, variance_type=variance)) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("kind", "config"), [("DDIMSampler", DDIMConfig()), ("EulerSampler", EulerConfig())])
def test_samplers_of_azula(kind: str, config: Any) -> None:
    azula = pytest.importorskip("azula.sample")
    noise = pytest.importorskip("azula.noise")
    process = FlowConfig()

    class Exact(torch.nn.Module):
        schedule = noise.RectifiedSchedule(alpha_min=0.0, sigma_min=0.0)

        def forward(self, x: Tensor, t: Tensor) -> Any:
            held = MIXTURE.denoiser(process)(x, torch.as_tensor(t).double().expand(len(x)))
            return type("Posterior", (), {"mean": held})()

    sampler = getattr(azula, kind)(Exact(), start=0.95, stop=0.05, steps=STEPS, silent=True, dtype=torch.float64)
    grid = sampler.timesteps
    x = start(process, grid, (2,), rows(16), torch.float64)
    theirs, y = [], x
    for t, s in pairwise(grid):
        y = sampler.step(y, t, s)
        theirs.append(y)
    assert_agree(path(process, config.build(), grid, x), theirs, f"azula {kind}")
