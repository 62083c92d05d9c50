"""Discrete diffusion: a token survives to time t with probability keep(t), else it is drawn from a prior. Contracts."""

from collections.abc import Callable
from typing import Protocol, Self, TypeVar

from torch import Tensor

from fewstep.core.random import Rng


class Corruption(Protocol):
    """`prior` [V]; times t and s are [B] or [B,L]."""

    prior: Tensor

    def keep(self, t: Tensor) -> Tensor: ...

    def time(self, keep: Tensor) -> Tensor: ...

    def corrupt(self, x_0: Tensor, t: Tensor, rng: Rng) -> Tensor: ...

    def posterior(self, x_t: Tensor, p_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The law of x_s given x_t [B,L] and the predicted law p_0 [B,L,V] of x_0: [B,L,V]."""
        ...


Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t [B,L], t) -> p_0 [B,L,V]; the closure holds cache, block mask, guidance


class Memory(Protocol):
    """What an order knows of a run: `done` [R] bool, the rows whose window is final; `fork` keeps only the rows asked for."""

    @property
    def done(self) -> Tensor: ...

    def fork(self, rows: Tensor) -> Self: ...


M = TypeVar("M", bound=Memory)


class Order(Protocol[M]):
    """Which positions are revealed, or redone, next."""

    def init(self, x: Tensor, free: Tensor, corruption: Corruption, grid: Tensor) -> M:
        """`free` [B,L] bool: gaps of any pattern."""
        ...

    def step(self, predict: Predict, x: Tensor, i: int, memory: M, rng: Rng) -> tuple[Tensor, M]: ...
