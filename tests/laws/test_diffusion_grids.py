"""The laws of a grid: it falls from the first ratio to the last on every process; a learned one beats where it started."""

import pytest
import torch
from solved import MIXTURE, SMOOTH, rows

from fewstep.diffusion.grids import GRIDS, CosineGridConfig, KarrasConfig, LearnedConfig, LogSNRConfig, UniformConfig
from fewstep.diffusion.learned import LEAST, MOST, SOLVER, Family, Fit, error, fit_grid, mixed, task, together
from fewstep.diffusion.mixture import Mixture
from fewstep.diffusion.processes import CosineConfig, EDMConfig, FlowConfig, VEConfig, VPConfig, ratio
from fewstep.diffusion.solvers.ode import DEISConfig
from fewstep.diffusion.solvers.sde import DDIMConfig
from fewstep.diffusion.solvers.unipc import UniPCConfig

FIXED = [name for name in GRIDS if name != "learned"]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("key", SMOOTH)
@pytest.mark.parametrize("zero", [True, False])
def test_a_grid_falls_between_its_ends(name: str, key: str, zero: bool) -> None:
    process = SMOOTH[key]
    for steps in (2, 3, 30):
        grid = GRIDS[name](to_zero=zero).build(process, steps)  # type: ignore[attr-defined, call-arg]
        assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
        assert bool((grid.diff() < 0).all()) and (float(grid[-1]) == 0) == zero
        noise = ratio(process, grid)
        assert 1 < float(noise[0]) <= 80 * (1 + 1e-9) and float(noise[-2 if zero else -1]) < 0.02
    exact = GRIDS[name](most=20.0, least=0.1, to_zero=False).build(process, 7)  # type: ignore[attr-defined, call-arg]
    torch.testing.assert_close(ratio(process, exact)[[0, -1]], torch.tensor([20.0, 0.1]).double(), rtol=1e-6, atol=0)


def test_each_grid_is_even_on_its_own_clock() -> None:
    def uneven(clock: torch.Tensor) -> float:
        return float(clock.diff().diff().abs().max() / clock.diff().abs().max())

    vp, free = VPConfig(), {"to_zero": False}
    assert uneven(UniformConfig(**free).build(vp, 9)) < 1e-6
    assert uneven(ratio(vp, KarrasConfig(rho=5.0, **free).build(vp, 9)) ** 0.2) < 1e-9
    assert uneven(ratio(vp, LogSNRConfig(**free).build(vp, 9)).log()) < 1e-9
    assert uneven(torch.atan(ratio(vp, CosineGridConfig(**free).build(vp, 9)))) < 1e-9


def test_edms_grid_is_its_papers() -> None:
    edm = EDMConfig()
    place = torch.arange(18, dtype=torch.float64) / 17
    wanted = (80 ** (1 / 7) + place * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(80 * KarrasConfig().build(edm, 18)[:-1], wanted)


def test_flow_matchings_whole_line_is_a_grid_too() -> None:
    grid = UniformConfig(most=1e300).build(FlowConfig(), 4)
    assert float(grid[0]) == 1.0 and float(grid[-1]) == 0.0
    assert float(UniformConfig(most=1e300).build(CosineConfig(), 4)[0]) == 1.0


def test_what_is_no_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        KarrasConfig().build(VPConfig(), 0)
    with pytest.raises(ValueError, match="exchange them"):
        KarrasConfig(most=0.1, least=1.0).build(VPConfig(), 4)
    with pytest.raises(ValueError, match="steps=4: a grid was learned for 2 only"):
        LearnedConfig(ratios=(50.0, 1.0, 0.0)).build(VPConfig(), 4)
    with pytest.raises(ValueError, match="steps=7: a grid was learned for 5, 8, 10, 15, 20 only"):
        LearnedConfig().build(VPConfig(), 7)
    with pytest.raises(ValueError, match="deterministic"):
        fit_grid([], VPConfig(), DDIMConfig(eta=1.0).build(), 4)


@pytest.mark.parametrize(("key", "zero"), [("edm", False), ("flow", True)])
def test_a_learned_grid_is_better_than_its_start(key: str, zero: bool) -> None:
    """On the same noise in every run: of some noise the start is a minimum already."""
    process, solver, count = SMOOTH[key], DEISConfig().build(), 16
    fit = Fit(most=20.0, least=0.05, to_zero=zero, iterations=12, rate=0.1)
    fine = LogSNRConfig(most=20.0, least=0.05, to_zero=zero).build(process, 100)
    x = rows(count).normal(2) * float(torch.hypot(process.sigma(fine[0]), process.alpha(fine[0])))
    given = task(MIXTURE.denoiser(process), process, UniPCConfig(terms=3).build(), fine, x)
    losses: list[float] = []
    found = fit_grid([given], process, solver, 5, fit, lambda n, loss: losses.append(loss))
    assert len(losses) == 13 and min(losses) < losses[0] - 0.05
    grid = found.build(process, 5)
    assert bool((grid.diff() < 0).all()) and (float(grid[-1]) == 0) == zero
    again = solver.init(x, process, grid)
    for i in range(5):
        x, again = solver.step(given.denoise, x, i, again, rows(count))
    error = (x / process.alpha(grid[-1]) - given.reference).square().mean().log()
    assert float(error) == pytest.approx(min(losses), abs=1e-5)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("key", [*SMOOTH, "ve"])
def test_shipped_grids_serve_every_process(key: str, zero: bool) -> None:
    process = VEConfig() if key == "ve" else SMOOTH[key]
    for steps in (5, 8, 10, 15, 20):
        noise = ratio(process, LearnedConfig(to_zero=zero).build(process, steps))
        assert noise.shape == (steps + 1,) and bool((noise.diff() < 0).all())
        torch.testing.assert_close(noise[[0, -1]], torch.tensor([50.0, 0.0 if zero else 0.02]).double(), rtol=1e-6, atol=0)
        twice = ratio(process, LearnedConfig(to_zero=zero, scale=0.5).build(process, steps))
        torch.testing.assert_close(twice[:-1], noise[:-1] / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("zero", [True, False])
def test_shipped_grids_keep_what_they_promise_on_unseen_mixtures(zero: bool) -> None:
    """Against the best that the same grid's ends allow without learning: DEIS and UniPC, on EDM's grid and an even one."""
    process = EDMConfig()
    given = mixed(process, zero, 3000, (Family(), Family(d=3, modes=4)), groups=6, rows=24)
    solvers = (SOLVER, DEISConfig().build(), UniPCConfig().build())
    for steps in (8, 10, 20):
        others = [
            error(given, process, solver, grid(most=MOST, least=LEAST, to_zero=zero).build(process, steps))
            for solver in solvers
            for grid in (KarrasConfig, LogSNRConfig)
        ]
        assert error(given, process, SOLVER, LearnedConfig(to_zero=zero).build(process, steps)) < 0.7 * min(others), others


def test_mixtures_together_are_those_mixtures(seed: int) -> None:
    process, made = SMOOTH["vp"], [Mixture.drawn(seed, 5, 2), Mixture.drawn(seed + 1, 3, 4, 2.0)]
    x, t = rows(6, seed).normal(4), torch.tensor([0.2, 0.5, 0.9] * 2, dtype=torch.float64)
    x[:3, 2:] = 0
    found = together(made, process)(x, t)
    torch.testing.assert_close(found[:3, :2], made[0].denoiser(process)(x[:3, :2], t[:3]))
    torch.testing.assert_close(found[3:], made[1].denoiser(process)(x[3:], t[3:]))
    assert not bool(found[:3, 2:].any())
