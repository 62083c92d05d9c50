"""The exactness test: does what a loop emits have the law of the model it decodes? Enumerated laws, draws, chi-square."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.stats import chi2
from torch import Tensor

from fewstep.core.draft import Verify
from fewstep.core.random import CounterRng
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings, stream
from fewstep.decode.verify import verify

After = Callable[[list[int]], list[float]]  # a sequence -> the logits of its next token


def reference_law(logits: Sequence[float], history: Sequence[int], config: SamplingConfig) -> list[float]:
    """One law by the book, token by token (penalty, temperature, top-k, top-p, min-p)."""
    scores = list(logits)
    for token in set(history):
        scores[token] = (
            scores[token] / config.repetition_penalty if scores[token] > 0 else scores[token] * config.repetition_penalty
        )
    if config.temperature == 0:
        return [float(token == scores.index(max(scores))) for token in range(len(scores))]
    scores = [score / config.temperature for score in scores]
    if config.top_k:
        floor = sorted(scores, reverse=True)[min(config.top_k, len(scores)) - 1]
        scores = [score if score >= floor else -math.inf for score in scores]
    law = softmax(scores)
    if config.top_p < 1:
        kept, mass = set(), 0.0
        for token in sorted(range(len(law)), key=lambda token: -law[token]):
            if mass >= config.top_p:
                break
            kept.add(token)
            mass += law[token]
        law = [p if token in kept else 0.0 for token, p in enumerate(law)]
    floor = config.min_p * max(law)
    law = [p if p >= floor else 0.0 for p in law]
    total = sum(law)
    return [p / total for p in law]


def softmax(scores: Sequence[float]) -> list[float]:
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


def joint_law(after: After, prompt: Sequence[int], vocab: int, length: int, config: SamplingConfig) -> Tensor:
    """[vocab**length] float64: the probability of every continuation of `length` tokens, by enumeration."""
    layer: list[tuple[list[int], float]] = [(list(prompt), 1.0)]
    for _ in range(length):
        laws = [reference_law(after(text), text, config) if mass else [0.0] * vocab for text, mass in layer]
        layer = [
            ([*text, token], mass * law[token]) for (text, mass), law in zip(layer, laws, strict=True) for token in range(vocab)
        ]
    return torch.tensor([mass for _, mass in layer], dtype=torch.float64)


def draws(
    target: Any,
    drafter: Any,
    prompt: Sequence[int],
    config: SamplingConfig,
    seeds: Sequence[int],
    length: int,
    budget: int = 16,
    verify: Verify = verify,
) -> Tensor:
    """[len(seeds), length] the first tokens of one prompt's continuations, one per seed, in one batch.

    The loop is asked for `budget` tokens more, so that trees are as large as they get and not cut by the end.
    """
    tokens = torch.full((len(seeds), length + 2 * budget), -1)
    filled = torch.zeros(len(seeds), dtype=torch.int64)
    law, rng = config.build(len(seeds), target.vocab), CounterRng.seeded(seeds)
    settings = Settings(max_new_tokens=length + budget, budget=budget, verify=verify)
    for event in stream(target, drafter, [prompt] * len(seeds), law, rng, settings):
        step = event.payload
        row, column = (torch.arange(step.tokens.shape[1]) < step.count.unsqueeze(1)).nonzero(as_tuple=True)
        tokens[step.rows[row], filled[step.rows[row]] + column] = step.tokens[row, column]
        filled[step.rows] += step.count
        if int(filled.min()) >= length:
            break
    return tokens[:, :length]


def cells(tokens: Tensor, vocab: int) -> Tensor:
    """[n] the number of each row of `tokens` [n, length] read in base `vocab`, as `joint_law` orders them."""
    place = vocab ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * place).sum(1)


def chi_square(observed: Tensor, law: Tensor) -> float:
    """The p-value of cell numbers [n] against a law, cells expected under 10 times pooled; 0 if an impossible cell occurred."""
    counts, expected = torch.bincount(observed, minlength=len(law)).double(), law * len(observed)
    if bool((counts[law == 0] > 0).any()):
        return 0.0
    order = expected.argsort()
    counts, expected = counts[order], expected[order]
    # the rarest cells become one, large enough for the asymptotic law to hold
    rare = max(1, int((expected < 10).sum()))
    while rare < len(law) and float(expected[:rare].sum()) < 10:
        rare += 1
    counts = torch.cat([counts[:rare].sum().reshape(1), counts[rare:]])
    expected = torch.cat([expected[:rare].sum().reshape(1), expected[rare:]])
    if len(expected) == 1:  # one outcome, and nothing impossible happened
        return 1.0
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1))
