"""HiPPO: a signal is reconstructed from a few coefficients, the better the more of them, at any speed it comes in.

No network is needed: the signals are sums of sines. The paper's own are band-limited noise of a million samples.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.core.random import CounterRng
from fewstep.nn.hippo import Legs, Legt, Rule, basis
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding

_SAMPLES, _CYCLES = 1000, 8  # of a signal; the most of a sine in it
_ORDERS = (8, 16, 32, 64)
_PAPER = "arXiv 2008.07669"

RECONSTRUCTED = Criterion(
    "reconstructed",
    "LegS holds 1000 samples of eight sines in 32 coefficients: relative error, bilinear rule",
    f"{_PAPER}, section 4.3; the setting is fewstep's own",
    "at most",
    0.02,
)
GROWS = Criterion(
    "error-falls-with-order",
    "more coefficients hold more: the error with 16 over that with 32",
    f"{_PAPER}, proposition 6; the threshold is fewstep's own",
    "at least",
    10.0,
)
OPTIMAL = Criterion(
    "optimal",
    "what is held is the best polynomial: the error with 32 over that of a least-squares fit, zero-order hold",
    f"{_PAPER}, section 2.2",
    "at most",
    1.05,
)
TIMELESS = Criterion(
    "no-time-scale",
    "LegS has no time scale: the error when the same signal comes ten times as slowly, over the error when it does not",
    f"{_PAPER}, proposition 3",
    "at most",
    1.0,
)
WINDOW = Criterion(
    "window",
    "LegT holds the last 250 samples in 32 coefficients: relative error there, bilinear rule",
    f"{_PAPER}, theorem 1; the setting is fewstep's own",
    "at most",
    0.02,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    f = signals(bench.effort.count, _SAMPLES, bench.effort.seed)
    how = f"mean of {len(f)} signals"
    errors = {order: error_of_legs(f, order) for order in _ORDERS}
    numbers = {f"order {order}": error for order, error in errors.items()}
    yield Finding(RECONSTRUCTED, errors[32], how, numbers)
    yield Finding(GROWS, errors[16] / errors[32], f"{how}; {errors[64]:.2g} with 64: what the rule's steps leave", numbers)
    held, best = error_of_legs(f, 32, "zoh"), error_of_fit(f, 32)
    yield Finding(OPTIMAL, held / best, f"{how}; {held:.2g} for {best:.2g}", {"legs": held, "fit": best})
    slow = error_of_legs(signals(bench.effort.count, 10 * _SAMPLES, bench.effort.seed), 32)
    yield Finding(TIMELESS, slow / errors[32], f"{how}; {slow:.2g} for {errors[32]:.2g}", {"slow": slow})
    yield Finding(WINDOW, error_of_legt(f, 32, _SAMPLES // 4), how)


def signals(count: int, samples: int, seed: int) -> Tensor:
    """[count,samples] sums of sines of 1 to 8 cycles with phases of their own."""
    phases = 2 * math.pi * CounterRng.seeded([seed]).uniform(count, _CYCLES)[0]
    time = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    cycles = torch.arange(1, _CYCLES + 1, dtype=torch.float64)
    return torch.sin(2 * math.pi * cycles[:, None] * time + phases.unsqueeze(-1)).sum(1)


def error_of_legs(f: Tensor, order: int, rule: Rule = "bilinear") -> float:
    """How far the reconstruction of all of f [B,T] is off, in relative root mean square, over the signals."""
    memory = Legs(order, rule)
    return _error(memory.reconstruct(memory.project(f)[:, -1], f.shape[1]), f)


def error_of_legt(f: Tensor, order: int, window: int) -> float:
    """The same of the last `window` samples."""
    memory = Legt(order, window)
    return _error(memory.reconstruct(memory.project(f)[:, -1], window), f[:, -window:])


def error_of_fit(f: Tensor, order: int) -> float:
    """The same of the polynomials that fit best."""
    rows = basis(order, f.shape[1]).T
    return _error((rows @ torch.linalg.lstsq(rows, f.T).solution).T, f)


def _error(found: Tensor, f: Tensor) -> float:
    return float((torch.linalg.vector_norm(found - f, dim=1) / torch.linalg.vector_norm(f, dim=1)).mean())


CLAIM = Claim(
    "hippo",
    f"Gu et al. 2020, HiPPO, {_PAPER}",
    "A linear recurrence holds the polynomials that fit the past best, all of it or the last, and for all needs no time scale.",
    (RECONSTRUCTED, GROWS, OPTIMAL, TIMELESS, WINDOW),
    measure,
)
