"""Denoising score matching: what it is least for, which times and noise it draws, and whose draws they are."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.diffusion.parameterisations import PARAMETERISATIONS
from fewstep.diffusion.processes import PROCESSES
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.nn.backbones import PointsConfig
from fewstep.training.objectives.denoising import DenoisingConfig

SMALL = PointsConfig(width=8, depth=1)
PARTS = [(process, "edm") for process in PROCESSES] + [("flow", name) for name in PARAMETERISATIONS if name != "consistency"]


def denoiser(seed: int, process: str = "edm", parameterisation: str = "edm", **fields: Any) -> Denoiser:
    torch.manual_seed(seed)
    config = {"backbone": SMALL, "process": process, "parameterisation": parameterisation, **fields}
    model = parse(DenoiserConfig, config).build().double()
    with torch.no_grad():
        model.backbone.out.weight.normal_()
    return model


def batch(count: int, classes: int = 0) -> Batch:
    x = torch.randn(count, 2, dtype=torch.float64)
    c = {"c": torch.nn.functional.one_hot(torch.arange(count) % classes, classes).double()} if classes else {}
    return Batch(torch.arange(count)[:, None], extra={"x": x, **c})


def rows(seed: int, count: int) -> CounterRng:
    return CounterRng.seeded(range(seed, seed + count))


@pytest.mark.parametrize(("process", "parameterisation"), PARTS)
def test_the_loss_is_least_for_the_expectation_of_the_data(process: str, parameterisation: str, seed: int) -> None:
    """Data are Gaussian, so that E[x_0 | x_t] is known: leaning from it either way costs as much as a square does."""
    model = denoiser(seed, process, parameterisation)
    if not model.process.gaussian:
        pytest.skip("its noise is not Gaussian: the expectation has another form")
    data, objective = 0.7 * batch(4000).extra["x"] + 0.3, DenoisingConfig(times="uniform").build()
    seen: list[tuple[Tensor, Tensor]] = []

    def leaning(by: float) -> float:
        def network(inputs: Tensor, c_noise: Tensor, label: Any = None, told: Any = None) -> Any:
            at, x_t = seen[0]
            return exact(at, x_t) + by, None

        model.network = network  # type: ignore[method-assign]
        return float(objective.loss(model, Batch(torch.zeros(len(data), 1), extra={"x": data}), rows(seed, len(data))).value)

    def exact(t: Tensor, x_t: Tensor) -> Tensor:
        alpha, sigma = model.process.alpha(t)[:, None], model.process.sigma(t)[:, None]
        mean = 0.3 + alpha * 0.49 / (alpha**2 * 0.49 + sigma**2) * (x_t - alpha * 0.3)
        eps = (x_t - alpha * mean) / sigma
        from_data = model.parameterisation.example(model.process, mean, t, eps)
        return from_data.target

    def spied(process: Any, x_0: Tensor, t: Tensor, eps: Tensor) -> Any:
        made = original(process, x_0, t, eps)
        seen[:] = [(t, made.x_t)]
        return made

    original = model.parameterisation.example
    object.__setattr__(model, "parameterisation", _Spied(model.parameterisation, spied))
    less, least, more = (leaning(by) for by in (-0.3, 0.0, 0.3))
    assert least < less and least < more
    slope, bend = (more - less) / 0.6, (more + less - 2 * least) / 0.09
    assert abs(slope) < 0.2 * bend


class _Spied:
    """A parameterisation whose examples are seen by the test."""

    def __init__(self, inner: Any, example: Any) -> None:
        self._inner, self.example = inner, example


def test_times_follow_their_laws() -> None:
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    edm, flow = PROCESSES["edm"]().build(), PROCESSES["flow"]().build()
    log_ratio = torch.log(edm.sigma(DenoisingConfig().drawn(edm, uniform)))
    assert float(log_ratio.mean()) == pytest.approx(-1.2, abs=0.01) and float(log_ratio.std()) == pytest.approx(1.2, rel=0.01)
    logit = torch.logit(DenoisingConfig(location=0.0, spread=1.0).drawn(flow, uniform))
    assert float(logit.mean()) == pytest.approx(0, abs=0.01) and float(logit.std()) == pytest.approx(1, rel=0.01)
    assert torch.allclose(DenoisingConfig(times="uniform").drawn(flow, uniform), uniform)
    even = torch.log(edm.sigma(DenoisingConfig(times="log-uniform").drawn(edm, uniform)))
    assert torch.allclose(even, math.log(0.002) + math.log(80 / 0.002) * uniform)
    levels = torch.log(edm.sigma(DenoisingConfig(times="levels", levels=5).drawn(edm, uniform)))
    wanted = math.log(0.002) + math.log(80 / 0.002) * torch.arange(5).double() / 4
    assert torch.allclose(levels.unique(), wanted) and torch.equal(levels, levels.sort().values)
    mode = DenoisingConfig(times="mode", spread=1.29).drawn(flow, uniform)
    assert bool((mode.diff() < 0).all()) and float(mode[0]) > 0.999 and float(mode[-1]) < 0.001
    middle = ((mode > 0.25) & (mode < 0.75)).double().mean()
    assert float(middle) > 0.5 + 0.1  # which is what the law is for


@pytest.mark.parametrize("times", ["uniform", "log-normal", "log-uniform", "levels", "mode"])
@pytest.mark.parametrize("process", list(PROCESSES))
def test_times_lie_in_the_span(times: Any, process: str) -> None:
    made = PROCESSES[process]().build()
    uniform = torch.tensor([0.0, 1e-9, 0.5, 1 - 1e-9], dtype=torch.float64)
    t = DenoisingConfig(times=times, spread=1.0).drawn(made, uniform)
    assert bool(((t >= made.span[0]) & (t <= made.span[1])).all())


def test_a_row_draws_for_itself(seed: int) -> None:
    model, data = denoiser(seed), batch(5)
    objective = DenoisingConfig().build()
    together = objective.loss(model, data, rows(seed, 5)).value
    alone = [
        objective.loss(model, Batch(data.tokens[i : i + 1], extra={"x": data.extra["x"][i : i + 1]}), rows(seed + i, 1)).value
        for i in range(5)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-10, atol=1e-12)


def test_optimal_pairs_are_the_nearest(seed: int) -> None:
    """Along straight lines, what data and noise are apart is the velocity: its mean square falls, and no noise is lost."""
    model = denoiser(seed, "flow", "velocity")
    data, found = batch(64), dict[str, Tensor]()

    def network(inputs: Tensor, c_noise: Tensor, label: Any = None, told: Any = None) -> Any:
        return torch.zeros_like(inputs), None

    model.network = network  # type: ignore[method-assign]
    for pairing in ("independent", "optimal"):
        config = parse(DenoisingConfig, {"pairing": pairing, "times": "uniform"})
        found[pairing] = config.build().loss(model, data, rows(seed, 64)).value
    eps = model.process.noise((2,), rows(seed, 64).split("noise"))
    sides = data.extra["x"].square().mean() + eps.square().mean()
    assert found["optimal"] < 0.6 * found["independent"]
    matched = (sides - found["optimal"]) / 2  # the mean product: no matching has a larger one than sorting by one axis gives
    order = torch.argsort(torch.argsort(data.extra["x"][:, 0]))
    by_one_axis = (data.extra["x"] * eps[eps[:, 0].argsort()][order]).mean()
    assert matched >= by_one_axis


def test_classes_are_withheld_in_training_only(seed: int) -> None:
    model, data = denoiser(seed, classes=3), batch(2000, 3)
    told: list[Tensor] = []
    inner = model.network

    def network(inputs: Tensor, c_noise: Tensor, label: Tensor | None = None, more: Any = None) -> Any:
        assert label is not None
        told.append(label)
        return inner(inputs, c_noise, label)

    model.network = network  # type: ignore[method-assign]
    for training in (True, False):
        model.train(training)
        DenoisingConfig(unlabelled=0.25).build().loss(model, data, rows(seed, 2000))
    withheld = float((told[0] == -1).double().mean())
    assert abs(withheld - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2000)
    assert torch.equal(told[1], torch.arange(2000) % 3) and torch.equal(told[0][told[0] >= 0], told[1][told[0] >= 0])


def test_gradients_and_units(seed: int) -> None:
    model, data = denoiser(seed, centre=0.5, scale=2.0), batch(3)
    weight = model.backbone.layers[0].weight

    def value(w: Tensor) -> Tensor:
        swapped = {**dict(model.named_parameters()), "backbone.layers.0.weight": w}
        objective = DenoisingConfig().build()
        return torch.func.functional_call(_Lossy(model, objective, data, seed), {f"model.{k}": v for k, v in swapped.items()}, ())

    assert torch.autograd.gradcheck(value, (weight.detach().clone().requires_grad_(),))
    x = data.extra["x"]
    torch.testing.assert_close(model.unnormed(model.normed(x)), x)
    torch.testing.assert_close(model.normed(x), (x - 0.5) / 2)


class _Lossy(torch.nn.Module):
    def __init__(self, model: Denoiser, objective: Any, data: Batch, seed: int) -> None:
        super().__init__()
        self.model, self._told = model, (objective, data, seed)

    def forward(self) -> Tensor:
        objective, data, seed = self._told
        value: Tensor = objective.loss(self.model, data, rows(seed, len(data.tokens))).value
        return value


def test_what_cannot_be_learnt_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"^batch: no 'x'; [^\n]*$"):
        DenoisingConfig().build().loss(denoiser(seed), Batch(torch.zeros(2, 1)), rows(seed, 2))
    with pytest.raises(ValueError, match=r"^batch: no 'c'; [^\n]*$"):
        DenoisingConfig().build().loss(denoiser(seed, classes=2), batch(2), rows(seed, 2))
    with pytest.raises(ValueError, match=r"^spread=2\.0: [^\n]*; lower it$"):
        parse(DenoisingConfig, {"times": "mode", "spread": 2.0})
    with pytest.raises(ValueError, match=r"^objective state \['a'\]: [^\n]*$"):
        DenoisingConfig().build().load_state_dict({"a": 1})
