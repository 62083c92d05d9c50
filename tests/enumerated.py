"""Joint laws over so few sequences that everything about diffusing them can be enumerated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor

from fewstep.core.corruption import Corruption
from fewstep.core.random import CounterRng
from fewstep.diffusion.corruptions import absorber


@dataclass(frozen=True)
class Joint:
    """`law` [S] of all sequences `states` [S,L] over `vocab` tokens; a mask, where one is needed, is token `vocab`."""

    states: Tensor
    law: Tensor
    vocab: int

    @classmethod
    def drawn(cls, vocab: int, length: int, seed: int, sharpness: float = 0.8) -> Joint:
        states = torch.tensor(list(product(range(vocab), repeat=length)))
        logits = sharpness * torch.randn(len(states), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return cls(states, logits.softmax(0), vocab)

    @property
    def length(self) -> int:
        return self.states.shape[1]

    def noisy(self, mask: bool) -> Tensor:
        """Every sequence that corruption may lead to."""
        return torch.tensor(list(product(range(self.vocab + mask), repeat=self.length)))

    def denoiser(self, corruption: Corruption) -> Callable[[Tensor, Tensor], Tensor]:
        """The exact law of x_0 at each position given x_t; under absorption one table for all times."""
        if absorber(corruption) is None:
            return lambda x, t: self.predicted(x, corruption.keep(t), corruption.prior)
        noisy = self.noisy(True)
        table = self.predicted(noisy, torch.full((len(noisy),), 0.5, dtype=torch.float64), corruption.prior)
        place = (self.vocab + 1) ** torch.arange(self.length - 1, -1, -1)
        return lambda x, t: table[(x * place).sum(1)]

    def predicted(self, x: Tensor, keep: Tensor, prior: Tensor) -> Tensor:
        """[N,L,V] by Bayes' rule over all sequences, for x [N,L] of which a share `keep` [N] survived."""
        level = keep.unsqueeze(1)
        likely = self.law.expand(len(x), -1)
        for j in range(self.length):
            likely = likely * (level * (x[:, j, None] == self.states[:, j]) + (1 - level) * prior[x[:, j]].unsqueeze(1))
        likely = likely / likely.sum(1, keepdim=True)
        return torch.einsum("bs,slv->blv", likely, torch.nn.functional.one_hot(self.states, len(prior)).double())

    def shares(self, x: Tensor) -> Tensor:
        """[S] how often each sequence is among `x` [N,L]."""
        return torch.bincount(self.index(x), minlength=len(self.states)) / len(x)

    def index(self, x: Tensor) -> Tensor:
        return (x * self.vocab ** torch.arange(self.length - 1, -1, -1)).sum(1)

    def mean_over_orders(self, x: Tensor) -> Tensor:
        """The mean, over all orders, of the sum of -ln p(token | those before it in the order): -ln p(x) for each of them."""
        total, orders = 0.0, list(permutations(range(self.length)))
        for order in orders:
            for n, position in enumerate(order):
                seen = torch.tensor(order[:n], dtype=torch.int64)
                both = torch.tensor([*order[:n], position])
                total = total - torch.log(self._mass(x, both) / self._mass(x, seen))
        return total / len(orders)  # type: ignore[return-value]

    def _mass(self, x: Tensor, positions: Tensor) -> Tensor:
        return (self.law * (self.states[:, positions] == x[positions]).all(1)).sum()


def variation(found: Tensor, law: Tensor) -> float:
    """Total variation between two laws over the same set."""
    return float((found - law).abs().sum() / 2)


def run(order: Any, corruption: Any, grid: Tensor, x: Tensor, free: Tensor, predict: Any, seed: int) -> tuple[Tensor, int]:
    """A canvas carried to its end by an order alone, and the steps it took."""
    rng = CounterRng.seeded(range(seed, seed + len(x)))
    memory, i = order.init(x, free, corruption, grid), 0
    while not bool(memory.done.all()):
        x, memory = order.step(predict, x, i, memory, rng.at(i))
        i += 1
    return x, i


def patterns(length: int) -> Iterator[Tensor]:
    """Every set of masked positions."""
    for bits in product([False, True], repeat=length):
        yield torch.tensor(bits)
