"""Low-confidence remasking as published, beside the same ranked by the predicted law, where the denoiser is exact.

A joint law of a few tokens is enumerated, so that nothing but the order can be wrong. No network is needed.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fewstep.core.random import CounterRng
from fewstep.diffusion.categorical import draw, entropy
from fewstep.diffusion.corruptions import AbsorbingConfig
from fewstep.diffusion.orders.base import OrderConfig
from fewstep.diffusion.orders.ranked import ConfidenceConfig, EntropyConfig, MarginConfig, RandomConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding

_TOKENS, _LENGTH, _SHARPNESS = 3, 4, 0.8
_FLOORS = 5  # sets of fresh draws that the noise floor is the mean of
_BY_LAW: Mapping[str, OrderConfig] = MappingProxyType(
    {
        "random": RandomConfig(per_step=1),
        "confidence": ConfidenceConfig(per_step=1),
        "margin": MarginConfig(per_step=1),
        "entropy": EntropyConfig(per_step=1),
    }
)
_PUBLISHED = ConfidenceConfig(per_step=1, rank_by="sampled")

TRAP = Criterion(
    "published-rule",
    "total variation from the law over its noise floor, ranked by the probability of the token drawn, one token a step",
    "arXiv 2502.09992, algorithm 5, and its code; the threshold is fewstep's own",
    "at least",
    1.5,
)
BY_LAW = Criterion(
    "ranked-by-law",
    f"the same ranked by the predicted law, the worst of {', '.join(_BY_LAW)}",
    "the law of a product of conditionals; the threshold is fewstep's own",
    "at most",
    1.5,
)
GREEDY = Criterion("greedy", "at temperature 0 the rules agree: share of sequences", "fewstep's own", "at least", 1.0)


@final
@dataclass(frozen=True, slots=True)
class Toy:
    """`law` [S] of all sequences `states` [S,L]; the mask is the token after the last."""

    states: Tensor
    law: Tensor

    @classmethod
    def drawn(cls, seed: int) -> "Toy":
        """A law without structure, from `seed`."""
        states = torch.tensor(list(product(range(_TOKENS), repeat=_LENGTH)))
        return cls(states, (_SHARPNESS * CounterRng.seeded([seed]).split("toy").normal(len(states))[0]).softmax(0))

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """[N,L,V]: the exact law of each position given what is not masked, whatever the time."""
        fits = ((x[:, None] == self.states) | (x[:, None] == _TOKENS)).all(-1)
        weight = self.law * fits
        laws = torch.einsum("ns,slv->nlv", weight, one_hot(self.states, _TOKENS + 1).double())
        return laws / weight.sum(1)[:, None, None]

    def sampled(self, config: OrderConfig, count: int, seed: int) -> Tensor:
        """[count,L] sequences, by an order from nothing but masks."""
        order: Any = config.build()  # type: ignore[attr-defined]
        corruption = AbsorbingConfig().build(_TOKENS + 1, _TOKENS)
        x = torch.full((count, _LENGTH), _TOKENS)
        grid, rng = torch.linspace(1, 0, _LENGTH + 1).double(), CounterRng.seeded(range(seed, seed + count))
        memory, i = order.init(x, torch.ones_like(x, dtype=torch.bool), corruption, grid), 0
        while not bool(memory.done.all()):
            x, memory = order.step(self.predict, x, i, memory, rng.at(i))
            i += 1
        return x

    def shares(self, x: Tensor) -> Tensor:
        """[S] how often each sequence is among x [N,L]."""
        place = (x * _TOKENS ** torch.arange(_LENGTH - 1, -1, -1)).sum(1)
        return torch.bincount(place, minlength=len(self.states)) / len(x)

    def off(self, x: Tensor) -> float:
        """The total variation of what was sampled from the law."""
        return float((self.shares(x) - self.law).abs().sum() / 2)

    def floor(self, count: int, seed: int) -> float:
        """The mean total variation of as many fresh draws from the law itself."""
        draws = CounterRng.seeded(range(seed, seed + _FLOORS)).split("floor").uniform(count)
        return sum(self.off(self.states[draw(self.law.expand(count, -1), each)]) for each in draws) / _FLOORS


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    seed, count = bench.effort.seed, bench.effort.draws
    toy = Toy.drawn(seed)
    floor = toy.floor(count, seed)
    x = toy.sampled(_PUBLISHED, count, seed)
    off, bits = toy.off(x), float(entropy(toy.shares(x))) / math.log(2)
    true_bits = float(entropy(toy.law)) / math.log(2)
    told = f"{off:.3f} for {floor:.3f}, entropy {bits:.2f} bits for {true_bits:.2f}, {count} draws"
    numbers = {"variation": off, "floor": floor, "entropy": bits, "entropy of the law": true_bits}
    yield Finding(TRAP, off / floor, told, numbers)
    found = {name: toy.off(toy.sampled(config, count, seed)) for name, config in _BY_LAW.items()}
    yield Finding(BY_LAW, max(found.values()) / floor, f"{max(found.values()):.3f} for {floor:.3f}, {count} draws", found)
    rules = [toy.sampled(ConfidenceConfig(per_step=1, temperature=0, rank_by=by), 1, seed) for by in ("law", "sampled")]
    yield Finding(GREEDY, float(torch.equal(*rules)), "one sequence: nothing is drawn")


CLAIM = Claim(
    "sampler-trap",
    "Nie et al. 2025, arXiv 2502.09992; Chang et al. 2022, arXiv 2202.04200",
    "Ranking positions by the probability of the token just drawn does not sample the model, however good it is; ranking them by "
    "the predicted law does.",
    (TRAP, BY_LAW, GREEDY),
    measure,
)
