"""Learning-rate schedules: a factor on the peak rate, as a function of the step and of the fraction of the budget used.

The fraction comes from outside, so the same schedule anneals a run limited by steps, tokens or seconds. This file knows no
optimizer.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import final

from pydantic import Field, model_validator

from fewstep.core.recipe import Config


class Schedule(Config):
    """A linear warm-up, then a decay.

    `warmup` steps, but at most the fraction `warmup_share` of the budget, so that a short run anneals too (Differs: the
    papers give steps alone; set `warmup_share=1` for theirs).
    """

    warmup: int = Field(100, ge=0)
    warmup_share: float = Field(0.1, ge=0, le=1)

    @abstractmethod
    def decay(self, progress: float) -> float:
        """The factor after the warm-up, at `progress` in [0, 1] of the budget."""

    @final
    def factor(self, step: int, progress: float) -> float:
        """The factor in [0, 1] on the peak learning rate of step `step` (from 0), when `progress` of the budget is used."""
        by_steps = (step + 1) / self.warmup if self.warmup else 1.0
        by_share = progress / self.warmup_share if self.warmup_share else 1.0
        return min(1.0, max(by_steps, by_share)) * self.decay(min(1.0, progress))


@final
class Cosine(Schedule):
    """Half a cosine from the peak to `floor` of it."""

    kind = "cosine"
    source = "Loshchilov and Hutter, SGDR, arXiv:1608.03983"

    floor: float = Field(0.1, ge=0, le=1)

    def decay(self, progress: float) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


@final
class MultiStep(Schedule):
    """Constant pieces: the factor becomes `factors[i]` when `milestones[i]` of the budget is used."""

    kind = "multi_step"
    source = "DeepSeek LLM, arXiv:2401.02954, section 2.3"

    warmup: int = Field(2000, ge=0)
    milestones: tuple[float, ...] = (0.8, 0.9)
    factors: tuple[float, ...] = (0.316, 0.1)

    @model_validator(mode="after")
    def _pairs(self) -> "MultiStep":
        if len(self.milestones) != len(self.factors):
            raise ValueError(
                f"milestones={self.milestones}: needs one entry per factor ({len(self.factors)}); give both the same length"
            )
        if list(self.milestones) != sorted(set(self.milestones)) or not all(0 < milestone < 1 for milestone in self.milestones):
            raise ValueError(f"milestones={self.milestones}: must rise strictly inside (0, 1); they are fractions of the budget")
        return self

    def decay(self, progress: float) -> float:
        passed = sum(progress >= milestone for milestone in self.milestones)
        return self.factors[passed - 1] if passed else 1.0


@final
class WarmupStableDecay(Schedule):
    """The peak, then a linear descent to `floor` of it over the last `share` of the budget."""

    kind = "wsd"
    source = "MiniCPM, arXiv:2404.06395; linear descent after Haegele et al., arXiv:2405.18392"

    share: float = Field(0.2, gt=0, le=1)
    floor: float = Field(0.0, ge=0, le=1)

    def decay(self, progress: float) -> float:
        return self.floor + (1 - self.floor) * min(1.0, (1 - progress) / self.share)


SCHEDULES: Mapping[str, type[Schedule]] = MappingProxyType(
    {config.kind: config for config in (WarmupStableDecay, Cosine, MultiStep)}
)
