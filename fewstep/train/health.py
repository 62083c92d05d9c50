"""When a run must stop: a loss that is no number, or one that loses again what it had gained. No model, no optimizer."""

import math
from collections.abc import Mapping
from typing import final


@final
class Diverged(ValueError):
    """Training stopped itself; the message names the step, the value and the next move."""


@final
class Watch:
    """Follows the loss of a run, smoothed over about `window` steps.

    The run has diverged when the smoothed loss stands above its best by more than the fraction `allowed` of all it had gained
    since the start, and by more than four times the present deviation of a single step, so that one bad batch stops nothing.
    The rule has no units: it serves losses of any scale and sign. `allowed` 0 switches it off.
    """

    def __init__(self, allowed: float, window: int = 50) -> None:
        self._allowed = allowed
        self._window = window
        self._count = 0
        self._mean = self._deviation = 0.0
        self._first = self._best = self._calm = 0.0  # the first full mean; the best mean and the deviation at that time

    def observe(self, step: int, loss: float) -> None:
        """Take the loss of `step` into account. Raises Diverged."""
        if not math.isfinite(loss):
            raise Diverged(f"step {step}: loss={loss}: not a number the optimizer can use; resume with a lower optim.lr")
        self._count += 1
        rate = max(1 / self._window, 1 / self._count)  # a plain mean at first
        if self._count > 1:
            self._deviation += rate * (abs(loss - self._mean) - self._deviation)
        self._mean += rate * (loss - self._mean)
        if self._count == self._window:
            self._first = self._mean
        if self._count == self._window or (self._started and self._mean < self._best):
            self._best, self._calm = self._mean, self._deviation
        if self._started and self._excess > max(self._allowance, 4 * self._deviation):
            raise Diverged(
                f"step {step}: smoothed loss={self._mean:.4g}, up from its best {self._best:.4g}: training diverges; "
                "resume with a lower optim.lr, or set run.divergence=0 if the rise is meant"
            )

    @property
    def healthy(self) -> bool:
        """Whether the loss is near enough to its best for a checkpoint taken now to be worth more than an older one."""
        return not self._started or self._excess <= max(0.5 * self._allowance, 2 * self._calm)

    @property
    def _started(self) -> bool:
        return bool(self._allowed) and self._count >= self._window

    @property
    def _excess(self) -> float:
        return self._mean - self._best

    @property
    def _allowance(self) -> float:
        return self._allowed * (self._first - self._best)

    def state_dict(self) -> dict[str, float]:
        values = (self._mean, self._deviation, self._first, self._best, self._calm)
        return {"count": self._count, **dict(zip(_NAMES, values, strict=True))}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._count = int(state["count"])
        self._mean, self._deviation, self._first, self._best, self._calm = (float(state[name]) for name in _NAMES)


_NAMES = ("mean", "deviation", "first", "best", "calm")
