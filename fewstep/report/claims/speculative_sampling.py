"""Speculative sampling: the law is the target's, the tokens per call follow the acceptance rate, the seconds a cost model.

Toys are decoders small enough to enumerate, or made to forget their history, so that the papers' assumptions hold exactly.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import final

import torch
from torch import Tensor

from fewstep.decode.drafters.draft_model import DraftModel, DraftModelConfig
from fewstep.decode.drafters.silent import Silent
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.models.model import Model
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.tuning import trained_draft
from fewstep.report.contest import PLAIN, Lap, Ours, RaceConfig, Record, compete
from fewstep.report.costs import call_seconds

_WARM = SamplingConfig(temperature=1.0)
_TOY, _LENGTH, _PROMPT = 6, 3, (1, 4)
_SHARES, _DEPTHS, _PAIR_DEPTHS = (-0.5, 0.2, 0.7), (1, 3, 5), (1, 2, 4)
_ROWS = 4000  # continuations drawn in one batch

LAW = Criterion(
    "law",
    "tokens are distributed as if sampled from the target alone: chi-square p of the first three tokens' joint law",
    "arXiv 2211.17192, appendix A.1; arXiv 2302.01318, theorem 1",
    "at least",
    1e-4,
)
TOKENS = Criterion(
    "tokens-per-call",
    "E[tokens] = (1 - a^(g+1)) / (1 - a) when acceptances are independent: largest deviation in standard errors",
    "arXiv 2211.17192, eq. 1",
    "at most",
    4.5,
)
PAIR = Criterion(
    "tokens-per-call-of-a-trained-pair",
    "the same formula for a trained model and draft, whose acceptances need not be independent: largest relative deviation",
    "arXiv 2211.17192, eq. 1 and section 3.1",
    "at most",
    0.10,
)
SECONDS = Criterion(
    "speed-of-a-trained-pair",
    "speed over plain = tokens per call / (g c + v(g+1)), c and v(n) the measured cost of a draft call and of verifying n tokens "
    "(the paper takes v = 1): largest relative deviation",
    "arXiv 2211.17192, theorem 3.8",
    "at most",
    0.15,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    yield _law(bench)
    yield _independent(bench)
    if bench.draft is None:
        bench.console.print(f"no draft model given: training one for {bench.effort.seconds:g} s")
    pair = _Pair(bench, bench.draft or trained_draft(bench))
    yield pair.tokens()
    yield pair.speed()


def _law(bench: Bench) -> Finding:
    """The joint law of three tokens on an enumerated toy, drafts from another one between it and a third."""
    effort = bench.effort
    target, draft = _toy(effort.seed), _toy(effort.seed + 1)
    for mine, theirs in zip(draft.parameters(), target.parameters(), strict=True):
        mine.lerp_(theirs, 0.7)
    drafter = DraftModel(DraftModelConfig(branching=(1, 1, 1)), draft, target)
    law = enumerated(target, _PROMPT, _LENGTH)
    drawn = []
    for start in range(0, effort.draws, _ROWS):
        rows = min(_ROWS, effort.draws - start)
        settings = Settings(_LENGTH + 4)  # longer than what is looked at, so that trees are whole
        done = decode(target, drafter, [_PROMPT], settings, sampling=_WARM, seed=effort.seed + start, samples=rows)
        drawn += [row.tokens[:_LENGTH] for row in done]
    place = _TOY ** torch.arange(_LENGTH - 1, -1, -1)
    counts = torch.bincount((torch.tensor(drawn) * place).sum(1), minlength=len(law)).double()
    p, statistic, freedom = chi_square(counts, law)
    how = f"{effort.draws} draws on {_TOY}^{_LENGTH} = {len(law)} continuations, a chain of three drafts"
    return Finding(LAW, p, how, {"chi_square": statistic, "degrees_of_freedom": freedom, "draws": effort.draws})


def _independent(bench: Bench) -> Finding:
    """Toys whose laws ignore the history: every draft is accepted with the same probability, whatever came before."""
    rows, worst = [], 0.0
    for share, depth in product(_SHARES, _DEPTHS):
        target, draft = _forgetful(bench.effort.seed, 1.0), _forgetful(bench.effort.seed, share)
        p, q = (Model(network, None).logits(torch.tensor([_PROMPT]))[0, -1].softmax(-1) for network in (target, draft))
        rate = float(torch.minimum(p, q).sum())
        drafter = DraftModel(DraftModelConfig(branching=(1,) * depth), draft, target)
        config = RaceConfig(max_new_tokens=40 * (depth + 1), temperature=1.0)
        seeds = range(bench.effort.seed, bench.effort.seed + bench.effort.draws // 300)
        lap = Ours("toy", target, drafter, config).run([_PROMPT] * len(seeds), seeds)
        mean, error, calls = whole_calls(lap, depth)
        expected = expected_tokens(rate, depth)
        worst = max(worst, abs(mean - expected) / error)
        rows.append({"a": rate, "g": depth, "expected": expected, "measured": mean, "standard_error": error, "calls": calls})
    how = f"{len(rows)} pairs of acceptance rate and depth, a = sum of min(p, q) known exactly"
    return Finding(TOKENS, worst, how, {"toys": rows})


@final
class _Pair:
    """A trained model and its draft, raced at several depths, drawn at temperature 1."""

    def __init__(self, bench: Bench, draft: Model) -> None:
        effort, target = bench.effort, bench.model
        if target.tokenizer is None:
            raise ValueError("model: has no tokenizer to read prompts with; load it with its tokenizer.json")
        self._target, self._draft = target.network, draft.network
        self._ids = [target.tokenizer.encode(prompt.prompt) for prompt in bench.prompts[: effort.count]]
        config = RaceConfig(max_new_tokens=effort.max_new_tokens, temperature=1.0, rounds=effort.rounds, seed=effort.seed)
        contestants = [Ours(PLAIN, self._target, Silent(), config)]
        for depth in _PAIR_DEPTHS:
            drafter = DraftModel(DraftModelConfig(branching=(1,) * depth), self._draft, self._target)
            contestants.append(Ours(f"draft of {depth}", self._target, drafter, config))
        bench.console.print(f"racing the draft model over {len(self._ids)} prompts")
        self._plain, *self._records = compete(contestants, self._ids, config)
        self._rate = acceptance(target, draft, self._ids, self._plain.lap.tokens)

    def tokens(self) -> Finding:
        rows, worst = [], 0.0
        for depth, record in self._pairs():
            mean, error, calls = whole_calls(record.lap, depth)
            expected = expected_tokens(self._rate, depth)
            worst = max(worst, abs(mean / expected - 1))
            rows.append({"g": depth, "expected": expected, "measured": mean, "standard_error": error, "calls": calls})
        how = f"a = {self._rate:.3f}, the mean of sum min(p, q) over text of the target; g = {', '.join(map(str, _PAIR_DEPTHS))}"
        return Finding(PAIR, worst, how, {"a": self._rate, "depths": rows})

    def speed(self) -> Finding:
        target = call_seconds(self._target, self._ids[0], (1, *(depth + 1 for depth in _PAIR_DEPTHS)))
        ratio = call_seconds(self._draft, self._ids[0], (1,))[1] / target[1]
        rows, worst = [], 0.0
        for depth, record in self._pairs():
            verification = target[depth + 1] / target[1]
            expected = record.lap.cost.tokens_per_call / (depth * ratio + verification)
            measured = record.decoding_speed_over(self._plain).median
            worst = max(worst, abs(measured / expected - 1))
            rows.append({"g": depth, "v": verification, "expected": expected, "measured": measured})
        how = f"c = {ratio:.2f}; without the prompts; median of {len(self._plain.seconds)} rounds in alternating order"
        return Finding(
            SECONDS,
            worst,
            how,
            {"c": ratio, "call_seconds": {str(count): seconds for count, seconds in target.items()}, "depths": rows},
        )

    def _pairs(self) -> Iterator[tuple[int, Record]]:
        return zip(_PAIR_DEPTHS, self._records, strict=True)


def expected_tokens(rate: float, depth: int) -> float:
    """Tokens per call of `depth` drafts accepted independently with probability `rate`."""
    return depth + 1.0 if rate == 1 else (1 - rate ** (depth + 1)) / (1 - rate)


def whole_calls(lap: Lap, depth: int) -> tuple[float, float, int]:
    """The mean tokens per call over the calls that verified `depth` drafts, its standard error, and their number.

    The last calls of a row have smaller trees; which ones does not depend on what they accept.
    """
    emitted = torch.tensor([a + 1 for a, d in zip(lap.accepted, lap.drafted, strict=True) if d == depth]).double()
    return float(emitted.mean()), float(emitted.std() / len(emitted) ** 0.5), len(emitted)


def acceptance(model: Model, draft: Model, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> float:
    """The mean over the tokens of `outputs` of sum_x min(p(x), q(x)), the probability that a draft there is accepted."""
    shared = []
    for prompt, output in zip(prompts, outputs, strict=True):
        text = torch.tensor([[*prompt, *output[:-1]]], device=model.device)
        p, q = (each.logits(text)[0, len(prompt) - 1 :].double().softmax(-1) for each in (model, draft))
        shared.append(torch.minimum(p, q).sum(-1))
    return float(torch.cat(shared).mean())


def enumerated(target: Decoder, prompt: Sequence[int], length: int) -> Tensor:
    """[V**length]: the probability of every continuation of `length` tokens, the first token slowest."""
    texts = torch.tensor([[*prompt, *text] for text in product(range(target.vocab), repeat=length)])
    logs = Model(target, None).logits(texts[:, :-1])[:, len(prompt) - 1 :].double().log_softmax(-1)
    return logs.gather(2, texts[:, len(prompt) :].unsqueeze(-1)).sum((1, 2)).exp()


def chi_square(counts: Tensor, law: Tensor) -> tuple[float, float, int]:
    """Pearson's test of `counts` against `law`, cells expected less than 5 times pooled: p, the statistic, degrees of freedom."""
    expected = law * counts.sum()
    common = expected >= 5
    counts, expected = (torch.cat([x[common], x[~common].sum().reshape(1)]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    p = torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2)
    return float(p), float(statistic), freedom


@torch.no_grad()
def _toy(seed: int, tied: bool = True) -> Decoder:
    """A decoder whose laws are far from uniform and depend on the history."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = DecoderConfig(vocab=_TOY, width=16, depth=1, query_heads=2, hidden=32, tied=tied, init_std=0.4)
        return config.build().double().requires_grad_(False)


def _forgetful(seed: int, share: float) -> Decoder:
    """A toy with one embedding for all tokens, so one law after every history; its logits are multiplied by `share`."""
    network = _toy(seed, tied=False)
    network.embedding.weight.copy_(network.embedding.weight[:1].expand_as(network.embedding.weight).clone())
    network.head.weight.mul_(share)
    return network


CLAIM = Claim(
    "speculative-sampling",
    "Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318",
    "Drafts of a small model, verified together by a large one, give the large model's distribution in fewer of its calls.",
    (LAW, TOKENS, PAIR, SECONDS),
    measure,
)
