"""What orders share: how far each row has come, and a step that predicts, draws a token for every position and keeps some.

Positions are ranked by the predicted law before temperature and nucleus cut it; tokens are drawn from what these leave. This file
knows no order.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.corruption import Corruption, Predict
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.diffusion.categorical import draw, sharpened
from fewstep.diffusion.corruptions import absorber

_ROUNDING = 1e-5  # of scores of the order of one, computed in float32


class OrderConfig(Config):
    """An order whose tokens are drawn at `temperature` (0: the most probable) from the nucleus of mass `top_p`."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)

    def sharpened(self, law: Tensor) -> Tensor:
        """What tokens are drawn from, [...,V] float64, where `law` was predicted."""
        return sharpened(law.double(), self.temperature, self.top_p)


@final
@dataclass(frozen=True, slots=True)
class Progress:
    """The memory of every order: the positions `free` [B,L] to change, how many there were [B], and which rows are `done` [B].

    `noise` [B]: the share 1 - keep of noise that a row has left, on its own clock.
    """

    free: Tensor
    corruption: Corruption
    grid: Tensor
    total: Tensor
    noise: Tensor
    done: Tensor

    def fork(self, rows: Tensor) -> "Progress":
        """Row `rows[i]` as row i."""
        return replace(self, free=self.free[rows], total=self.total[rows], noise=self.noise[rows], done=self.done[rows])

    @property
    def steps(self) -> int:
        return len(self.grid) - 1

    def times(self, i: int) -> tuple[Tensor, Tensor]:
        """The times [B] between which step i of the grid goes. Raises ValueError beyond its end."""
        if i >= self.steps:
            raise ValueError(f"step {i}: the grid ends at step {self.steps - 1}; make a longer one")
        ends = self.grid[i : i + 2].expand(len(self.free), 2)
        return ends[:, 0], ends[:, 1]


def begin(x: Tensor, free: Tensor, corruption: Corruption, grid: Tensor) -> Progress:
    """The progress of a canvas on which nothing was done. Raises ValueError for a grid that does not fall to 0."""
    grid = grid.double()
    if grid.dim() != 1 or len(grid) < 2 or not bool((grid.diff() < 0).all()) or float(grid[-1]) != 0 or float(grid[0]) > 1:
        raise ValueError("grid: expected times [K+1] that fall from at most 1 to 0; use torch.linspace(1, 0, K + 1)")
    total = free.sum(1)
    return Progress(free, corruption, grid, total, torch.ones_like(total, dtype=torch.float64), total == 0)


class Revealing(ABC):
    """An order under absorption that replaces masks, each for good. Raises ValueError for a corruption without a mask."""

    def __init__(self, config: OrderConfig) -> None:
        self._config = config

    def init(self, x: Tensor, free: Tensor, corruption: Corruption, grid: Tensor) -> Progress:
        progress = begin(x, free, corruption, grid)
        masked = free & (x == mask_of(corruption, self._config.kind))
        total = masked.sum(1)
        return replace(progress, total=total, done=total == 0)

    def step(self, predict: Predict, x: Tensor, i: int, memory: Progress, rng: Rng) -> tuple[Tensor, Progress]:
        mask = mask_of(memory.corruption, self._config.kind)
        masked = memory.free & (x == mask)
        memory = self.tick(masked, memory, rng)
        p_0 = predict(x, memory.corruption.time(1 - memory.noise))
        tokens = draw(self._config.sharpened(p_0), rng.split("token").uniform(x.shape[1]))
        chosen = self.choose(p_0, tokens, masked, i, memory, rng) & masked
        return torch.where(chosen, tokens, x), replace(memory, done=~(masked & ~chosen).any(1))

    def tick(self, masked: Tensor, memory: Progress, rng: Rng) -> Progress:
        """The clock before the prediction: the share of positions still masked [B,L]."""
        return replace(memory, noise=masked.sum(1) / memory.total.clamp(min=1))

    @abstractmethod
    def choose(self, p_0: Tensor, tokens: Tensor, masked: Tensor, i: int, memory: Progress, rng: Rng) -> Tensor:
        """[B,L] bool: which of the `masked` positions take the `tokens` drawn there; at least one of each row that has any."""
        ...


def mask_of(corruption: Corruption, kind: str) -> int:
    """The mask token. Raises ValueError where the corruption has none."""
    token = absorber(corruption)
    if token is None:
        raise ValueError(f"order={kind!r}: reveals masks, which this corruption has none of; choose ancestral, euler or analytic")
    return token


def best(score: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """[B,L] bool: the `count` [B] masked positions of the highest scores [B,L], ties to the left."""
    return ranks(score, masked) < count.unsqueeze(1)


def ranks(score: Tensor, masked: Tensor) -> Tensor:
    """[B,L] int64: the place of each position among the masked ones, the highest score first, ties to the left.

    Scores that differ by rounding are ties: on a canvas of nothing but masks all predictions are one and the same, and what the
    last bits are depends on who shares the batch.
    """
    ranked, order = score.masked_fill(~masked, -torch.inf).sort(dim=-1, descending=True, stable=True)
    group = (ranked[:, :-1] - ranked[:, 1:] > _ROUNDING).long().cumsum(1)
    key = torch.nn.functional.pad(group, (1, 0)) * score.shape[1] + order
    return order.gather(1, key.argsort(-1)).argsort(-1)
