"""Likelihoods by the probability-flow ODE against closed-form densities, in every process, and what is built on them."""

import math

import pytest
import torch
from solved import MIXTURE, SMOOTH, rows
from torch import Tensor

from fewstep.core.process import Process
from fewstep.decode.denoise import sample
from fewstep.diffusion.grids import LogSNRConfig
from fewstep.diffusion.likelihood import Likelihood, Prior, bits_per_dim, dequantise, encode, interpolate, log_likelihood
from fewstep.diffusion.mixture import Mixture
from fewstep.diffusion.processes import EDMConfig, FlowConfig, VEConfig, VPConfig, translate
from fewstep.diffusion.solvers.unipc import UniPCConfig

MOST, LEAST = 50.0 * (1 - 1e-9), 0.01 * (1 + 1e-9)  # which every process has


def fine(process: Process, steps: int = 80, least: float = LEAST) -> Tensor:
    return LogSNRConfig(most=MOST, least=least, to_zero=False).build(process, steps)


def prior(mixture: Mixture = MIXTURE) -> Prior:
    return Prior(mixture.mean, mixture.covariance)


def test_exact_likelihood_of_a_mixture(seed: int) -> None:
    process, x = VPConfig(), MIXTURE.sample(64, seed)
    found = log_likelihood(MIXTURE.denoiser(process), process, fine(process), x, prior(), rows(64))
    assert float((found.log_prob - MIXTURE.log_prob(x, 1.0, LEAST)).abs().max()) < 5e-4
    assert float((found.log_prob - MIXTURE.log_prob(x)).abs().max()) < 2e-2  # x is taken to lie at the least noise
    assert found.calls == 4 * 80 and not found.error.any()


@pytest.mark.parametrize("key", SMOOTH)
def test_every_process_has_the_same_likelihood(key: str, seed: int) -> None:
    process, x = SMOOTH[key], MIXTURE.sample(8, seed)
    found = log_likelihood(MIXTURE.denoiser(process), process, fine(process, 6), x, prior(), rows(8)).log_prob
    edm = EDMConfig()
    wanted = log_likelihood(MIXTURE.denoiser(edm), edm, fine(edm, 6), x, prior(), rows(8)).log_prob
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


def test_at_little_noise_it_is_that_of_the_data(seed: int) -> None:
    process, x = EDMConfig(), MIXTURE.sample(32, seed)
    grid = LogSNRConfig(most=80.0, least=0.002, to_zero=False).build(process, 80)
    found = log_likelihood(MIXTURE.denoiser(process), process, grid, x, prior(), rows(32))
    assert float((found.log_prob - MIXTURE.log_prob(x)).abs().max()) < 1e-3


def test_one_model_has_one_likelihood_in_vp_ve_and_flow_matching(seed: int) -> None:
    trained, x = FlowConfig(), MIXTURE.sample(16, seed)
    found = []
    for process in (VPConfig(), VEConfig(), trained):
        denoiser = translate(MIXTURE.denoiser(trained), trained, process)
        found.append(log_likelihood(denoiser, process, fine(process, 12), x, prior(), rows(16)).log_prob)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-8)


def test_a_centred_prior_is_off_however_many_steps(seed: int) -> None:
    """So the data's moments are worth knowing."""
    off = Mixture(MIXTURE.means + 3.0, MIXTURE.deviations, MIXTURE.weights)
    process, x = EDMConfig(), off.sample(16, seed)
    plain = Prior(torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))

    def miss(law: Prior) -> float:
        found = log_likelihood(off.denoiser(process), process, fine(process, 80), x, law, rows(16))
        return float((found.log_prob - off.log_prob(x, 1.0, LEAST)).abs().max())

    assert miss(plain) > 3e-3 > 5e-4 > miss(prior(off))


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_hutchinsons_estimate_errs_as_it_says(law, seed: int) -> None:
    process, count = VPConfig(), 48
    mixture = Mixture.drawn(7, d=6)
    x, denoiser = mixture.sample(count, seed), mixture.denoiser(process)
    grid = fine(process, 24)
    exact = log_likelihood(denoiser, process, grid, x, prior(mixture), rows(count))
    guess = log_likelihood(denoiser, process, grid, x, prior(mixture), rows(count, seed), probes=24, law=law)
    misses = (guess.log_prob - exact.log_prob) / guess.error
    assert bool((guess.error > 0).all())
    assert float(misses.abs().max()) < 9  # Student t of 23 degrees of freedom: 48 rows, 2e-7
    assert float(misses.square().mean()) < 3.5


def test_one_probe_states_no_error_and_many_dimensions_need_probes() -> None:
    process, x = VPConfig(), torch.randn(2, 65)
    law = Prior(torch.zeros(65).double(), torch.eye(65).double())
    found: Likelihood = log_likelihood(lambda x, t: 0.5 * x, process, fine(process, 2), x, law, rows(2), probes=1)
    assert bool(found.error.isnan().all()) and bool(found.log_prob.isfinite().all())
    with pytest.raises(ValueError, match="give a number of probes"):
        log_likelihood(lambda x, t: 0.5 * x, process, fine(process, 2), x, law, rows(2))
    with pytest.raises(ValueError, match="to_zero=False"):
        log_likelihood(lambda x, t: x, process, torch.tensor([1.0, 0.0]), x, law, rows(2))


def test_a_latent_leads_back_to_its_data(seed: int) -> None:
    process, x = FlowConfig(), MIXTURE.sample(8, seed)
    denoiser, grid = MIXTURE.denoiser(process), fine(process, 100)
    latent = encode(denoiser, process, grid, x)
    found = sample(denoiser, process, UniPCConfig(terms=3).build(), grid, latent, rows(8)).payload.x
    torch.testing.assert_close(found / process.alpha(grid[-1]), x, rtol=0, atol=3e-4)
    same = log_likelihood(denoiser, process, grid, x, prior(), rows(8)).latent
    torch.testing.assert_close(same * process.alpha(grid[0]), latent)


def test_interpolation_keeps_the_length() -> None:
    a, b = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    path = interpolate(a, b, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[2], b)
    torch.testing.assert_close(path[1, 0], torch.full((2,), 3 / math.sqrt(2)))
    torch.testing.assert_close(path[1, 1], a[1])


def test_bits_of_uniform_levels(seed: int) -> None:
    """Data uniform over 16 levels takes 4 bits a dimension."""
    levels = torch.arange(16).view(2, 8)
    x = dequantise(levels, 16, rows(2, seed))
    assert torch.equal(((x + 1) * 8).floor().long(), levels)
    torch.testing.assert_close(bits_per_dim(torch.full((1,), 8 * math.log(0.5)), 8, 16), torch.tensor([4.0]))
