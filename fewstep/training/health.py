"""When a run must stop: a loss that is no number, or one that loses again what it had gained. No model, no optimizer."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any, final


@final
class Diverged(ValueError):
    """Training stopped itself; the message names the step, the value and the next move."""


@final
class Watch:
    """Follows the median loss of the last `window` steps of a run, which one bad batch does not move.

    The run has diverged when that median stands above its best by more than the fraction `allowed` of all it had gained since the
    start, and by more than four times the mean deviation of a single step at the best. The rule has no units: it serves losses of
    any scale and sign. `allowed` 0 switches it off.
    """

    def __init__(self, allowed: float, window: int = 50) -> None:
        self._allowed = allowed
        self._recent: deque[float] = deque(maxlen=window)
        self._first = self._best = self._deviation = math.nan  # the first median, the best one and the deviation around it

    def observe(self, step: int, loss: float) -> None:
        """Take the loss of `step` into account. Raises Diverged."""
        if not math.isfinite(loss):
            raise Diverged(f"step {step}: loss={loss}: not a number the optimizer can use; resume with a lower optim.lr")
        self._recent.append(loss)
        if not self._allowed or len(self._recent) < self._window:
            return
        now = median(self._recent)
        if math.isnan(self._first):
            self._first = now
        if not now >= self._best:
            self._best, self._deviation = now, fmean(abs(loss - now) for loss in self._recent)
        if now - self._best > max(self._allowance, 4 * self._deviation):
            raise Diverged(
                f"step {step}: median loss={now:.4g}, up from its best {self._best:.4g}: training diverges; "
                "resume with a lower optim.lr, or set run.divergence=0 if the rise is meant"
            )

    @property
    def healthy(self) -> bool:
        """Whether the latest losses are near enough to the best for a checkpoint taken now to be worth more than an older one."""
        if math.isnan(self._best):
            return True
        latest = median(list(self._recent)[-self._window // 5 :])
        return latest - self._best <= max(0.5 * self._allowance, 2 * self._deviation)

    @property
    def _window(self) -> int:
        return self._recent.maxlen or 0

    @property
    def _allowance(self) -> float:
        return self._allowed * (self._first - self._best)

    def state_dict(self) -> dict[str, Any]:
        best = None if math.isnan(self._best) else [self._first, self._best, self._deviation]
        return {"recent": list(self._recent), "best": best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._recent.extend(state["recent"])
        if state["best"] is not None:
            self._first, self._best, self._deviation = state["best"]
