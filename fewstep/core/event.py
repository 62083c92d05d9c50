"""What every loop emits: a payload and what it cost so far."""

from dataclasses import asdict, dataclass
from typing import Generic, TypeVar, final

P = TypeVar("P")


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """What generating cost. A call is one evaluation of the target network for a row; prefill is counted apart.

    `tokens` emitted; `seconds` of wall time; `bytes` of decoding state at its largest.
    """

    calls: int = 0
    draft_calls: int = 0
    prefill_calls: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.calls + other.calls,
            self.draft_calls + other.draft_calls,
            self.prefill_calls + other.prefill_calls,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            max(self.bytes, other.bytes),
        )

    @property
    def tokens_per_call(self) -> float:
        """Emitted tokens per call, prefill apart. The prefill emits one token per row, which is not counted."""
        return (self.tokens - self.prefill_calls) / self.calls if self.calls else 0.0

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "tokens_per_call": self.tokens_per_call}


@final
@dataclass(frozen=True, slots=True)
class Event(Generic[P]):
    """A payload, and the cost of everything up to it."""

    payload: P
    cost: Cost
