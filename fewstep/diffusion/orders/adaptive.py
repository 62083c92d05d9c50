"""Orders that reveal as many positions as the prediction is sure of, row by row: threshold, factor, entropy bound, editing."""

from dataclasses import replace
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.corruption import Predict
from fewstep.core.random import Rng
from fewstep.diffusion.categorical import entropy
from fewstep.diffusion.orders.base import OrderConfig, Progress, Revealing, best, mask_of, ranks


@final
class ThresholdConfig(OrderConfig):
    """Every position whose most probable token has more than `threshold`, and the surest one.

    `rank_by` "sampled" asks it of the token drawn, as published; see `confidence` for what that does.
    """

    kind: ClassVar[str] = "threshold"
    source: ClassVar[str] = "Wu et al. 2025, arXiv 2505.22618, section 3.3 (Fast-dLLM)"
    claims: ClassVar[tuple[str, ...]] = ("parallel-decoding",)

    threshold: float = Field(default=0.9, ge=0, le=1)
    rank_by: Literal["law", "sampled"] = "law"

    def build(self) -> "Threshold":
        return Threshold(self)


@final
class Threshold(Revealing):
    """Cost: one call a step; the steps are as many as the row needs."""

    def __init__(self, config: ThresholdConfig) -> None:
        super().__init__(config)
        self._threshold, self._sampled = config.threshold, config.rank_by == "sampled"

    def choose(self, p_0: Tensor, tokens: Tensor, masked: Tensor, i: int, memory: Progress, rng: Rng) -> Tensor:
        sure = p_0.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) if self._sampled else p_0.amax(-1)
        return (sure > self._threshold) | best(sure, masked, torch.ones_like(memory.total))


@final
class FactorConfig(OrderConfig):
    """The n surest positions, n the largest with (n + 1)(1 - c_n) < `factor`, where c_n is the least probability among them."""

    kind: ClassVar[str] = "factor"
    source: ClassVar[str] = "Wu et al. 2025, arXiv 2505.22618, section 3.3 (Fast-dLLM)"

    factor: float = Field(default=1.0, gt=0)

    def build(self) -> "Factor":
        return Factor(self)


@final
class Factor(Revealing):
    """Cost: one call a step; the steps are as many as the row needs. At least the surest position is revealed."""

    def __init__(self, config: FactorConfig) -> None:
        super().__init__(config)
        self._factor = config.factor

    def choose(self, p_0: Tensor, tokens: Tensor, masked: Tensor, i: int, memory: Progress, rng: Rng) -> Tensor:
        sure = p_0.amax(-1)
        place = ranks(sure, masked)
        fits = ((place + 2) * (1 - sure) < self._factor) & masked
        count = torch.where(fits, place + 1, 0).amax(1).clamp(min=1)
        return place < count.unsqueeze(1)


@final
class EntropyBoundConfig(OrderConfig):
    """The positions of least entropy whose entropies, the largest left out, add up to at most `bound` nats.

    The sum bounds how far tokens drawn at once are from tokens drawn in turn.
    """

    kind: ClassVar[str] = "entropy-bound"
    source: ClassVar[str] = "Ben-Hamu et al. 2025, arXiv 2505.24857 (EB-Sampler)"

    bound: float = Field(default=0.1, ge=0)

    def build(self) -> "EntropyBound":
        return EntropyBound(self)


@final
class EntropyBound(Revealing):
    """Cost: one call a step; the steps are as many as the row needs. At least one position is revealed."""

    def __init__(self, config: EntropyBoundConfig) -> None:
        super().__init__(config)
        self._bound = config.bound

    def choose(self, p_0: Tensor, tokens: Tensor, masked: Tensor, i: int, memory: Progress, rng: Rng) -> Tensor:
        unsure = entropy(p_0)
        place = ranks(-unsure, masked)
        ranked = torch.zeros_like(unsure).scatter(1, place, unsure)
        before = ranked.cumsum(1) - ranked  # a prefix's largest entropy is its last
        return (before <= self._bound).gather(1, place)


@final
class EditingConfig(OrderConfig):
    """`threshold` decides what is revealed; a placed token gives way to one that is predicted with more than `edit`.

    Ends when a step edits nothing and no mask is left, at the latest with the grid, whose last step reveals what is left.
    Differs: given tokens are never edited.
    """

    kind: ClassVar[str] = "editing"
    source: ClassVar[str] = "LLaDA2.1, arXiv 2602.08676"

    threshold: float = Field(default=0.9, ge=0, le=1)
    edit: float = Field(default=0.9, ge=0, le=1)

    def build(self) -> "Editing":
        return Editing(self)


@final
class Editing(Revealing):
    """Cost: one call a step, at most as many as the grid has."""

    def __init__(self, config: EditingConfig) -> None:
        super().__init__(config)
        self._threshold, self._edit = config.threshold, config.edit

    def step(self, predict: Predict, x: Tensor, i: int, memory: Progress, rng: Rng) -> tuple[Tensor, Progress]:
        laws: list[Tensor] = []

        def kept(x: Tensor, t: Tensor) -> Tensor:
            laws.append(predict(x, t))
            return laws[-1]

        masked = memory.free & (x == mask_of(memory.corruption, self._config.kind))
        y, memory = super().step(kept, x, i, memory, rng)
        sure, token = laws[0].max(-1)
        edited = memory.free & ~masked & (token != x) & (sure > self._edit)
        done = (memory.done & ~edited.any(1)) | (i + 1 >= memory.steps)
        return torch.where(edited, token, y), replace(memory, done=done)

    def choose(self, p_0: Tensor, tokens: Tensor, masked: Tensor, i: int, memory: Progress, rng: Rng) -> Tensor:
        if i + 1 >= memory.steps:
            return masked
        sure = p_0.amax(-1)
        return (sure > self._threshold) | best(sure, masked, torch.ones_like(memory.total))
