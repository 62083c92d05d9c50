"""Losses of discrete diffusion: against enumeration, against one another, and against loops written out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from enumerated import Joint, patterns
from sequences import TIGHT, VOCAB, decoder
from torch import Tensor

from fewstep.core.mixer import Blocks, Causal, Doubled, Full
from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.diffusion.corruptions import CORRUPTIONS, NOISES
from fewstep.diffusion.scores import log_scores, score_entropy
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.report.likelihood_bound import nats_bound
from fewstep.training.objectives.block import BlockConfig
from fewstep.training.objectives.d3pm import D3PMConfig
from fewstep.training.objectives.masked import MaskedConfig
from fewstep.training.objectives.masking import masked
from fewstep.training.objectives.score_entropy import ScoreEntropyConfig

MASK = VOCAB - 1
ESTIMATORS = ("iid-time", "antithetic-time", "iid-count", "stratified-count")
OBJECTIVES: dict[str, Any] = {
    **{f"masked-{estimator}": MaskedConfig(estimator=estimator) for estimator in ESTIMATORS},  # type: ignore[arg-type]
    **{f"block-{estimator}": BlockConfig(estimator=estimator, size=4) for estimator in ESTIMATORS},  # type: ignore[arg-type]
    "block-clipped": BlockConfig(size=2, clip=True),
    "score_entropy": ScoreEntropyConfig(),
    "score_entropy-uniform": parse(ScoreEntropyConfig, {"corruption": "uniform"}),
    "d3pm": D3PMConfig(steps=20),
    "d3pm-uniform": parse(D3PMConfig, {"corruption": "uniform", "steps": 20}),
}


class Exact:
    """The exact denoiser of a joint, as a decoder: hidden activations are log-laws."""

    noisy, shifted, training = False, False, False

    def __init__(self, joint: Joint) -> None:
        self.joint, self.mask_token, self.vocab = joint, joint.vocab, joint.vocab + 1
        self._predict = joint.denoiser(CORRUPTIONS["absorbing"]().build(self.vocab, self.mask_token))  # type: ignore[attr-defined]

    def __call__(self, tokens: Tensor, segments: Any = None, *, mask: Any, noise: Any = None, positions: Any = None) -> Any:
        if isinstance(mask, Doubled):
            noisy, clean = tokens.chunk(2, 1)
            block = torch.arange(noisy.shape[1]) // mask.size
            final = torch.zeros(*noisy.shape, self.vocab, dtype=torch.float64)
            for b in block.unique():
                canvas = torch.where(block < b, clean, torch.where(block == b, noisy, self.mask_token))
                final[:, block == b] = self._log(canvas)[:, block == b]
            return SimpleNamespace(final=torch.cat([final, final], 1))
        assert mask == Full()
        return SimpleNamespace(final=self._log(tokens))

    def unembed(self, h: Tensor) -> Tensor:
        return h

    def eval(self) -> None:
        pass

    def train(self, mode: bool) -> None:
        pass

    def _log(self, tokens: Tensor) -> Tensor:
        return self._predict(tokens, torch.ones(len(tokens))).log()


def rows(seed: int, count: int) -> CounterRng:
    return CounterRng.seeded(range(seed, seed + count))


def costs(joint: Joint, x: Tensor) -> list[tuple[int, float]]:
    """For each set of masks how many there are, and the sum of -ln p(token) over them."""
    model, found = Exact(joint), []
    for hidden in patterns(joint.length):
        law = model._log(torch.where(hidden, joint.vocab, x)[None])[0]
        found.append((int(hidden.sum()), float(-law.gather(1, x[:, None])[hidden].sum())))
    return found


@pytest.mark.parametrize("vocab", [3, 4])
def test_with_the_exact_denoiser_the_bound_is_the_likelihood(vocab: int, seed: int) -> None:
    """Over time, over counts and over orders: three integrals of the same numbers, each done exactly."""
    joint = Joint.drawn(vocab, 4, seed)
    for index in (0, 17, 80):
        x, length = joint.states[index], joint.length
        truth = -float(joint.law[index].log())
        by_time = by_count = 0.0
        for count, cost in costs(joint, x):
            if count:  # the integral over t of t^(count-1) (1-t)^(length-count), and 1 / binomial
                by_time += cost * math.gamma(count) * math.gamma(length - count + 1) / math.gamma(length + 1)
                by_count += cost * (length / count) / length / math.comb(length, count)
        assert by_time == pytest.approx(truth, abs=1e-9) and by_count == pytest.approx(truth, abs=1e-9)
        assert float(joint.mean_over_orders(x)) == pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_is_unbiased(estimator: Any, noise: str, seed: int) -> None:
    joint, count = Joint.drawn(3, 4, seed), 2000
    x = joint.states[40]
    config = parse(MaskedConfig, {"estimator": estimator, "noise": {"kind": noise}, "window": (0.05, 1.0)})
    found = config.build().nats(Exact(joint), Batch(x.expand(count, -1)), rows(seed, count)).sum(1)
    wanted = -float(joint.law[40].log()) if "count" in estimator else integral(joint, x, config) / 0.95
    error = float(found.std()) / math.sqrt(count)  # an upper bound where the draws are spread
    assert float(found.mean()) == pytest.approx(wanted, abs=6 * error)


def integral(joint: Joint, x: Tensor, config: Any) -> float:
    """The integral of the weighted cost over the window, by the share of noise p: weight 1 / p between its ends."""
    corruption = CORRUPTIONS["absorbing"](noise=config.noise).build(joint.vocab + 1, joint.vocab)  # type: ignore[attr-defined, call-arg]
    low, high = (1 - corruption.keep(torch.tensor(config.window, dtype=torch.float64))).tolist()
    p = low + (high - low) * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    terms = (cost * p ** (count - 1) * (1 - p) ** (joint.length - count) for count, cost in costs(joint, x) if count)
    return float(torch.stack(list(terms)).sum(0).mean()) * (high - low)


def test_evenly_spread_counts_vary_least(seed: int) -> None:
    """Means of 16 draws: the spread of stratified counts is at most half that of independent times."""
    joint = Joint.drawn(3, 4, seed)
    model, batch, spreads = Exact(joint), Batch(joint.states[40].expand(16 * 60, -1)), {}
    for estimator in ("iid-time", "stratified-count"):
        objective = MaskedConfig(estimator=estimator).build()  # type: ignore[arg-type]
        groups = [objective.nats(model, Batch(batch.tokens[:16]), rows(seed, 16).at(r)).sum() / 16 for r in range(60)]  # type: ignore[arg-type]
        spreads[estimator] = float(torch.stack(groups).std())
    assert spreads["stratified-count"] < 0.5 * spreads["iid-time"]


def network(**fields: Any) -> Decoder:
    return decoder(**{"mask_token": MASK, **fields})


def text(*shape: int) -> Tensor:
    return torch.randint(MASK, shape)


def log_law(model: Decoder, tokens: Tensor, mask: Any, noise: Tensor | None = None) -> Tensor:
    """[B,T,V] of one pass, the mask left out."""
    logits = model.unembed(model(tokens, mask=mask, noise=noise).final)
    return logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).log_softmax(-1)


def test_blocks_of_one_token_are_the_chain_rule(seed: int) -> None:
    """Every count is 1 of 1: nothing is random, and the error is nothing."""
    model, tokens = network(), text(2, 6)
    chain = torch.zeros(2, dtype=torch.float64)
    for i in range(6):
        seen = torch.cat([tokens[:, :i], torch.full((2, 1), MASK)], 1)
        chain -= log_law(model, seen, Blocks(1))[torch.arange(2), i, tokens[:, i]]
    found = nats_bound(model, Batch(tokens), block=1, draws=1, repeats=2, seed=seed)
    torch.testing.assert_close(found.nats, chain, **TIGHT)
    assert found.error.tolist() == [0, 0] and found.tokens.tolist() == [6, 6]
    whole = BlockConfig(size=1, window=(1.0, 1.0), noise=NOISES["log-linear"](least=0.0)).build()  # type: ignore[call-arg]
    torch.testing.assert_close(whole.nats(model, Batch(tokens), rows(seed, 2)).sum(1), chain, **TIGHT)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("fields", [{}, {"noisy": True}, {"shifted": True}])
def test_one_block_is_masked_diffusion(estimator: Any, fields: dict[str, Any], seed: int) -> None:
    model, batch = network(**fields), Batch(text(3, 8))
    one, whole = BlockConfig(estimator=estimator, size=8).build(), MaskedConfig(estimator=estimator).build()
    torch.testing.assert_close(one.nats(model, batch, rows(seed, 3)), whole.nats(model, batch, rows(seed, 3)), **TIGHT)


@pytest.mark.parametrize(("noisy", "shifted"), [(False, False), (True, False), (False, True)])
def test_the_doubled_pass_is_a_loop_over_blocks(noisy: bool, shifted: bool, seed: int) -> None:
    model, tokens, size = network(noisy=noisy, shifted=shifted), text(3, 12), 4
    config = BlockConfig(size=size)
    cells = (torch.arange(12) // size).expand(3, -1)
    drawn = masked(Batch(tokens), cells, MASK, config, config.window, rows(seed, 3))
    total = torch.zeros(3, 12, dtype=torch.float64)
    for b in range(3):
        here = slice(b * size, (b + 1) * size)
        seen = torch.cat([tokens[:, : here.start], drawn.tokens[:, here]], 1)
        noise = torch.cat([torch.zeros(3, here.start), drawn.noise[:, here]], 1).double() if noisy else None
        place = torch.arange(here.start, here.stop)
        told = log_law(model, seen, Blocks(size), noise)[:, (place - int(shifted)).clamp(min=0)]
        law = told.gather(-1, tokens[:, here, None]).squeeze(-1)
        total[:, here] = torch.where(drawn.hidden[:, here], -law * drawn.weight[:, here], 0.0)
    assert bool(drawn.hidden.any())
    torch.testing.assert_close(config.build().nats(model, Batch(tokens), rows(seed, 3)), total, **TIGHT)


def test_a_shifted_model_in_blocks_of_one_reads_left_to_right(seed: int) -> None:
    """Its likelihood of text is the autoregressive one, but for the first token, which its own mask predicts."""
    model, tokens = network(shifted=True), text(2, 6)
    found = BlockConfig(size=1, estimator="iid-count").build().nats(model, Batch(tokens), rows(seed, 2))
    chain = log_law(model, tokens, Causal())[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found[:, 1:], -chain, **TIGHT)
    segments = torch.tensor([0, 0, 1, 1, 1, 1]).expand(2, -1)
    packed = BlockConfig(size=1, estimator="iid-count").build().nats(model, Batch(tokens, segments), rows(seed, 2))
    alone = BlockConfig(size=1, estimator="iid-count").build().nats(model, Batch(tokens[:, 2:]), rows(seed, 2))
    torch.testing.assert_close(packed[:, 2:], alone, **TIGHT)


def test_score_entropy_of_normalised_scores_is_masked_diffusion(seed: int) -> None:
    """For every draw: the scores r p of a law p cost what the law does."""
    corruption = CORRUPTIONS["absorbing"]().build(VOCAB, MASK)  # type: ignore[attr-defined]
    x_0, t = text(5, 7), torch.rand(5, dtype=torch.float64) * 0.9 + 0.1
    x_t = corruption.corrupt(x_0, t, rows(seed, 5))
    law = torch.randn(5, 7, VOCAB, dtype=torch.float64).index_fill(-1, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
    keep = corruption.keep(t)[:, None, None]
    log_score = (law + torch.log(keep / (1 - keep))).masked_fill(torch.nn.functional.one_hot(x_t, VOCAB).bool(), 0.0)
    found = score_entropy(corruption, x_t, x_0, log_score, t)
    surprise = -law.gather(-1, x_0.unsqueeze(-1)).squeeze(-1)
    wanted = torch.where(x_t == MASK, surprise * (1 - 1e-3) / (1 - keep.squeeze(-1)), 0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_the_output_of_a_score_network_is_scaled_by_its_noise(seed: int) -> None:
    """Under absorption a uniform law is an output of 0; a score entropy is written out by hand for uniform noise."""
    absorbing, uniform = (CORRUPTIONS[kind]().build(VOCAB, MASK) for kind in ("absorbing", "uniform"))  # type: ignore[attr-defined]
    t, zeros = torch.tensor([0.5], dtype=torch.float64), torch.zeros(1, 1, VOCAB, dtype=torch.float64)
    masked_score = log_scores(absorbing, torch.tensor([[MASK]]), zeros, t, MASK).exp()
    assert float(masked_score[..., :MASK].sum()) == pytest.approx(float(absorbing.keep(t) / (1 - absorbing.keep(t))))
    keep, real = float(uniform.keep(t)), MASK
    logits = torch.randn(1, 1, VOCAB, dtype=torch.float64)
    for x_t, x_0 in ((2, 2), (2, 5)):
        at, data = torch.tensor([[x_t]]), torch.tensor([[x_0]])
        found = score_entropy(uniform, at, data, log_scores(uniform, at, logits, t, MASK), t)
        law = [keep * (y == x_0) + (1 - keep) / real for y in range(real)]
        total = 0.0
        for y in range(real):
            if y != x_t:
                r, s = law[y] / law[x_t], float(logits[0, 0, y])
                total += math.exp(s) - r * s + r * (math.log(r) - 1)
        assert float(found) == pytest.approx(total * (1 - 1e-3) / keep / real, rel=1e-9)


def test_d3pm_under_absorption_is_weighted_cross_entropy(seed: int) -> None:
    """(keep_s - keep_t) / (1 - keep_t) of -ln p a masked token, T times, as MDLM takes to its limit."""
    model, batch = network(), Batch(text(4, 6))
    objective = D3PMConfig(steps=10).build()
    torch.manual_seed(seed)
    found = objective.nats(model, batch, rows(seed, 4))
    spread = (rows(seed, 4).split("shift").uniform()[0] + (torch.arange(4) + rows(seed, 4).split("level").uniform()) / 4) % 1
    i = torch.floor(spread * 10)
    corruption = CORRUPTIONS["absorbing"]().build(VOCAB, MASK)  # type: ignore[attr-defined]
    x_t = corruption.corrupt(batch.tokens, (i + 1) / 10, rows(seed, 4))
    keep_t, keep_s = corruption.keep((i + 1) / 10)[:, None], corruption.keep(i / 10)[:, None]
    surprise = -log_law(model, x_t, Full()).gather(-1, batch.tokens.unsqueeze(-1)).squeeze(-1)
    wanted = torch.where(x_t == MASK, 10 * (keep_s - keep_t) / (1 - keep_t) * surprise, 0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_falls_and_reaches_every_weight(name: str, seed: int) -> None:
    model = network(noisy=True).float().train()
    objective, tokens = OBJECTIVES[name].build(), (torch.randint(MASK, (16, 1)) + torch.arange(8)) % MASK
    optimizer, history = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(40):
        loss = objective.loss(model, Batch(tokens), rows(seed, 16))
        assert loss.units == 128 and bool(loss.value.isfinite())
        optimizer.zero_grad()
        loss.value.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        history.append(float(loss.value.detach()))
    assert history[-1] < 0.8 * history[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_and_what_is_not_scored_do_not_count(name: str, seed: int) -> None:
    model, objective = network(noisy=True).train(), OBJECTIVES[name].build()
    segments = torch.tensor([[0] * 5 + [1] * 5 + [-1] * 2, [0] * 12])
    tokens, scores = text(2, 12), torch.ones(2, 12, dtype=torch.bool)
    scores[:, :3] = False
    batch = Batch(tokens, segments, {"scored": scores})
    loss = objective.loss(model, batch, rows(seed, 2))
    assert loss.units == 7 + 9
    other = Batch(torch.where(segments < 0, (tokens + 1) % MASK, tokens), segments, batch.extra)
    torch.testing.assert_close(objective.loss(model, other, rows(seed, 2)).value, loss.value, rtol=0, atol=0)
    none = Batch(tokens, torch.full_like(segments, -1))
    empty = objective.loss(model, none, rows(seed, 2))
    assert empty.units == 0 and float(empty.value) == 0


def test_counts_are_exact_and_times_are_shares(seed: int) -> None:
    tokens, cells = text(40, 10), torch.tensor([0] * 6 + [1] * 3 + [-1]).expand(40, -1)
    counts = masked(Batch(tokens), cells, MASK, MaskedConfig(estimator="stratified-count"), (0, 1), rows(seed, 40))
    for first, last in ((0, 6), (6, 9)):
        hidden = counts.hidden[:, first:last].sum(1)
        assert torch.equal(hidden, (counts.noise[:, first] * (last - first)).round().long())
        assert set(hidden.tolist()) == set(range(1, last - first + 1))
        torch.testing.assert_close(counts.weight[:, first], (last - first) / hidden, check_dtype=False)
    assert not bool(counts.hidden[:, 9].any()) and torch.equal(counts.hidden, counts.tokens == MASK)


def test_the_calmest_window_is_learnt_and_kept(seed: int) -> None:
    """Blocks that lost much vary little where tokens are independent: the window moves up, and a checkpoint carries it."""
    model, objective, resumed = network().eval(), BlockConfig(size=2, clip=True).build(), BlockConfig(size=2, clip=True).build()
    assert objective.state_dict() == {"low": 1e-3, "high": 1.0}
    with torch.no_grad():
        for i in range(4):
            objective.loss(model, Batch(text(16, 8)), rows(seed, 16).at(i))
    objective.validated({})
    low, high = objective.state_dict().values()
    assert low > 0.05 and high - low + 1e-9 >= 0.5
    resumed.load_state_dict(objective.state_dict())
    train, batch = network().train(), Batch(text(4, 8))
    assert resumed.loss(train, batch, rows(seed, 4)).value == objective.loss(train, batch, rows(seed, 4)).value
    with pytest.raises(ValueError, match=r"^objective state [^\n]*; [^\n]*$"):
        resumed.load_state_dict({"average": 1})


def test_a_bound_has_an_error_that_tells_how_far_it_is(seed: int) -> None:
    joint = Joint.drawn(3, 4, seed)
    batch = Batch(joint.states[[5, 40]])
    for block in (None, 2, 4):
        found = nats_bound(Exact(joint), batch, block=block, draws=8, repeats=40, seed=seed)  # type: ignore[arg-type]
        truth = -joint.law[[5, 40]].log()
        assert bool(((found.nats - truth).abs() < 8 * found.error).all()) and bool((found.error > 0).all())
    exact = nats_bound(Exact(joint), batch, block=1, draws=1, repeats=2)  # type: ignore[arg-type]
    torch.testing.assert_close(exact.nats, -joint.law[[5, 40]].log(), rtol=1e-9, atol=1e-9)
    assert exact.bits(8)[0] == pytest.approx(float(-joint.law[[5, 40]].log2().sum()) / 8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_cannot_be_trained_is_refused_in_one_line(name: str, seed: int) -> None:
    objective, batch = OBJECTIVES[name].build(), Batch(text(2, 8))
    if "uniform" not in name:
        with pytest.raises(ValueError, match=r"[^\n]*mask[^\n]*; set model.mask_token[^\n]*$"):
            objective.loss(decoder(), batch, rows(seed, 2))
        holding = Batch(batch.tokens.clone().index_fill(1, torch.tensor([3]), MASK))
        with pytest.raises(ValueError, match=r"^batch: holds the mask token 10; set model.mask_token[^\n]*$"):
            objective.loss(network(), holding, rows(seed, 2))
    with pytest.raises(ValueError, match=r"^mask=[^\n]*causal[^\n]*; choose one of[^\n]*$"):
        objective.loss(network(mixers=("linear",)), batch, rows(seed, 2))


def test_blocks_divide_the_length(seed: int) -> None:
    with pytest.raises(ValueError, match=r"^size=3: does not divide the length 8; choose a divisor[^\n]*$"):
        BlockConfig(size=3).build().loss(network(), Batch(text(2, 8)), rows(seed, 2))
    with pytest.raises(ValueError, match=r"^mask_token=11: outside 0..10; [^\n]*$"):
        parse(DecoderConfig, {"vocab": VOCAB, "mask_token": VOCAB})
    with pytest.raises(ValueError, match=r"window"):
        parse(MaskedConfig, {"window": (0.9, 0.1)})
