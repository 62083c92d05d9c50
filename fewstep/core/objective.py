"""What is minimised: the trainer knows this contract and no objective."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from torch import Tensor, nn

from fewstep.core.random import Rng


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """A training batch. `tokens` [B,T] int64; `segments` [B,T] int64 (-1 = padding) or None; `extra` by name for other data."""

    tokens: Tensor
    segments: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Loss:
    """`value` scalar, a sum divided by the `units` (tokens, pixels) scored; `metrics` detached scalars by name."""

    value: Tensor
    units: int
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    """Turns a batch into a loss; may keep state of its own (EMA teachers, noise windows), which a checkpoint carries."""

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss: ...

    def after_step(self, model: nn.Module) -> None:
        """Called after each optimizer step (EMA teachers, expert biases)."""
        ...

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Called with the metrics of each validation."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
