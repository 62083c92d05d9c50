"""Means of losses and metrics over steps, weighted by the units each step scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.core.objective import Loss


@final
@dataclass(frozen=True, slots=True)
class Measured:
    """One optimizer step, or one validation batch: the mean loss over `units`, metrics likewise, and what the optimizer saw."""

    loss: float
    units: int
    metrics: Mapping[str, Tensor]
    tokens: int = 0
    norm: float = 0.0
    factor: float = 0.0


@final
class Meter:
    """Running means. Metrics stay on their device until they are read."""

    def __init__(self) -> None:
        self._total = 0.0
        self._units = 0
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0

    def add(self, measured: Measured) -> None:
        self._total += measured.loss * measured.units
        self._units += measured.units
        self._tokens += measured.tokens
        for name, value in measured.metrics.items():
            weighted = value.float() * measured.units
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted

    @property
    def units(self) -> int:
        return self._units

    @property
    def tokens(self) -> int:
        return self._tokens

    def means(self) -> dict[str, float]:
        """The mean "loss" and metrics. Raises ZeroDivisionError before the first `add`."""
        return {"loss": self._total / self._units, **{name: float(total) / self._units for name, total in self._sums.items()}}


def mean(losses: Sequence[Loss]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the metrics of micro-batches as of one batch: means weighted by units."""
    units = sum(loss.units for loss in losses)
    weights = [loss.units / units for loss in losses]
    value = torch.stack([loss.value.detach().float() * weight for loss, weight in zip(losses, weights, strict=True)]).sum()
    names = dict.fromkeys(name for loss in losses for name in loss.metrics)
    metrics = {
        name: torch.stack(
            [loss.metrics[name].detach() * weight for loss, weight in zip(losses, weights, strict=True) if name in loss.metrics]
        ).sum()
        for name in names
    }
    return value, metrics
