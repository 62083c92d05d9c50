"""What the exact cache of block diffusion saves, and what sharing a batch gains, with no token changed.

Weights are drawn, not trained: what a call costs does not depend on them. They are drawn wide, so that rows' steps differ.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from fewstep.decode.filling import FillConfig, Filling, Row
from fewstep.diffusion.orders.adaptive import ThresholdConfig
from fewstep.models.model import Model
from fewstep.nn.packed import pack
from fewstep.recipes import load_recipe
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.tuning import built

_LENGTH, _PROMPT, _ROWS, _RAGGED = 512, 32, 8, 17
_WIDE, _DEEP = 24.0, 6.0  # times the weights of the unembedding, and of the blocks, as they are drawn
_ORDER = ThresholdConfig(threshold=0.3)
_BD3, _OURS = "arXiv 2503.09573, section 3.2", "fewstep's own goal"

CACHED = Criterion("cache", f"seconds without the cache over those with it, {_LENGTH} tokens, batch 1", _BD3, "at least", 2.0)
SAME = Criterion("cache-identical", "share of tokens that the cache leaves as they are", _BD3, "at least", 1.0)
BATCHED = Criterion(
    "batch", f"tokens a second of {_ROWS} ragged rows together over those of one after another", _OURS, "at least", 4.0
)
DIFFERENT = Criterion("batch-differences", "tokens that differ between the two", _OURS, "at most", 0.0)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria; ratios are medians over rounds, in alternating order."""
    effort, model = bench.effort, drawn(bench.effort.seed)
    rows = ragged(model, _ROWS)
    whole, turns = rows[:1], range(effort.rounds)
    pairs = [(written(model, whole, effort.seed, cached=False), written(model, whole, effort.seed)) for _ in turns]
    ratios = [slow / fast for (_, slow), (_, fast) in pairs]
    (plain, _), (cached, _) = pairs[0]
    how, told = f"median of {effort.rounds} rounds", {f"round {i}": ratio for i, ratio in enumerate(ratios)}
    yield Finding(CACHED, statistics.median(ratios), how, told)
    same = sum(one == other for one, other in zip(plain[0], cached[0], strict=True)) / len(plain[0])
    yield Finding(SAME, same, f"{len(plain[0])} tokens")
    alone, together = list[list[list[int]]](), list[list[list[int]]]()
    ratios = []
    for _ in turns:
        one_by_one = [written(model, [row], effort.seed) for row in rows]
        shared, seconds = written(model, rows, effort.seed)
        ratios.append(sum(spent for _, spent in one_by_one) / seconds)
        alone.append([tokens for (tokens,), _ in one_by_one])
        together.append(shared)
    yield Finding(BATCHED, statistics.median(ratios), how, {f"round {i}": ratio for i, ratio in enumerate(ratios)})
    pairs_of_rows = list(zip(alone[0], together[0], strict=True))
    different = sum(a != b for one, other in pairs_of_rows for a, b in zip(one, other, strict=True))
    yield Finding(DIFFERENT, float(different), f"{sum(map(len, together[0]))} tokens")


def drawn(seed: int) -> Model:
    """The model of the recipe code-bd4 with weights drawn by `seed`, laid out for decoding."""
    recipe = load_recipe("code-bd4")
    network = built(cast(Any, recipe["model"]), seed).eval().requires_grad_(False)
    network.head.weight.mul_(_WIDE)
    for weight in network.blocks.parameters():
        weight.mul_(_DEEP if weight.dim() > 1 else 1.0)
    pack(network)
    return Model(network, None, {"objective": recipe["objective"].model_dump(mode="json")})


def ragged(model: Model, count: int) -> list[Row]:
    """Rows of given tokens and gaps behind them; the first has all of the length, each other one less than the one before."""
    vocab = model.network.vocab - 1
    given = torch.arange(count * _PROMPT).view(count, _PROMPT).mul(7919) % vocab
    return [[*given[i].tolist(), *[None] * (_LENGTH - _PROMPT - _RAGGED * i)] for i in range(count)]


def written(model: Model, rows: Sequence[Row], seed: int, *, cached: bool = True) -> tuple[list[list[int]], float]:
    """The tokens of each row, and the seconds of all."""
    begun = time.perf_counter()
    filling = Filling(model, rows, FillConfig(order=_ORDER, cached=cached, seed=seed))
    for _ in filling.steps():
        pass
    return [result.tokens for result in filling.results()], time.perf_counter() - begun


CLAIM = Claim(
    "block-cache",
    "Arriola et al. 2025, arXiv 2503.09573, section 3.2",
    "Block diffusion reads what is final once, in half the seconds or less, and rows at their own pace share a batch exactly.",
    (CACHED, SAME, BATCHED, DIFFERENT),
    measure,
)
