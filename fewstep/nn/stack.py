"""The state of a stack of layers: one state per layer, one shared slot table."""

from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor

from fewstep.core.mixer import State
from fewstep.nn.mixers.attention import AttentionState
from fewstep.nn.slots import Slots


@final
class StackState:
    """Per-layer states that move together. `slots` counts tokens for the whole stack; caches that use slots share it."""

    def __init__(self, layers: Sequence[State], slots: Slots) -> None:
        self.slots = slots
        self.layers = list(layers)

    @classmethod
    def empty(cls, layers: Sequence[State], slots: Slots) -> "StackState":
        """A fresh stack whose slot caches all use the table `slots`, so that each transition is computed once."""
        for layer in layers:
            if isinstance(layer, AttentionState):
                layer.slots = slots
        return cls(layers, slots)

    def commit(self, path: Tensor, keep: Tensor) -> "StackState":
        return StackState([layer.commit(path, keep) for layer in self.layers], self.slots.commit(path, keep)[0])

    def rollback(self) -> "StackState":
        return self._each(lambda layer: layer.rollback(), self.slots.rollback())

    def fork(self, rows: Tensor) -> "StackState":
        return self._each(lambda layer: layer.fork(rows), self.slots.fork(rows))

    def join(self, other: "StackState") -> "StackState":
        layers = [mine.join(theirs) for mine, theirs in zip(self.layers, other.layers, strict=True)]
        return StackState(layers, self.slots.join(other.slots))

    def nbytes(self) -> int:
        return sum(layer.nbytes() for layer in self.layers)

    def _each(self, change: Callable[[State], State], slots: Slots) -> "StackState":
        return StackState([change(layer) for layer in self.layers], slots)
