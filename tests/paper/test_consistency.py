"""Consistency models: the function that is the same all along the ODE, what teaches it, and the sampler of several steps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.core.process import Denoise, Process
from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.decode.denoise import sample, start
from fewstep.diffusion.grids import KarrasConfig
from fewstep.diffusion.mixture import Mixture
from fewstep.diffusion.parameterisations import Point
from fewstep.diffusion.processes import PROCESSES, EDMConfig
from fewstep.diffusion.solvers.consistency import ConsistencySamplerConfig
from fewstep.diffusion.solvers.ode import DEISConfig
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.training.objectives.consistency import ConsistencyObjectiveConfig

LEAST = 0.05  # the least noise of the tests' parameterisation, so that little noise does not dominate
MEAN, DEVIATION = 0.4, 0.8
MIXTURE = Mixture(torch.tensor([[1.0, 0.0], [-0.8, 0.5]]), torch.tensor([0.3, 0.4]), torch.tensor([0.4, 0.6]))


def rows(seed: int, count: int) -> CounterRng:
    return CounterRng.seeded(range(seed, seed + count))


def student(seed: int = 0, **fields: Any) -> Denoiser:
    torch.manual_seed(seed)
    parameterisation = {"kind": "consistency", "sigma_min": LEAST}
    config = {"backbone": {"kind": "points", "width": 8, "depth": 1}, "parameterisation": parameterisation, **fields}
    made = parse(DenoiserConfig, config).build().double()
    with torch.no_grad():
        made.backbone.out.weight.normal_()  # type: ignore[operator, union-attr]
    return made


class Knowing(torch.nn.Module):
    """A student whose estimate is a function of (x, t), and `wrong` times t more."""

    def __init__(self, function: Denoise, wrong: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(wrong, dtype=torch.float64))
        inner = student()
        self.process, self.parameterisation, self.classes, self.config = inner.process, inner.parameterisation, 0, inner.config
        self._function = function

    def normed(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        found = self._function(x, t)
        assert isinstance(found, Tensor)
        return found + self.weight * t[:, None]


class Told(torch.nn.Module):
    """A teacher that knows the mixture."""

    def denoiser(self, label: Tensor | None = None, process: Process | None = None) -> Denoise:
        assert process is not None
        return MIXTURE.denoiser(process)


def ended(x: Tensor, t: Tensor) -> Tensor:
    """Where the mixture's ODE ends from x at t: at the least noise. Solved finely."""
    process = EDMConfig()
    place = torch.linspace(0, 1, 61, dtype=torch.float64)
    logs = torch.lerp(process.sigma(t).log()[:, None], torch.tensor(math.log(LEAST)).double(), place)
    grid = process.time(logs.exp())
    still = process.sigma(t) <= LEAST * (1 + 1e-9)
    grid = torch.where(still[:, None], torch.lerp(torch.tensor(0.5).double(), torch.tensor(0.4).double(), place), grid)
    carried = sample(MIXTURE.denoiser(process), process, DEISConfig().build(), grid, x, rows(0, len(x))).payload.x
    return torch.where(still[:, None], x, carried)


def batch(x: Tensor) -> Batch:
    return Batch(torch.arange(len(x))[:, None], extra={"x": x})


def test_the_function_of_the_ode_is_what_distillation_is_least_for(seed: int) -> None:
    """On a mixture in closed form: its consistency function loses next to nothing, and less with finer steps of the teacher."""
    data = batch(MIXTURE.sample(24, seed))

    def lost(steps: int, wrong: float = 0.0) -> float:
        aim = parse(ConsistencyObjectiveConfig, {"steps": steps}).build(Told())  # type: ignore[arg-type]
        return float(aim.loss(Knowing(ended, wrong), data, rows(seed, 24)).value.detach())

    coarse, fine = lost(12), lost(96)
    assert fine < 1e-4 and fine < 0.1 * coarse
    assert lost(96, wrong=10.0) > 100 * fine


def test_the_estimate_at_the_least_noise_is_x(seed: int) -> None:
    network, x = student(seed), torch.randn(5, 2, dtype=torch.float64)
    t = network.process.time(torch.full((5,), LEAST, dtype=torch.float64))
    torch.testing.assert_close(network(x, t), x, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(network(x, 2 * t), x, atol=1e-4)


@pytest.mark.parametrize("process", ["edm", "vp", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_sampler_has_the_law_of_the_data_in_any_number_of_steps(process: str, steps: int, seed: int) -> None:
    """With the exact function of a Gaussian, on every process; the moments lie within 6 standard errors."""
    own, count = PROCESSES[process](), 3000
    kept = math.hypot(DEVIATION, LEAST)

    def function(x: Tensor, t: Tensor) -> Tensor:
        at = Point(own, t)
        z, ratio = x / at.alpha[:, None], at.ratio[:, None]
        return MEAN + (z - MEAN) * kept / torch.hypot(ratio, torch.full_like(ratio, DEVIATION))

    ratios = torch.cat((torch.logspace(1.9, -0.5, steps).double(), torch.zeros(1).double()))
    grid, calls = own.time(ratios), []
    rng = CounterRng.seeded([seed]).fork(torch.zeros(count, dtype=torch.int64)).at(torch.arange(count))
    x = start(own, grid, (1,), rng, torch.float64) + own.alpha(grid[0]) * (MEAN + DEVIATION * rng.split("x").normal(1))
    event = sample(function, own, ConsistencySamplerConfig(sigma_min=LEAST).build(), grid, x, rng)
    found, calls = event.payload.x[:, 0], event.cost.calls
    assert calls == steps * count
    assert abs(float(found.mean()) - MEAN) < 6 * kept / math.sqrt(count)
    assert abs(float(found.var()) - kept**2) < 6 * kept**2 * math.sqrt(2 / count)


def test_the_target_is_the_average_and_gets_no_gradient(seed: int) -> None:
    """It moves with the decay, and the loss is that of the cleaner end against it, whose own weights do not matter."""
    network, data = student(seed), batch(MIXTURE.sample(16, seed))
    aim = parse(ConsistencyObjectiveConfig, {"decay": 0.75}).build()
    weight = network.backbone.out.weight  # type: ignore[union-attr]
    seen = []
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            weight.fill_(value)  # type: ignore[operator]
        aim.after_step(network)
        seen.append(float(aim.state_dict()["average"]["backbone.out.weight"][0, 0]))
    assert seen == [1.0, 1.25, 0.75 * 1.25 + 0.25 * 4]
    before = aim.loss(network, data, rows(seed, 16)).value
    other = parse(ConsistencyObjectiveConfig, {"decay": 0.75}).build()
    other.load_state_dict(aim.state_dict())
    torch.testing.assert_close(other.loss(network, data, rows(seed, 16)).value, before, rtol=0, atol=0)
    own = parse(ConsistencyObjectiveConfig, {"decay": 0.0}).build()
    own.after_step(network)
    assert not own.state_dict()["average"]
    assert not torch.allclose(own.loss(network, data, rows(seed, 16)).value, before)
    (gradient,) = torch.autograd.grad(before, weight)
    with torch.no_grad():
        weight.add_(1e-6)  # type: ignore[operator]
        up = aim.loss(network, data, rows(seed, 16)).value
        weight.add_(-2e-6)  # type: ignore[operator]
        down = aim.loss(network, data, rows(seed, 16)).value
    assert float((up - down) / 2e-6) == pytest.approx(float(gradient.sum()), rel=1e-4)


def test_the_grid_doubles_on_schedule(seed: int) -> None:
    network, data = student(seed), batch(MIXTURE.sample(4, seed))
    aim = parse(ConsistencyObjectiveConfig, {"steps": 3, "most": 10, "double_every": 2}).build()
    found = []
    for _ in range(8):
        found.append(int(aim.loss(network, data, rows(seed, 4)).metrics["steps"]))
        aim.after_step(network)
    assert found == [3, 3, 6, 6, 10, 10, 10, 10]


def test_steps_are_drawn_as_told() -> None:
    process, uniform = EDMConfig(), (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    grid = KarrasConfig(to_zero=False).build(process, 12)
    even = torch.bincount(ConsistencyObjectiveConfig().drawn(process, grid, uniform), minlength=12)
    assert int(even.max() - even.min()) <= 1
    config = ConsistencyObjectiveConfig(times="log-normal", location=-1.0, spread=0.7)
    found = torch.bincount(config.drawn(process, grid, uniform), minlength=12) / 100_000
    law = torch.distributions.Normal(-1.0, 0.7)
    mass = law.cdf(process.sigma(grid[:-1]).log()) - law.cdf(process.sigma(grid[1:]).log())
    torch.testing.assert_close(found.double(), mass / mass.sum(), rtol=0, atol=1e-4)
