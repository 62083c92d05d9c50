"""What drafters without a network remember of each row, in plain Python. This file knows no drafter."""

from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar, final

from torch import Tensor


class Memory(Protocol):
    """What is remembered of one row."""

    def copy(self) -> Self:
        """The same memory, to go on from by itself."""
        ...

    def nbytes(self) -> int:
        """Bytes held."""
        ...


M = TypeVar("M", bound=Memory)


@final
@dataclass(frozen=True, slots=True)
class Memories(Generic[M]):
    """The memory of each row. Linear: `propose` and `observe` change it in place; cost of `fork`: a copy of each."""

    rows: tuple[M, ...]

    def fork(self, rows: Tensor) -> "Memories[M]":
        return Memories(tuple(self.rows[row].copy() for row in rows.tolist()))

    def join(self, other: "Memories[M]") -> "Memories[M]":
        return Memories(self.rows + other.rows)

    def nbytes(self) -> int:
        return sum(row.nbytes() for row in self.rows)
