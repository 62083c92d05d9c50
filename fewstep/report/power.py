"""Chi-square tests of counts against laws, and how many draws see a deviation of a given size.

This file knows counts and laws; it knows nothing of decoding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

_EXPECTED = 10.0  # counts expected of a cell at least, so that the asymptotic law holds; rarer cells become one


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """Pearson's statistic summed over laws, its degrees of freedom, how likely one as large is by chance, and the draws made."""

    statistic: float
    freedom: int
    p_value: float
    draws: int

    def detectable(self, alarm: float, power: float) -> float:
        """The total variation that a test at the false-alarm rate `alarm` sees with probability `power`; 1 at most."""
        if not self.freedom:
            return 1.0
        return min(1.0, (noncentrality(self.freedom, alarm, power) / (4 * self.draws)) ** 0.5)


def goodness_of_fit(counts: Sequence[Tensor], laws: Sequence[Tensor]) -> Outcome:
    """Are the `counts` [K] of each context drawn from its law [K] (summing to 1)? One test over all contexts.

    Cells expected under 10 times are pooled. An outcome without mass gives the p-value 0.
    """
    statistic, freedom, impossible = 0.0, 0, False
    for observed, law in zip(counts, laws, strict=True):
        observed, expected = observed.double(), law.double() * observed.sum()
        impossible |= bool(((law == 0) & (observed > 0)).any())
        order = expected.argsort()
        observed, expected = observed[order], expected[order]
        below = int((expected.cumsum(0) < _EXPECTED).sum()) + 1  # the fewest cells that are worth one, rare ones all among them
        rare = min(len(law), max(below, int((expected < _EXPECTED).sum())))
        observed = torch.cat([observed[:rare].sum().reshape(1), observed[rare:]])
        expected = torch.cat([expected[:rare].sum().reshape(1), expected[rare:]])
        if len(expected) > 1:
            statistic += float(((observed - expected) ** 2 / expected).sum())
            freedom += len(expected) - 1
    draws = int(sum(int(observed.sum()) for observed in counts))
    p_value = 0.0 if impossible else exceedance(statistic, freedom) if freedom else 1.0
    return Outcome(statistic, freedom, p_value, draws)


def draws_needed(freedom: int, variation: float, alarm: float, power: float) -> int:
    """Draws, over all contexts, with which the test sees a total variation of at least `variation` with probability `power`.

    A deviation d from a law p has the noncentrality n sum(d^2 / p), by Cauchy and Schwarz at least n (sum |d|)^2, which is
    4 n variation^2; over contexts with equally many draws the mean square of their variations counts. Deviations inside
    a pooled cell are not seen.
    """
    return int(noncentrality(freedom, alarm, power) / (4 * variation**2)) + 1


def exceedance(statistic: float, freedom: int, shift: float = 0.0) -> float:
    """P(X > statistic) for X noncentral chi-square with noncentrality `shift`: a Poisson mixture of central ones."""
    point = torch.tensor(statistic / 2, dtype=torch.float64)
    if not shift:
        return float(torch.special.gammaincc(point.new_tensor(freedom / 2), point))
    mean = shift / 2
    spread = 12 * mean**0.5 + 40  # terms beyond it weigh less than the rounding
    k = torch.arange(max(0, int(mean - spread)), int(mean + spread) + 1, dtype=torch.float64)
    weight = (k * torch.log(point.new_tensor(mean)) - mean - torch.lgamma(k + 1)).exp()
    return float((weight * torch.special.gammaincc(freedom / 2 + k, point.expand_as(k))).sum())


def noncentrality(freedom: int, alarm: float, power: float) -> float:
    """The smallest noncentrality at which a test with false-alarm rate `alarm` alarms with probability `power`."""
    critical = _bisect(lambda x: exceedance(x, freedom) < alarm, freedom + 100.0)
    return _bisect(lambda shift: exceedance(critical, freedom, shift) > power, freedom + 100.0)


def _bisect(above: Callable[[float], bool], start: float) -> float:
    """The point from which on `above` holds, to nine digits."""
    low, high = 0.0, start
    while not above(high):
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return high
