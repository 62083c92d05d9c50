"""Mean flow on a Gaussian, whose mean velocities are known: the identity they satisfy, and the steps that they make."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.core.process import Process
from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.decode.denoise import sample
from fewstep.diffusion.processes import PROCESSES, EDMConfig, FlowConfig
from fewstep.diffusion.solvers.ode import DPMSolverConfig, EulerConfig
from fewstep.diffusion.solvers.sde import DDIMConfig
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.training.objectives.mean_flow import MeanFlowConfig

MEAN, DEVIATION = 0.4, 0.6


def size(t: Tensor) -> Tensor:
    """The deviation of x_t."""
    return torch.sqrt((1 - t) ** 2 * DEVIATION**2 + t**2)


def mean_velocity(x: Tensor, t: Tensor, gap: Tensor) -> Tensor:
    """(x_t - x_r) / (t - r) along the ODE, r = t - gap, where x_t = (1 - t) MEAN + size(t) e; its limit where the gap is 0."""
    e, tiny = (x - (1 - t) * MEAN) / size(t), gap.abs() < 1e-6
    rate = (t - (1 - t) * DEVIATION**2) / size(t)
    safe = torch.where(tiny, torch.ones_like(gap), gap)
    return torch.where(tiny, rate * e, (size(t) - size(t - safe)) / safe * e) - MEAN


def instant(x: Tensor, t: Tensor, gap: Tensor) -> Tensor:
    return mean_velocity(x, t, torch.zeros_like(gap))


def rows(seed: int, count: int) -> CounterRng:
    return CounterRng.seeded([seed]).fork(torch.zeros(count, dtype=torch.int64)).at(torch.arange(count))


def model(function: Any, free: Tensor | None = None) -> Denoiser:
    """A model of u(x, t, gap); `free` [4] the weights of 1, x, gap and x gap that are added to it."""
    config = {"backbone": {"kind": "points", "width": 8}, "process": "flow", "parameterisation": "velocity", "told": "gap"}
    made = parse(DenoiserConfig, {**config, "shape": (1,)}).build().double()

    def network(x: Tensor, c_noise: Tensor, label: Any = None, told: Tensor | None = None) -> tuple[Tensor, None]:
        t = c_noise[:, None]
        gap = torch.zeros_like(t) if told is None else told
        found = function(x, t, gap)
        if free is not None:
            found = found + free[0] + free[1] * x + free[2] * gap + free[3] * x * gap
        return found, None

    made.network = network  # type: ignore[method-assign]
    return made


def slopes(function: Any, seed: int) -> Tensor:
    """[4] standard errors that the mean of (u - target) times 1, x, gap and x gap lies from 0: the loss's own gradients."""
    aim, batches = parse(MeanFlowConfig, {"times": "uniform", "apart": 0.7, "power": 0.0}).build(), []
    for part in torch.arange(8000).chunk(20):
        free = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        rng = rows(seed, 8000).fork(part)
        data = Batch(part[:, None], extra={"x": MEAN + DEVIATION * rng.split("x").normal(1)})
        batches.append(torch.autograd.grad(aim.loss(model(function, free), data, rng).value, free)[0])
    found = torch.stack(batches)
    return found.mean(0) / found.std(0) * math.sqrt(len(found))


def test_the_identity_holds_for_the_mean_velocities_of_a_gaussian(seed: int) -> None:
    """In expectation no direction improves on them, but one does on velocities that are not means. 20 batches: Student's t."""
    assert float(slopes(mean_velocity, seed).abs().max()) < 9
    assert float(slopes(instant, seed).abs().max()) > 20


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("way", ["ddim flow", "euler flow", "ddim vp", "ddim edm", "1M vp"])
def test_a_step_of_any_length_is_exact(way: str, steps: int, seed: int) -> None:
    """Also in another process, and for rows with grids of their own."""
    solver, process = way.split()
    own, flow, e = PROCESSES[process](), FlowConfig(), rows(seed, 6).normal(1)
    built = {"ddim": DDIMConfig(), "euler": EulerConfig(), "1M": DPMSolverConfig(terms=1)}[solver].build()  # type: ignore[attr-defined]
    t = torch.linspace(0.95, 0.1, steps + 1, dtype=torch.float64) ** torch.linspace(1, 1.5, 6, dtype=torch.float64)[:, None]
    for clock in (t[0], t):
        grid = own.time(flow.sigma(clock) / flow.alpha(clock))
        first, last = clock[..., :1].expand(6, 1), clock[..., -1:].expand(6, 1)
        x = in_process(own, grid[..., :1], (1 - first) * MEAN + size(first) * e)
        wanted = in_process(own, grid[..., -1:], (1 - last) * MEAN + size(last) * e)
        told = model(mean_velocity).denoiser(None, None if process == "flow" else own, grid)
        torch.testing.assert_close(sample(told, own, built, grid, x, rows(0, 6)).payload.x, wanted, rtol=1e-8, atol=1e-8)
        plain = model(mean_velocity).denoiser(None, own)
        assert not torch.allclose(sample(plain, own, built, grid, x, rows(0, 6)).payload.x, wanted, atol=1e-3)


def in_process(own: Process, t: Tensor, z: Tensor) -> Tensor:
    """x of the process at time `t` where flow matching has z at the same ratio."""
    return z * (own.alpha(t) + own.sigma(t))


def test_without_a_grid_it_is_a_denoiser_like_all(seed: int) -> None:
    x, t = rows(seed, 4).normal(1), torch.tensor([0.2, 0.5, 0.9, 1.0]).double()
    found = model(mean_velocity).denoiser()(x, t)
    alpha, sigma = (1 - t)[:, None], t[:, None]
    wanted = MEAN + alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * (x - alpha * MEAN)
    torch.testing.assert_close(found, wanted)
    ahead = model(mean_velocity).denoiser(None, EDMConfig(), torch.tensor([0.1, 0.05]).double())
    ended = ahead(x, torch.full((4,), 0.05).double())  # nothing comes after the last place
    assert isinstance(ended, Tensor) and bool(ended.isfinite().all())
