"""Orders that follow the reverse process itself: ancestral, Euler, analytic, remasking, first hitting."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.corruption import Corruption, Predict
from fewstep.core.random import Rng
from fewstep.diffusion.categorical import draw
from fewstep.diffusion.corruptions import absorber
from fewstep.diffusion.orders.base import OrderConfig, Progress, Revealing, begin, best, mask_of
from fewstep.diffusion.scores import reverse_rates, scores

_LEAST = 1e-12  # of keep(t) where it divides: at 0 nothing is known of x_0 and any positive number gives the same law


class Reversing(ABC):
    """An order that draws all positions of x_s at once given x_t, along the grid. Cost: one call a step.

    Under absorption a row is done when no mask is left, unless the order may set new ones.
    """

    remasks: ClassVar[bool] = False

    def __init__(self, config: OrderConfig) -> None:
        self._config = config

    def init(self, x: Tensor, free: Tensor, corruption: Corruption, grid: Tensor) -> Progress:
        return begin(x, free, corruption, grid)

    def step(self, predict: Predict, x: Tensor, i: int, memory: Progress, rng: Rng) -> tuple[Tensor, Progress]:
        t, s = memory.times(i)
        p_0 = self._config.sharpened(predict(x, t))
        last = i + 1 == memory.steps
        law = memory.corruption.posterior(x, p_0, t, s) if last else self.law(memory.corruption, x, p_0, t, s)
        x = torch.where(memory.free, draw(law, rng.split("token").uniform(x.shape[1])), x)
        mask = absorber(memory.corruption)
        left = memory.free if mask is None or self.remasks else memory.free & (x == mask)
        return x, replace(memory, done=torch.ones_like(memory.done) if last else ~left.any(1))

    @abstractmethod
    def law(self, corruption: Corruption, x: Tensor, p_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Weights [B,L,V] of x_s given x_t; the last step, to t = 0, always takes the posterior."""
        ...


@final
class AncestralConfig(OrderConfig):
    """x_s from the posterior given x_t and the predicted law of x_0, D3PM's and MDLM's sampler."""

    kind: ClassVar[str] = "ancestral"
    source: ClassVar[str] = "Austin et al. 2021, arXiv 2107.03006, equation 4; Sahoo et al. 2024, arXiv 2406.07524, equation 7"

    def build(self) -> "Ancestral":
        return Ancestral(self)


@final
class Ancestral(Reversing):
    """The posterior at every step."""

    def law(self, corruption: Corruption, x: Tensor, p_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return corruption.posterior(x, p_0, t, s)


@final
class EulerConfig(OrderConfig):
    """Tau-leaping: each position jumps with its reverse rate at t times the step.

    Differs: scores are those of the predicted law, and the last step takes the posterior to t = 0.
    """

    kind: ClassVar[str] = "euler"
    source: ClassVar[str] = "Lou et al. 2024, arXiv 2310.16834, section 4.2; Campbell et al. 2022, arXiv 2205.14987"

    def build(self) -> "Euler":
        return Euler(self)


@final
class Euler(Reversing):
    """One-hot plus rates times the step; where the rates exceed one, they are all there is."""

    def law(self, corruption: Corruption, x: Tensor, p_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        jumps = (t - s)[:, None, None] * reverse_rates(corruption, x, p_0, t)
        stay = (1 - jumps.sum(-1, keepdim=True)).clamp(min=0)
        return jumps.scatter(-1, x.unsqueeze(-1), stay)


@final
class AnalyticConfig(OrderConfig):
    """Tweedie tau-leaping: the score carried back over the step, times the transition.

    Differs: scores are those of the predicted law, so that the law is the posterior's (arXiv 2406.03736, section 3.3).
    """

    kind: ClassVar[str] = "analytic"
    source: ClassVar[str] = "Lou et al. 2024, arXiv 2310.16834, theorem 4.2"

    def build(self) -> "Analytic":
        return Analytic(self)


@final
class Analytic(Reversing):
    """exp(-sigma Q) applied to the score, times exp(sigma Q)(x_s, x_t)."""

    def law(self, corruption: Corruption, x: Tensor, p_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        t = torch.minimum(t, corruption.time(torch.full_like(t, _LEAST)))
        between = (corruption.keep(t) / corruption.keep(s))[:, None, None]
        score = scores(corruption, x, p_0, t)
        carried = (score - (1 - between) * corruption.prior * score.sum(-1, keepdim=True)) / between
        own = torch.nn.functional.one_hot(x, p_0.shape[-1]).double()
        reached = between * own + (1 - between) * corruption.prior[x].unsqueeze(-1)
        return (carried * reached).clamp(min=0)


@final
class RemaskingConfig(OrderConfig):
    """The posterior that also masks a placed token again, with a probability of at most `cap` a step.

    The marginals of x_t stay those of the corruption, whatever the probability.
    """

    kind: ClassVar[str] = "remasking"
    source: ClassVar[str] = "Wang et al. 2025, arXiv 2503.00307, equation 4 and section 4.1 (ReMDM, capped)"

    cap: float = Field(default=0.02, ge=0, le=1)

    def build(self) -> "Remasking":
        return Remasking(self)


@final
class Remasking(Reversing):
    """Raises ValueError for a corruption without a mask."""

    remasks: ClassVar[bool] = True

    def __init__(self, config: RemaskingConfig) -> None:
        super().__init__(config)
        self._cap = config.cap

    def law(self, corruption: Corruption, x: Tensor, p_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        mask = mask_of(corruption, self._config.kind)
        keep_t, keep_s = corruption.keep(t), corruption.keep(s)
        again = torch.minimum((1 - keep_s) / keep_t.clamp(min=_LEAST), torch.full_like(keep_t, self._cap))
        reveal = (keep_s - (1 - again) * keep_t) / (1 - keep_t)
        known, own = (x != mask).unsqueeze(-1), torch.nn.functional.one_hot(x, p_0.shape[-1]).double()
        law = torch.where(known, own, p_0.index_fill(-1, x.new_tensor([mask]), 0))
        share = torch.where(known.squeeze(-1), (1 - again)[:, None], reveal[:, None]).unsqueeze(-1)
        law = share * law / law.sum(-1, keepdim=True)
        law[..., mask] = (1 - share).squeeze(-1)
        return law


@final
class FirstHittingConfig(OrderConfig):
    """One token a step, at the very time at which the reverse process next reveals one: exact, with no error of a grid.

    Each row has its own clock. Differs: published for one row at a time.
    """

    kind: ClassVar[str] = "first-hitting"
    source: ClassVar[str] = "Zheng et al. 2024, arXiv 2409.02908, section 4.1; Arriola et al. 2025, arXiv 2503.09573"

    def build(self) -> "FirstHitting":
        return FirstHitting(self)


@final
class FirstHitting(Revealing):
    """Cost: one call for every position."""

    def tick(self, masked: Tensor, memory: Progress, rng: Rng) -> Progress:
        u = 1 - rng.split("time").uniform()  # in (0, 1]
        return replace(memory, noise=memory.noise * u ** (1 / masked.sum(1).clamp(min=1)))

    def choose(self, p_0: Tensor, tokens: Tensor, masked: Tensor, i: int, memory: Progress, rng: Rng) -> Tensor:
        order = rng.split("order").uniform(masked.shape[1])
        return best(order, masked, torch.ones_like(memory.total))
