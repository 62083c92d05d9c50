"""Guidance, inpainting and the loop around them: what they compute, what they cost, what they refuse."""

import math

import pytest
import torch
from solved import MIXTURE, between, rows
from torch import Tensor

from fewstep.core.process import Denoised
from fewstep.decode.denoise import denoise, sample, start
from fewstep.diffusion.grids import KarrasConfig
from fewstep.diffusion.guidance import Guided, Inpaint
from fewstep.diffusion.mixture import Mixture
from fewstep.diffusion.parameterisations import EpsConfig
from fewstep.diffusion.processes import FlowConfig, VPConfig
from fewstep.diffusion.solvers.multistep import mean
from fewstep.diffusion.solvers.ode import DPMSolverConfig
from fewstep.diffusion.solvers.sde import DDIMConfig

OTHER = Mixture.drawn(5)
VP = VPConfig()


def test_guidance_in_the_estimate_is_guidance_in_eps(seed: int) -> None:
    t = VP.time(torch.tensor([0.3, 2.0, 9.0]))
    x = rows(3, seed).normal(2)
    found = Guided(MIXTURE.denoiser(VP), OTHER.denoiser(VP), VP, 2.5)(x, t)
    alpha, sigma = VP.alpha(t).unsqueeze(1), VP.sigma(t).unsqueeze(1)
    eps = [(x - alpha * mean(model.denoiser(VP)(x, t))) / sigma for model in (MIXTURE, OTHER)]
    mixed = eps[1] + 2.5 * (eps[0] - eps[1])
    torch.testing.assert_close(found.mean, EpsConfig().denoiser(lambda *_: mixed, VP)(x, t))
    assert found.calls == 6


def test_guidance_costs_a_call_inside_its_interval_only(seed: int) -> None:
    grid = between(VP, 6)
    noise = VP.sigma(grid) / VP.alpha(grid)
    guided = Guided(MIXTURE.denoiser(VP), OTHER.denoiser(VP), VP, 2.0, (float(noise[4]) * 0.99, float(noise[2]) * 1.01))
    x = start(VP, grid, (2,), rows(3, seed))
    events = list(denoise(guided, VP, DDIMConfig().build(), grid, x, rows(3, seed)))
    assert [event.cost.calls for event in events] == [0, 3, 6, 12, 18, 24, 27]


def test_weights_1_and_0_are_the_two_models(seed: int) -> None:
    x, t = rows(3, seed).normal(2), VP.time(torch.tensor([0.3, 2.0, 9.0]))
    for weight, model in ((1.0, MIXTURE), (0.0, OTHER)):
        found = Guided(MIXTURE.denoiser(VP), OTHER.denoiser(VP), VP, weight)(x, t)
        torch.testing.assert_close(found.mean, mean(model.denoiser(VP)(x, t)))
    with pytest.raises(ValueError, match="interval"):
        Guided(MIXTURE.denoiser(VP), OTHER.denoiser(VP), VP, 2.0, (3.0, 1.0))


def test_inpainting_keeps_what_is_known_and_draws_the_rest_given_it(seed: int) -> None:
    """A correlated Gaussian: with resampling the unknown half has about the conditional law."""
    gap = 0.9
    covariance = torch.tensor([[1.0, gap], [gap, 1.0]], dtype=torch.float64)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = VP.alpha(t).view(-1, 1, 1), VP.sigma(t).view(-1, 1, 1)
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64))
        return (gain @ x.unsqueeze(2)).squeeze(2)

    count, known, mask = 400, torch.tensor([1.5, math.nan]).double(), torch.tensor([True, False])
    grid = KarrasConfig(most=20.0, least=0.02).build(VP, 20)
    found = {}
    for times in (1, 8):
        solver = Inpaint(DDIMConfig(eta=1.0).build(), known, mask, times)
        x = start(VP, grid, (2,), rows(count, seed), torch.float64)
        last = sample(denoiser, VP, solver, grid, x, rows(count, seed))
        assert last.cost.calls == 20 * times * count
        torch.testing.assert_close(last.payload.x[:, 0], torch.full((count,), 1.5).double())
        found[times] = float(last.payload.x[:, 1].mean())
    wanted = gap * 1.5
    assert abs(found[8] - wanted) < 0.2 and abs(found[8] - wanted) < abs(found[1] - wanted) + 0.15


def test_inpainting_refuses() -> None:
    with pytest.raises(ValueError, match="not finite where mask"):
        Inpaint(DDIMConfig().build(), torch.tensor([math.nan, 0.0]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="times=0"):
        Inpaint(DDIMConfig().build(), torch.zeros(2), torch.tensor([True, False]), 0)


def test_inpainting_all_of_it_gives_it_back(seed: int) -> None:
    grid = KarrasConfig().build(VP, 5)
    known = torch.randn(2, 3)
    solver = Inpaint(DPMSolverConfig().build(), known, torch.tensor(True))
    x = start(VP, grid, (3,), rows(2, seed))
    torch.testing.assert_close(sample(lambda x, t: 0 * x, VP, solver, grid, x, rows(2)).payload.x, known)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_network_that_is_not_finite_is_named(bad: float, seed: int) -> None:
    process, grid = FlowConfig(), KarrasConfig().build(FlowConfig(), 4)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        out = 0.5 * x
        out[1] = torch.where(t[1] < grid[1] + 1e-12, bad, 1.0)
        return out

    x = start(process, grid, (2,), rows(3, seed))
    with pytest.raises(ValueError, match=r"not finite at t=.*row 1") as refusal:
        sample(denoiser, process, DPMSolverConfig().build(), grid, x, rows(3))
    assert f"t={float(grid[1]):.6g}" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_large_network_output_is_finite_though_its_sum_is_not() -> None:
    grid, x = KarrasConfig().build(VP, 2), torch.randn(2, 3)
    solver = DDIMConfig().build()
    made = sample(lambda x, t: torch.full_like(x, 3e38), VP, solver, grid, x, rows(2)).payload
    assert made.denoised is not None and bool(torch.isfinite(made.denoised).all())


def test_an_estimate_of_another_shape_is_refused() -> None:
    grid = KarrasConfig().build(VP, 4)
    with pytest.raises(ValueError, match="has the shape of x"):
        sample(lambda x, t: x[:, :1], VP, DDIMConfig().build(), grid, torch.randn(2, 3), rows(2))


def test_events_tell_the_whole_way(seed: int) -> None:
    grid = between(VP, 4)
    x = start(VP, grid, (2,), rows(2, seed))
    events = list(denoise(lambda x, t: Denoised(0.5 * x), VP, DDIMConfig().build(), grid, x, rows(2)))
    assert [event.payload.i for event in events] == [0, 1, 2, 3, 4]
    assert torch.equal(events[0].payload.x, x) and events[0].payload.denoised is None
    assert torch.equal(events[1].payload.denoised, 0.5 * x)
    assert events[-1].cost.calls == 8 and events[-1].cost.bytes == x.nbytes


def test_the_start_has_the_noise_of_its_grid(seed: int) -> None:
    own = torch.stack([KarrasConfig(most=most).build(VP, 3) for most in (5.0, 50.0)])
    x = start(VP, own, (4,), rows(2, seed))
    for row in range(2):
        assert torch.equal(x[row : row + 1], start(VP, own[row], (4,), rows(1, seed + row)))
