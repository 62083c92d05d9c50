"""The laws of a solver: its order, its indifference to the process, its endings, its rows; every registered one is enrolled."""

import math
from functools import cache

import pytest
import torch
from solved import (
    BUILT,
    CONFIGS,
    DETERMINISTIC,
    LEAST,
    MIXTURE,
    MOST,
    OWN_TIME,
    SMOOTH,
    STEPPED,
    STOCHASTIC,
    arrive,
    between,
    error,
    rows,
    slope,
)
from torch import Tensor

from fewstep.core.process import Denoised, Process
from fewstep.decode.denoise import denoise, sample, start
from fewstep.diffusion.grids import KarrasConfig, UniformConfig
from fewstep.diffusion.processes import CosineConfig, EDMConfig, FlowConfig, PFGMConfig, VEConfig, VPConfig
from fewstep.diffusion.solvers.ancestral import AncestralConfig
from fewstep.diffusion.solvers.heun import ChurnConfig
from fewstep.diffusion.solvers.multistep import mean
from fewstep.diffusion.solvers.nodes import exponential, moments

STEPS = (96, 192, 384)
BOUNDS = {"3M": (2.75, 3.25), "unipc-3": (3.6, 4.4), "unipc-3-bh1": (3.6, 4.4)}
ORDERED = [(name, key) for name in STEPPED for key in (SMOOTH if name == "euler" else ("vp", "flow"))]


@cache
def reference() -> tuple[Tensor, Tensor]:
    eps = rows(4).normal(2)
    return eps, arrive("unipc-3", EDMConfig(), between(EDMConfig(), 1024), eps)


@pytest.mark.parametrize(("name", "key"), ORDERED)
def test_the_order_is_the_stated_one(name: str, key: str) -> None:
    """On a fixed mixture; with the indifference to processes below, on every process."""
    eps, wanted = reference()
    errors = [error(arrive(name, SMOOTH[key], between(SMOOTH[key], steps), eps), wanted) for steps in STEPS]
    low, high = BOUNDS.get(name, (BUILT[name].order - 0.15, BUILT[name].order + 0.15))
    assert low <= slope(STEPS, errors) <= high, errors


def test_the_adaptive_solver_keeps_its_tolerance() -> None:
    eps, wanted = reference()
    grid = between(FlowConfig(), 2)
    assert error(arrive("rk45", FlowConfig(), grid, eps), wanted) < 3e-4


@pytest.mark.parametrize("name", STEPPED)
def test_more_steps_in_float32_are_never_worse(name: str) -> None:
    eps, wanted = reference()
    errors = [error(arrive(name, VPConfig(), between(VPConfig(), n), eps.float()).double(), wanted) for n in (24, 96, 384)]
    assert errors[1] < errors[0] and errors[2] < max(errors[1], 3e-6), errors


@pytest.mark.parametrize("name", [name for name in BUILT if name not in OWN_TIME and name != "annealed-langevin"])
def test_samples_do_not_depend_on_the_process(name: str, seed: int) -> None:
    """The same noise, grid of ratios and seed give the same x / alpha, whatever alpha and sigma are."""
    eps = rows(3, seed).normal(2)
    found = {key: arrive(name, process, between(process, 12, most=20.0), eps, seed) for key, process in SMOOTH.items()}
    tolerance = 1e-4 if name == "rk45" else 1e-9
    for key, samples in found.items():
        torch.testing.assert_close(samples, found["edm"], rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")


def test_ddim_is_edms_and_rectified_flows_euler(seed: int) -> None:
    eps, edm, flow, vp = rows(5, seed).normal(2), EDMConfig(), FlowConfig(), VPConfig()
    runs = (("ddim", vp), ("euler", edm), ("euler", flow), ("1M", vp), ("deis-1", vp))
    first, *others = (arrive(name, process, between(process, 20), eps) for name, process in runs)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-12)


def test_eta_1_is_the_ancestral_sampler(seed: int) -> None:
    eps, vp = rows(5, seed).normal(2), VPConfig()
    ddim, _ = CONFIGS["ddim"].model_copy(update={"eta": 1.0}).build().init(eps, vp, between(vp, 9))  # type: ignore[attr-defined]
    ancestral = BUILT["ancestral"].init(eps, vp, between(vp, 9))
    for (x, (d, _)), weights in zip(ddim.table, ancestral.table, strict=True):
        torch.testing.assert_close(torch.stack((x, torch.tensor(d, dtype=x.dtype))), weights.squeeze(0))


def grids(process: Process) -> list[Tensor]:
    """Grids that end at t = 0, near it, or before it, from t = 1 and not, of few steps and more."""
    made = [KarrasConfig(to_zero=zero).build(process, steps) for zero in (True, False) for steps in (2, 5)]
    uniform = UniformConfig(most=None).build(process, 5)
    return [*made, uniform, torch.linspace(1, 0, 8, dtype=torch.float64), torch.tensor([1.0, 0.3]), torch.tensor([0.9, 0.0])]


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("key", SMOOTH)
def test_no_ending_gives_nan(name: str, key: str, seed: int) -> None:
    process, solver = SMOOTH[key], BUILT[name]
    for grid in grids(process):
        x = start(process, grid, (2,), rows(2, seed))
        if float(process.alpha(grid[0])) == 0 and name in ("euler-maruyama", "annealed-langevin"):
            with pytest.raises(ValueError, match="begin a little later"):
                solver.init(x, process, grid)
            continue
        found = sample(MIXTURE.denoiser(process), process, solver, grid, x, rows(2, seed)).payload
        assert bool(torch.isfinite(found.x).all()), grid
        if float(grid[-1]) == 0 and (name != "euler" or key in ("edm", "flow")):
            torch.testing.assert_close(found.x, float(process.alpha(grid[-1])) * found.denoised)


@pytest.mark.parametrize("name", BUILT)
def test_a_row_alone_is_the_row_in_a_batch_with_a_grid_of_its_own(name: str, seed: int) -> None:
    process = VPConfig()
    own = torch.stack([KarrasConfig(most=most).build(process, 5) for most in (20.0, 60.0, 40.0)])
    eps, denoiser = rows(3, seed).normal(2), MIXTURE.denoiser(process)
    x = start(process, own, (2,), rows(3, seed), torch.float64)
    together = sample(denoiser, process, BUILT[name], own, x, rows(3, seed)).payload.x
    for row in range(3):
        alone = sample(denoiser, process, BUILT[name], own[row], x[row : row + 1], rows(1, seed + row)).payload.x
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-10)
    assert eps.shape == x.shape


@pytest.mark.parametrize("name", BUILT)
def test_a_step_leaves_what_it_was_given(name: str, seed: int) -> None:
    """So that runs may branch, share a solver and start again."""
    process, solver, denoiser = VPConfig(), BUILT[name], MIXTURE.denoiser(VPConfig())
    grid = KarrasConfig().build(process, 6)
    x = start(process, grid, (2,), rows(2, seed), torch.float64)
    memory, rng = solver.init(x, process, grid), rows(2, seed)
    for i in range(2):
        x, memory = solver.step(denoiser, x, i, memory, rng.at(i))
    kept = x.clone()
    once, after = solver.step(denoiser, x, 2, memory, rng.at(2))
    solver.step(denoiser, once, 3, after, rng.at(3))
    again, _ = solver.step(denoiser, x, 2, memory, rng.at(2))
    assert torch.equal(x, kept) and torch.equal(once, again)


@pytest.mark.parametrize("name", [name for name in BUILT if BUILT[name].calls > 0])
def test_the_stated_calls_are_made(name: str, seed: int) -> None:
    process = VPConfig()
    grid = KarrasConfig(to_zero=False).build(process, 4)
    x = start(process, grid, (2,), rows(3, seed))
    events = list(denoise(MIXTURE.denoiser(process), process, BUILT[name], grid, x, rows(3, seed)))
    assert [event.cost.calls for event in events] == [3 * BUILT[name].calls * i for i in range(5)]


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and their standard errors of x and of its products."""
    terms = torch.cat((x, x.square(), (x[:, :1] * x[:, 1:])), 1)
    return terms.mean(0), terms.std(0) / math.sqrt(len(x))


CHAINS = {  # steps, most noise
    "annealed-langevin": (60, 10.0),
    "euler-maruyama": (300, 50.0),
    "predictor-corrector": (150, 50.0),
    "churn": (60, 50.0),
}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *((name, "vp") for name in STOCHASTIC if BUILT[name].order or name == "annealed-langevin"),
        ("predictor-corrector", "sub-vp"),
        ("euler-maruyama", "ve"),
    ],
)
def test_moments_of_stochastic_samples(name: str, key: str, seed: int) -> None:
    """Five moments within 5 standard errors, of which each fails once in 1.7 million; the bias of the steps is a fifth of one."""
    process, count = SMOOTH[key], 1500
    steps, most = CHAINS.get(name, (150, 50.0))
    grid = KarrasConfig(most=most, least=0.02).build(process, steps)
    x = start(process, grid, (2,), rows(count, seed), torch.float64)
    found, errors = moments_of(sample(MIXTURE.denoiser(process), process, BUILT[name], grid, x, rows(count, seed)).payload.x)
    second = MIXTURE.covariance + torch.outer(MIXTURE.mean, MIXTURE.mean)
    wanted = torch.cat((MIXTURE.mean, second.diagonal(), second[0, 1:]))
    assert bool(((found - wanted).abs() < 5 * errors).all()), (found - wanted) / errors


def test_learned_variance_lies_between_the_two(seed: int) -> None:
    process, rng = VPConfig(), rows(2, seed)
    grid = between(process, 6)
    x = start(process, grid, (2,), rng, torch.float64)
    plain = MIXTURE.denoiser(process)

    def run(variance: str, share: float | None) -> Tensor:
        def denoiser(x: Tensor, t: Tensor) -> Denoised:
            return Denoised(mean(plain(x, t)), None if share is None else torch.full_like(x, share))

        return sample(denoiser, process, AncestralConfig(variance=variance).build(), grid, x, rng).payload.x  # type: ignore[arg-type]

    torch.testing.assert_close(run("learned", 0.0), run("small", None))
    torch.testing.assert_close(run("learned", 1.0), run("large", None))
    assert not torch.equal(run("learned", 0.5), run("small", None))
    with pytest.raises(ValueError, match="returns none; choose"):
        run("learned", None)


def test_churn_of_nothing_is_heun(seed: int) -> None:
    eps, process = rows(3, seed).normal(2), VPConfig()
    grid = between(process, 8)
    quiet = ChurnConfig(churn=0.0).build()
    x = eps * 50
    one = sample(MIXTURE.denoiser(process), process, quiet, grid, x, rows(3)).payload.x
    torch.testing.assert_close(one, sample(MIXTURE.denoiser(process), process, BUILT["heun"], grid, x, rows(3)).payload.x)


def test_moments_and_weights_are_exact() -> None:
    h = torch.logspace(-6, 1.5, 40, dtype=torch.float64)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for k in range(4):
        wanted = torch.stack([(step * torch.exp(-step * (1 - u)) * u**k).mean() for step in h])
        torch.testing.assert_close(moments(h, 4)[:, k], wanted, rtol=1e-8, atol=0)
    places = torch.tensor([1.0, 0.0, -0.7, -2.5], dtype=torch.float64).expand(40, 4)
    weights = exponential(h, places)
    cubic = 0.3 - places + 2 * places**2 + 0.5 * places**3
    wanted = moments(h, 4) @ torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close((weights * cubic).sum(1), wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        (torch.tensor([0.1, 0.9]), "must fall strictly"),
        (torch.tensor([0.9, 0.5, 0.5]), "must fall strictly"),
        (torch.tensor([0.9]), "shape"),
        (torch.tensor([[0.9, 0.1]]), "shape"),
        (torch.tensor([1.5, 0.1]), "outside"),
        (torch.tensor([0.9, math.nan]), "must fall strictly"),
    ],
)
@pytest.mark.parametrize("name", BUILT)
def test_a_bad_grid_is_refused(name: str, grid: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told) as refusal:
        BUILT[name].init(torch.randn(2, 3), VPConfig(), grid)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", BUILT)
def test_what_a_solver_does_not_admit(name: str) -> None:
    grid = KarrasConfig().build(PFGMConfig(), 4)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="float32 or float64"):
        BUILT[name].init(x.half(), VPConfig(), KarrasConfig().build(VPConfig(), 4))
    if BUILT[name].stochastic:
        with pytest.raises(ValueError, match="adds Gaussian noise"):
            BUILT[name].init(x, PFGMConfig(), grid)
    else:
        assert BUILT[name].init(x, PFGMConfig(), grid) is not None


def test_heavy_tails_reach_the_data_that_they_came_from(seed: int) -> None:
    """PFGM++'s ODE is EDM's with the estimate of its own noise, a Student t around each of three points."""
    process = PFGMConfig(dimensions=16)
    points = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]], dtype=torch.float64)

    def posterior(x: Tensor, t: Tensor) -> Tensor:
        away = (x.unsqueeze(1) - points).square().sum(2) + process.dimensions * process.sigma(t).unsqueeze(1) ** 2
        return torch.softmax(-(2 + process.dimensions) / 2 * away.log(), 1) @ points

    grid, rng = KarrasConfig().build(process, 40), rows(300, seed)
    x = sample(posterior, process, BUILT["heun"], grid, start(process, grid, (2,), rng, torch.float64), rng).payload.x
    distance, nearest = torch.cdist(x, points).min(1)
    assert float(distance.quantile(0.9)) < 1e-3
    share = torch.bincount(nearest, minlength=3) / 300
    assert bool(((share - 1 / 3).abs() < 5 * math.sqrt(2 / 9 / 300)).all())


def test_ve_and_cosine_reach_both_their_ends() -> None:
    assert float(VEConfig().sigma(torch.zeros(()))) == 0 and float(CosineConfig().alpha(torch.ones(()))) == 0
    assert LEAST < MOST and set(DETERMINISTIC) | set(STOCHASTIC) == set(BUILT)
