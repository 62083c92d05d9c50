"""Orders that reveal so many positions a step, the best by some score: random, confidence, margin, entropy."""

from abc import abstractmethod
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.random import Rng
from fewstep.diffusion.categorical import entropy
from fewstep.diffusion.orders.base import OrderConfig, Progress, Revealing, best


class RankedConfig(OrderConfig):
    """`per_step` positions a step; None: what the grid and the noise schedule expect, spread over the steps, at least one."""

    per_step: int | None = Field(default=None, ge=1)

    @abstractmethod
    def score(self, p_0: Tensor, tokens: Tensor, rng: Rng) -> Tensor:
        """[B,L]: how early each position should be revealed, from p_0 [B,L,V] and the tokens [B,L] drawn."""
        ...

    def build(self) -> "Ranked":
        return Ranked(self)


@final
class RandomConfig(RankedConfig):
    """Any position: with exact predictions and one position a step it samples the data's law, as every law-ranked order does."""

    kind: ClassVar[str] = "random"
    source: ClassVar[str] = "Austin et al. 2021, arXiv 2107.03006; Nie et al. 2025, arXiv 2502.09992, section 2.4"

    def score(self, p_0: Tensor, tokens: Tensor, rng: Rng) -> Tensor:
        return rng.split("order").uniform(tokens.shape[1])


@final
class ConfidenceConfig(RankedConfig):
    """The most probable token's probability: low-confidence remasking, where what is not kept stays masked.

    `rank_by` "sampled" ranks by the probability of the token just drawn, as published: at temperatures above 0 that favours
    positions that happened to draw a probable token, and what is sampled is no longer the model's law.
    """

    kind: ClassVar[str] = "confidence"
    source: ClassVar[str] = "Chang et al. 2022, arXiv 2202.04200; Nie et al. 2025, arXiv 2502.09992, algorithm 5"
    claims: ClassVar[tuple[str, ...]] = ("sampler-trap",)

    rank_by: Literal["law", "sampled"] = "law"

    def score(self, p_0: Tensor, tokens: Tensor, rng: Rng) -> Tensor:
        return p_0.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) if self.rank_by == "sampled" else p_0.amax(-1)


@final
class MarginConfig(RankedConfig):
    """How far the most probable token is ahead of the next."""

    kind: ClassVar[str] = "margin"
    source: ClassVar[str] = "Kim et al. 2025, arXiv 2502.06768, section 4"

    def score(self, p_0: Tensor, tokens: Tensor, rng: Rng) -> Tensor:
        first, second = p_0.topk(2, -1).values.unbind(-1)
        return first - second


@final
class EntropyConfig(RankedConfig):
    """The least entropy first."""

    kind: ClassVar[str] = "entropy"
    source: ClassVar[str] = "Ye et al. 2025, arXiv 2508.15487 (Dream)"

    def score(self, p_0: Tensor, tokens: Tensor, rng: Rng) -> Tensor:
        return -entropy(p_0)


@final
class Ranked(Revealing):
    """Cost: one call a step, a sort of the positions.

    Differs: where the published code gives the first steps one position more each, the remainder is spread over all of them.
    """

    def __init__(self, config: RankedConfig) -> None:
        super().__init__(config)
        self._ranked = config

    def choose(self, p_0: Tensor, tokens: Tensor, masked: Tensor, i: int, memory: Progress, rng: Rng) -> Tensor:
        count = self._count(masked.sum(1), i, memory)
        return best(self._ranked.score(p_0, tokens, rng), masked, count)

    def _count(self, left: Tensor, i: int, memory: Progress) -> Tensor:
        """[B] positions to reveal of the `left` [B]."""
        if self._ranked.per_step is not None:
            return torch.full_like(left, self._ranked.per_step)
        noise = 1 - memory.corruption.keep(memory.grid[torch.tensor([0, min(i + 1, memory.steps)], device=left.device)])
        after = torch.floor(memory.total * noise[1] / noise[0] + 1e-9).long()  # what rounding took is given back
        return (left - after).clamp(min=1)
