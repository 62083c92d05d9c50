"""The laws of a corruption and its noise schedule, for every registered pair; scores are laws in another form."""

import pytest
import torch
from torch import Tensor

from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.diffusion.categorical import draw, sharpened
from fewstep.diffusion.corruptions import CORRUPTIONS, NOISES, Interpolating, slope
from fewstep.diffusion.scores import law_of_scores, reverse_rates, scores

VOCAB, MASK = 4, 3
PAIRS = [(corruption, noise) for corruption in CORRUPTIONS for noise in NOISES]
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def made(corruption: str, noise: str) -> Interpolating:
    config = parse(CORRUPTIONS[corruption], {"noise": noise})
    built: Interpolating = config.build(VOCAB, MASK)  # type: ignore[attr-defined]
    return built


def laws(*shape: int) -> Tensor:
    """Random laws over the real tokens."""
    law = torch.rand(*shape, VOCAB, dtype=torch.float64) + 0.05
    law[..., MASK] = 0
    return law / law.sum(-1, keepdim=True)


def forward(corruption: Interpolating, x_0: Tensor, t: Tensor) -> Tensor:
    """[...,V]: the law of x_t."""
    keep = corruption.keep(t).unsqueeze(-1)
    return keep * torch.nn.functional.one_hot(x_0, VOCAB) + (1 - keep) * corruption.prior


@pytest.mark.parametrize("noise", NOISES)
def test_a_schedule_falls_from_data_to_noise_and_is_inverted(noise: str) -> None:
    corruption = made("absorbing", noise)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    keep = corruption.keep(t)
    assert keep.dtype == torch.float64 and float(keep[0]) == 1 and float(keep[-1]) < 2e-3
    assert bool((keep.diff() < 0).all())
    torch.testing.assert_close(corruption.time(keep[1:]), t[1:], rtol=1e-7, atol=1e-7)
    middle = t[20:80]
    numeric = (corruption.keep(middle + 1e-6) - corruption.keep(middle - 1e-6)) / 2e-6
    torch.testing.assert_close(slope(corruption, middle), numeric, rtol=1e-5, atol=1e-7)
    assert corruption.keep(middle.float()).dtype == torch.float64


@pytest.mark.parametrize("time", [-0.1, 1.1, float("nan")])
def test_a_time_outside_is_refused(time: float) -> None:
    with pytest.raises(ValueError, match=r"^t=[^\n]*outside \[0, 1\]; [^\n]*$"):
        made("absorbing", "cosine").keep(torch.tensor([0.5, time]))


@pytest.mark.parametrize(("kind", "noise"), PAIRS)
def test_posteriors_lead_back_to_the_marginals(kind: str, noise: str) -> None:
    """sum over x_t of q(x_t | x_0) q(x_s | x_t, x_0) = q(x_s | x_0)."""
    corruption = made(kind, noise)
    t, s = torch.tensor([0.9, 0.7, 0.31]), torch.tensor([0.4, 0.0, 0.3])
    for token in range(VOCAB - 1):
        x_0 = torch.full((3, 1), token)
        known = torch.nn.functional.one_hot(x_0, VOCAB).double()
        total = torch.zeros(3, 1, VOCAB, dtype=torch.float64)
        for x_t in range(VOCAB):
            share = forward(corruption, x_0, t[:, None])[..., x_t]
            posterior = corruption.posterior(torch.full((3, 1), x_t), known, t, s)
            assert posterior.dtype == torch.float64
            total += torch.where(share > 0, share, 0.0).unsqueeze(-1) * posterior
        torch.testing.assert_close(total, forward(corruption, x_0, s[:, None]), **TIGHT)


@pytest.mark.parametrize(("kind", "noise"), PAIRS)
def test_posteriors_compose(kind: str, noise: str) -> None:
    """From t to s and on to r is from t to r, given x_0."""
    corruption = made(kind, noise)
    t, s, r = (torch.tensor([time]) for time in (0.8, 0.5, 0.2))
    for token in range(VOCAB - 1):
        known = torch.nn.functional.one_hot(torch.tensor([[token]]), VOCAB).double()
        for x_t in range(VOCAB):
            if float(forward(corruption, torch.tensor([[token]]), t)[0, 0, x_t]) == 0:
                continue
            at = torch.tensor([[x_t]])
            first = corruption.posterior(at, known, t, s)[0, 0]
            both = sum(
                first[x_s] * corruption.posterior(torch.tensor([[x_s]]), known, s, r) for x_s in range(VOCAB) if first[x_s] > 0
            )
            torch.testing.assert_close(both, corruption.posterior(at, known, t, r), **TIGHT)


@pytest.mark.parametrize(("kind", "noise"), PAIRS)
def test_a_posterior_is_linear_in_what_has_become_possible(kind: str, noise: str) -> None:
    """With a predicted law it is the mean of the posteriors given each token, by the law of x_0 given x_t alone."""
    corruption, p_0 = made(kind, noise), laws(5, 2)
    t, s = torch.rand(5, 2, dtype=torch.float64) * 0.5 + 0.5, torch.rand(5, 2, dtype=torch.float64) * 0.5
    x_t = torch.randint(MASK, (5, 2)) if kind == "uniform" else torch.full((5, 2), MASK)
    mean = torch.zeros(5, 2, VOCAB, dtype=torch.float64)
    for token in range(MASK):
        known = torch.nn.functional.one_hot(torch.full((5, 2), token), VOCAB).double()
        mean += p_0[..., token : token + 1] * corruption.posterior(x_t, known, t, s)
    torch.testing.assert_close(corruption.posterior(x_t, p_0, t, s), mean, **TIGHT)


def test_a_visible_token_is_itself_whatever_is_predicted() -> None:
    corruption = made("absorbing", "log-linear")
    x = torch.tensor([[0, 2, 1]])
    posterior = corruption.posterior(x, laws(1, 3).index_fill(-1, torch.tensor([2]), 0), torch.tensor([0.7]), torch.tensor([0.2]))
    assert torch.equal(posterior, torch.nn.functional.one_hot(x, VOCAB).double())


@pytest.mark.parametrize(("kind", "noise"), PAIRS)
def test_corrupt_draws_the_marginal_row_by_row(kind: str, noise: str, seed: int) -> None:
    corruption, rows, length = made(kind, noise), 200, 50
    x_0 = torch.randint(MASK, (rows, length))
    rng, t = CounterRng.seeded(range(seed, seed + rows)), torch.full((rows,), 0.4)
    x_t = corruption.corrupt(x_0, t, rng)
    keep = float(corruption.keep(t)[0])
    share = 1 - keep if kind == "absorbing" else (1 - keep) * (MASK - 1) / MASK
    # 10,000 draws of standard deviation at most 1/2: 5.5 of them are beyond 1 in 10^7
    assert float((x_t != x_0).double().mean()) == pytest.approx(share, abs=5.5 * 0.5 / 100)
    assert bool((x_t[x_t != x_0] == MASK).all()) == (kind == "absorbing") and (kind == "absorbing" or int(x_t.max()) < MASK)
    alone = corruption.corrupt(x_0[7:8, :20], t[:1], rng.fork(torch.tensor([7])))
    assert torch.equal(alone[0], x_t[7, :20])


@pytest.mark.parametrize(("kind", "noise"), PAIRS)
def test_a_score_and_a_law_say_the_same(kind: str, noise: str) -> None:
    corruption, p_0, t = made(kind, noise), laws(6, 3), torch.rand(6, dtype=torch.float64) * 0.6 + 0.2
    x_t = torch.randint(MASK, (6, 3)) if kind == "uniform" else torch.full((6, 3), MASK)
    score = scores(corruption, x_t, p_0, t)
    torch.testing.assert_close(score.gather(-1, x_t.unsqueeze(-1)), torch.ones(6, 3, 1, dtype=torch.float64), **TIGHT)
    torch.testing.assert_close(law_of_scores(corruption, x_t, score, t), p_0, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("kind", "noise"), PAIRS)
def test_reverse_rates_are_the_slope_of_the_posterior(kind: str, noise: str) -> None:
    corruption, p_0, t = made(kind, noise), laws(4, 2), torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    x_t = torch.randint(MASK, (4, 2)) if kind == "uniform" else torch.full((4, 2), MASK)
    h = 1e-6
    numeric = corruption.posterior(x_t, p_0, t, t - h) / h
    own = torch.nn.functional.one_hot(x_t, VOCAB).bool()
    torch.testing.assert_close(reverse_rates(corruption, x_t, p_0, t), numeric.masked_fill(own, 0), rtol=1e-3, atol=1e-6)


def test_absorption_needs_a_mask() -> None:
    with pytest.raises(ValueError, match=r"^mask_token=None: [^\n]*set model.mask_token[^\n]*$"):
        CORRUPTIONS["absorbing"]().build(VOCAB, None)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"^low=2.0: [^\n]*; exchange them$"):
        parse(NOISES["geometric"], {"low": 2.0, "high": 1.0})


def test_drawing_follows_the_weights_and_never_takes_nothing() -> None:
    law = torch.tensor([0.0, 1.0, 3.0, 0.0], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 1 - 2**-53], dtype=torch.float64)
    assert draw(law.expand(4, 4), uniform).tolist() == [1, 1, 2, 2]


def test_sharpening() -> None:
    law = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    assert sharpened(law, 0, 1).tolist() == [1, 0, 0] and sharpened(law, 1, 1) is law
    torch.testing.assert_close(sharpened(law, 0.5, 1), law**2 / (law**2).sum())
    torch.testing.assert_close(sharpened(law, 1, 0.5), torch.tensor([1.0, 0, 0]).double())
    torch.testing.assert_close(sharpened(law, 1, 0.51), torch.tensor([0.625, 0.375, 0]).double())
