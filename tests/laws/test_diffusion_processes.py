"""The laws of a process: what its time, its rates and its parameterisations promise, for every registered one."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fewstep.core.process import Process
from fewstep.core.random import CounterRng
from fewstep.diffusion.mixture import Mixture
from fewstep.diffusion.parameterisations import PARAMETERISATIONS, ParameterisationConfig, Point, convert
from fewstep.diffusion.processes import PROCESSES, DDPMConfig, Defined, PFGMConfig, VEConfig, diffuse, rates, ratio, translate

SUBJECTS: dict[str, Process] = {
    **{name: config() for name, config in PROCESSES.items()},
    "ddpm-cosine": DDPMConfig(schedule="cosine"),
    "ddpm-root-linear": DDPMConfig(schedule="root-linear", beta_min=0.00085, beta_max=0.012),
    "defined": Defined(lambda t: 1 - t**2, lambda t: t**1.5),
}
MODELS: dict[str, ParameterisationConfig] = {name: config() for name, config in PARAMETERISATIONS.items()}


def inside(process: Process, seed: int, count: int = 16) -> Tensor:
    """Random times within the span, where the log-SNR is finite."""
    low, high = max(process.span[0], 1e-4), min(process.span[1], 1 - 1e-4)
    return low + (high - low) * CounterRng.seeded([seed]).uniform(count)[0]


@pytest.mark.parametrize("name", SUBJECTS)
def test_time_is_the_inverse_of_the_ratio(name: str) -> None:
    process = SUBJECTS[name]
    t = torch.cat((torch.logspace(-9, 0, 400, dtype=torch.float64), 1 - torch.logspace(-9, -1, 100, dtype=torch.float64)))
    noise = ratio(process, t)
    again = ratio(process, process.time(noise))
    assert torch.equal(torch.isinf(noise), torch.isinf(again))
    torch.testing.assert_close(again[torch.isfinite(noise)], noise[torch.isfinite(noise)], rtol=3e-7, atol=0)
    middle = (noise > 0.01) & (noise < 100)
    torch.testing.assert_close(process.time(noise)[middle], t[middle], rtol=0, atol=1e-12)
    assert float(process.time(t.new_zeros(()))) == 0 and float(process.sigma(t.new_zeros(()))) == 0
    assert bool((ratio(process, torch.linspace(0, 1, 300, dtype=torch.float64)).diff() > 0).all())


@pytest.mark.parametrize("name", SUBJECTS)
def test_rates_are_derivatives(name: str, seed: int) -> None:
    process = SUBJECTS[name]
    step, chain = 1e-6, isinstance(process, DDPMConfig)
    t = inside(process, seed).clamp(0.01, 0.99)
    t = ((t * 1000).floor() + 0.5) / 1000 if chain else t  # a chain's rate jumps at its steps
    for rate, function in zip(rates(process, t), (process.alpha, process.sigma), strict=True):
        differences = (function(t + step) - function(t - step)) / (2 * step)
        torch.testing.assert_close(rate, differences, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("t", [-0.1, 1.0001, math.nan])
def test_a_time_outside_is_refused(name: str, t: float) -> None:
    for function in (SUBJECTS[name].alpha, SUBJECTS[name].sigma):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]; "):
            function(torch.tensor([0.5, t]))


@pytest.mark.parametrize(
    ("name", "wrong"), [("ve", 0.005), ("ve", 51.0), ("edm", 81.0), ("vp", 1e6), ("edm", -1.0), ("flow", math.nan)]
)
def test_a_ratio_that_is_never_reached_is_refused(name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match="sigma / alpha of this process"):
        SUBJECTS[name].time(torch.tensor([wrong]))


def test_a_chain_is_ddpms() -> None:
    config = DDPMConfig()
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(config.alpha(t), (1 - beta).cumprod(0).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(config.sigma(t), (1 - (1 - beta).cumprod(0)).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("alpha", "sigma"),
    [(lambda t: 1 - t, lambda t: t + 0.1), (lambda t: 1 - t, lambda t: t * (1 - t)), (lambda t: 1 - 2 * t, lambda t: t)],
)
def test_what_is_no_process_is_refused(alpha, sigma) -> None:
    with pytest.raises(ValueError, match="alpha_of, sigma_of"):
        Defined(alpha, sigma)


def test_noise_belongs_to_its_row(seed: int) -> None:
    rng = CounterRng.seeded([seed, seed + 1, seed + 2])
    for process in SUBJECTS.values():
        assert torch.equal(process.noise((3, 2), rng)[1:2], process.noise((3, 2), rng.fork(torch.tensor([1]))))


def test_heavy_tails_have_the_law_of_the_paper(seed: int) -> None:
    """|noise|^2 / (D + |noise|^2) is Beta(N/2, D/2): its mean and variance, at 4.5 standard errors."""
    n, d, rows = 3, 5, 4000
    noise = PFGMConfig(dimensions=d).noise((n,), CounterRng.seeded(range(seed, seed + rows)))
    share = noise.square().sum(1) / (d + noise.square().sum(1))
    a, b = n / 2, d / 2
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    assert abs(float(share.mean()) - a / (a + b)) < 4.5 * math.sqrt(variance / rows)
    assert abs(float(share.var()) / variance - 1) < 4.5 * math.sqrt(2 / rows)  # a Beta's kurtosis is below a Gaussian's


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("model", MODELS)
def test_the_target_gives_back_the_data(name: str, model: str, seed: int) -> None:
    process, config = SUBJECTS[name], MODELS[model]
    t, rng = inside(process, seed), CounterRng.seeded([seed])
    x_0, eps = rng.normal(16, 3)[0], rng.split("eps").normal(16, 3)[0]
    made = config.example(process, x_0, t, eps)
    torch.testing.assert_close(made.x_t, diffuse(process, x_0, t, eps))
    seen: list[Sequence[Tensor]] = []

    def network(x: Tensor, c_noise: Tensor) -> Tensor:
        seen.append((x, c_noise))
        return made.target

    found = config.denoiser(network, process)(made.x_t, t)
    scale = 1 + ratio(process, t).max()
    torch.testing.assert_close(found / scale, x_0 / scale, rtol=0, atol=1e-12)
    assert torch.equal(seen[0][0], made.inputs) and torch.equal(seen[0][1], made.c_noise)
    assert bool((made.weight > 0).all())


@pytest.mark.parametrize("name", SUBJECTS)
def test_conversions_between_any_two_are_exact(name: str, seed: int) -> None:
    process = SUBJECTS[name]
    t, rng = inside(process, seed).clamp(0.02, 0.9), CounterRng.seeded([seed])
    x_0, eps = rng.normal(16, 3)[0], rng.split("eps").normal(16, 3)[0]
    at = Point(process, t)
    made = {key: config.example(process, x_0, t, eps) for key, config in MODELS.items()}
    for source in MODELS:
        for target in MODELS:
            found = convert(made[source].target, made[source].x_t, at, MODELS[source], MODELS[target])
            size = made[target].target.abs().max()
            torch.testing.assert_close(found / size, made[target].target / size, rtol=0, atol=1e-9)


def test_rows_of_the_unification_table(seed: int) -> None:
    """v is EDM with unit data and the sign turned; flow matching's velocity is eps - x_0; logit t is ln sigma there."""
    vp, flow = SUBJECTS["vp"], SUBJECTS["flow"]
    rng = CounterRng.seeded([seed])
    x_0, eps, t = rng.normal(8, 2)[0], rng.split("eps").normal(8, 2)[0], inside(vp, seed, 8)
    v = MODELS["v"].example(vp, x_0, t, eps).target
    edm = PARAMETERISATIONS["edm"](sigma_data=1.0).example(vp, x_0, t, eps).target  # type: ignore[call-arg, attr-defined]
    torch.testing.assert_close(v, -edm, rtol=0, atol=1e-12)
    torch.testing.assert_close(MODELS["velocity"].example(flow, x_0, t, eps).target, eps - x_0)
    torch.testing.assert_close(torch.logit(t), ratio(flow, t).log())


def test_edms_scales_are_those_of_table_1() -> None:
    sigma = torch.tensor([0.01, 0.5, 40.0], dtype=torch.float64)
    edm, config = SUBJECTS["edm"], PARAMETERISATIONS["edm"]()
    c_skip, c_out = config.unmix(Point(edm, edm.time(sigma)))  # type: ignore[attr-defined]
    torch.testing.assert_close(c_skip, 0.25 / (sigma**2 + 0.25))
    torch.testing.assert_close(c_out, sigma * 0.5 / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(config.c_noise(Point(edm, edm.time(sigma))), sigma.log() / 4)  # type: ignore[attr-defined]


def test_a_consistency_model_is_the_identity_at_the_least_noise() -> None:
    edm, x = SUBJECTS["edm"], torch.randn(4, 2, dtype=torch.float64)
    found = MODELS["consistency"].denoiser(lambda x, c: torch.full_like(x, 7.0), edm)(
        x, edm.time(torch.full((4,), 0.002)).double()
    )
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trained", SUBJECTS)
@pytest.mark.parametrize("sampled", SUBJECTS)
def test_a_model_of_one_process_is_one_of_any_other(trained: str, sampled: str, seed: int) -> None:
    mixture = Mixture.drawn(seed)
    own, other = SUBJECTS[trained], SUBJECTS[sampled]
    t = other.time(torch.exp(torch.linspace(math.log(0.05), math.log(8.0), 9, dtype=torch.float64)))
    x = torch.randn(9, 2, dtype=torch.float64) * torch.hypot(other.alpha(t), other.sigma(t)).unsqueeze(1)
    found = translate(mixture.denoiser(own), own, other)(x, t)
    torch.testing.assert_close(found, mixture.denoiser(other)(x, t), rtol=1e-9, atol=1e-9)


def test_pure_noise_can_be_translated_and_what_was_never_seen_cannot() -> None:
    flow, cosine, last = SUBJECTS["flow"], SUBJECTS["cosine"], torch.ones(3)
    x = torch.randn(3, 2, dtype=torch.float64)
    same = translate(lambda x, t: x, cosine, flow)(x, last)
    torch.testing.assert_close(same, x)
    with pytest.raises(ValueError, match="move the grid inside"):
        translate(lambda x, t: x, VEConfig(), flow)(x, last)
