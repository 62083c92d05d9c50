"""DDPM's variational bound against Bayes' rule on a chain, its tightness for a Gaussian, and the variances it teaches."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fewstep.core.objective import Batch
from fewstep.core.process import Denoised
from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.decode.denoise import sample, start
from fewstep.diffusion.grids import UniformConfig
from fewstep.diffusion.processes import VPConfig
from fewstep.diffusion.solvers.ancestral import AncestralConfig
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.training.objectives.variational import VariationalConfig

STEPS = 12


def rows(seed: int, count: int) -> CounterRng:
    return CounterRng.seeded([seed]).fork(torch.zeros(count, dtype=torch.int64)).at(torch.arange(count))


def model(process: str, variance: str = "fixed", scale: float = 1.0) -> Denoiser:
    config = {"backbone": {"kind": "points", "width": 8}, "process": process, "parameterisation": "x_0", "scale": scale}
    return parse(DenoiserConfig, {**config, "variance": variance}).build().double()


def saying(network: Denoiser, estimate: Any, learned: float | None = None) -> Denoiser:
    """The same, with `estimate` of its input for x_0, and `learned` for its variance."""

    def outputs(inputs: Tensor, c_noise: Tensor, label: Any = None, told: Any = None) -> tuple[Tensor, Tensor | None]:
        return estimate(inputs, c_noise), None if learned is None else torch.full_like(inputs, learned)

    network.network = outputs  # type: ignore[method-assign]
    return network


def batch(x: Tensor) -> Batch:
    return Batch(torch.arange(len(x))[:, None], extra={"x": x})


def by_bayes(network: Denoiser, x_0: Tensor, seed: int, log_share: float) -> Tensor:
    """[B,2] nats of the steps that the objective draws: posteriors multiplied out, divergences by torch.

    A step's variance lies at `log_share` between the posterior's and the forward step's, on the log scale.
    """
    process, rng = network.process, rows(seed, len(x_0))
    j = 1 + (rng.split("time").uniform() * STEPS).floor().double()
    eps = process.noise((2,), rng.split("noise"))

    def levels(j: Tensor) -> tuple[Tensor, Tensor]:
        return process.alpha(j / STEPS)[:, None], process.sigma(j / STEPS)[:, None]

    def posterior(j: Tensor, x_t: Tensor, data: Tensor) -> tuple[Normal, Tensor]:
        (alpha, sigma), (alpha_s, sigma_s) = levels(j), levels(j - 1)
        kept = alpha / alpha_s
        forward = sigma**2 - (kept * sigma_s) ** 2
        precision = kept**2 / forward + 1 / sigma_s**2
        mean = (kept * x_t / forward + alpha_s * data / sigma_s**2) / precision
        return Normal(mean, precision.rsqrt()), forward

    alpha, sigma = levels(j)
    x_t = alpha * x_0 + sigma * eps
    estimate = network.network(x_t, j / STEPS)[0]
    inner = j.clamp(min=2)
    (true, forward), (guessed, _) = posterior(inner, x_t, x_0), posterior(inner, x_t, estimate)
    small = torch.where(j[:, None] == 1, posterior(inner, x_t, x_0)[0].variance, true.variance)
    large = torch.where(j[:, None] == 1, sigma**2, forward)
    variance = small ** (1 - log_share) * large**log_share
    inside = kl_divergence(true, Normal(guessed.mean, variance.sqrt()))
    return torch.where(j[:, None] == 1, -Normal(estimate, variance.sqrt()).log_prob(x_0), inside)


def prior(network: Denoiser, x_0: Tensor) -> Tensor:
    one = torch.ones(1, dtype=torch.float64)
    alpha, sigma = network.process.alpha(one), network.process.sigma(one)
    return kl_divergence(Normal(alpha * x_0, sigma), Normal(torch.zeros(1).double(), torch.hypot(alpha, sigma)))


@pytest.mark.parametrize(("variance", "share"), [("small", 0.0), ("large", 1.0), ("learned", 0.3)])
@pytest.mark.parametrize("process", ["vp", "cosine", "ddpm", "edm"])
def test_the_bound_is_the_divergence_of_the_posteriors(process: str, variance: str, share: float, seed: int) -> None:
    x_0, learned = rows(seed, 200).split("x").normal(2), None if variance != "learned" else 2 * share - 1
    network = saying(model(process, "learned" if variance == "learned" else "fixed"), lambda x, c: 0.3 * x.tanh(), learned)
    config = {"steps": STEPS, **({} if variance == "learned" else {"variance": variance})}
    found = parse(VariationalConfig, config).build().loss(network, batch(x_0), rows(seed, 200))
    wanted = (STEPS * by_bayes(network, x_0, seed, share) + prior(network, x_0)).mean()
    torch.testing.assert_close(found.value, wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.metrics["bits_per_dim"], wanted / math.log(2), rtol=1e-8, atol=1e-8)


def test_the_weight_is_half_the_fall_of_the_signal_to_noise_ratio(seed: int) -> None:
    """With the posterior's variance; the last step, a density, has another form."""
    network, x_0 = saying(model("vp"), lambda x, c: 0.3 * x.tanh()), rows(seed, 400).split("x").normal(2)
    j = 1 + (rows(seed, 400).split("time").uniform() * STEPS).floor().double()
    kept = (j > 1).nonzero()[:, 0]
    rng, t = rows(seed, 400).fork(kept), j[kept] / STEPS
    found = VariationalConfig(steps=STEPS, variance="small").build().loss(network, batch(x_0[kept]), rng).value
    alpha, sigma = network.process.alpha(t), network.process.sigma(t)
    x_t = alpha[:, None] * x_0[kept] + sigma[:, None] * network.process.noise((2,), rng.split("noise"))
    off = (0.3 * x_t.tanh() - x_0[kept]).square().mean(1)
    fall = (network.process.alpha(t - 1 / STEPS) / network.process.sigma(t - 1 / STEPS)) ** 2 - (alpha / sigma) ** 2
    wanted = (STEPS * fall / 2 * off).mean() + prior(network, x_0[kept]).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_the_bound_is_tight_for_a_unit_gaussian(seed: int) -> None:
    """Its reverse steps are Gaussian with the forward step's variance, so that the exact model's bound is the entropy."""
    count = 20_000
    x_0 = rows(seed, count).split("x").normal(2)
    process = VPConfig()
    network = saying(model("vp"), lambda x, c: process.alpha(c)[:, None] * x)
    parts = [
        VariationalConfig(steps=4).build().loss(network, batch(x_0[part]), rows(seed, count).fork(part)).value
        for part in torch.arange(count).chunk(50)
    ]
    found = torch.stack(parts)
    assert abs(float(found.mean()) - 0.5 * math.log(2 * math.pi * math.e)) < 6 * float(found.std()) / math.sqrt(50)
    assert float(found.std()) < 0.5


def test_narrow_levels_have_the_density_times_their_width(seed: int) -> None:
    x_0, width = 8 + 8 * rows(seed, 100).split("x").normal(2), 1e-3
    data = saying(model("vp", scale=8.0), lambda x, c: 0.3 * x.tanh())
    density, mass = (
        VariationalConfig(steps=1 + 1, level=level).build().loss(data, batch(x_0), rows(seed, 100)) for level in (None, width)
    )
    last = (rows(seed, 100).split("time").uniform() < 0.5).double().mean()
    shift = 2 * float(last) * math.log(width / 8) + math.log(8)  # of the rows whose step is the last, which count twice
    assert float(density.value - mass.value) == pytest.approx(shift, rel=1e-4)


def test_variances_are_taught_and_sampled(seed: int) -> None:
    """For a unit Gaussian the greatest variance is right; the hybrid loss moves the variance alone through its bound."""
    process, x_0 = VPConfig(), rows(seed, 2000).split("x").normal(2)

    def exact(x: Tensor, c: Tensor) -> Tensor:
        return process.alpha(c)[:, None] * x

    aim = VariationalConfig(steps=STEPS).build()
    small, middle, large = (
        float(aim.loss(saying(model("vp", "learned"), exact, v), batch(x_0), rows(seed, 2000)).value) for v in (-1.0, 0.0, 1.0)
    )
    assert large < middle < small
    network = model("vp", "learned")
    with torch.no_grad():
        network.backbone.out.weight.normal_()  # type: ignore[operator, union-attr]
    losses = [
        VariationalConfig(steps=STEPS, loss="hybrid", share=s).build().loss(network, batch(x_0), rows(seed, 2000))
        for s in (1e-9, 1e3)
    ]
    means, variances = zip(
        *(torch.autograd.grad(loss.value, network.backbone.out.weight)[0].chunk(2) for loss in losses), strict=True
    )  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(means[0], means[1])
    assert float(variances[1].abs().max()) > 1e3 * float(variances[0].abs().max()) > 0


@pytest.mark.parametrize("learned", [-1.7, 0.4, 1.7])
def test_a_learned_variance_reaches_the_sampler(learned: float, seed: int) -> None:
    """Also beyond its two ends, which nothing keeps a network inside of; the last step has none."""
    network = saying(model("vp", "learned"), lambda x, c: 0.3 * x.tanh(), learned)
    grid, rng = UniformConfig().build(network.process, 5), rows(seed, 3)
    x = start(network.process, grid, (2,), rng, torch.float64)
    seen = network.denoiser()(x, grid[0].expand(3))
    assert isinstance(seen, Denoised) and seen.variance is not None
    torch.testing.assert_close(seen.variance, torch.full_like(x, (1 + learned) / 2))
    ended = sample(network.denoiser(), network.process, AncestralConfig(variance="learned").build(), grid, x, rng).payload
    assert bool(ended.x.isfinite().all())
    torch.testing.assert_close(ended.x, ended.denoised)
