"""How near samples are to data, from rows alone: energy distance, MMD, Frechet distance, precision and recall, copies.

Rows are [N,d], float32 or float64. Distances have their dtype, sums are float64, and blocks of rows are taken at a time, so that
ten thousand rows need a few megabytes. This file knows no model and no data set.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, final

import torch
from torch import Tensor

from fewstep.core.random import CounterRng

_BLOCK = 128  # rows whose distances to all others are held at once: few, so that they stay in the caches
_WIDEST = 2.0  # bandwidth of the widest kernel, in median distances of the data; the next are half and a quarter of it
_PAIRS = 4096  # that the median distance is taken of


@final
class Coverage(NamedTuple):
    """`precision`: the share of samples that lie where data do; `recall`: the share of data that lie where samples do."""

    precision: float
    recall: float


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased: about 0, and below it half of the time, where the laws are one.

    Raises ValueError for fewer than two rows, or rows that are not finite or of unequal width. Cost: N^2 distances.
    Source: Szekely and Rizzo 2013, Energy statistics, equation 2.5, as a U-statistic.
    """
    x, y = _rows(x, y)
    return _contrast(x, y, lambda distance: -distance)


def mmd(x: Tensor, y: Tensor) -> float:
    """The squared maximum mean discrepancy of x from the data y, unbiased: about 0, and below it half of the time, at equal laws.

    The kernel is the mean of three Gaussians, of half, once and twice the median distance within y. Raises ValueError and costs
    as `energy_distance`. Source: Gretton et al. 2012, A kernel two-sample test, lemma 6.
    """
    x, y = _rows(x, y)
    width = _WIDEST * _median_distance(y)

    def kernel(distance: Tensor) -> Tensor:
        widest = distance.square_().mul_(-0.5 / width**2).exp_()
        half = widest.square().square_()  # exp(-4 a): the exponent of half the width
        return widest.add_(half).add_(half.square_().square_()).div_(3)

    return _contrast(x, y, kernel)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of the means and covariances of two sets of features; at least 0.

    It grows as the sets shrink: compare sets of equal size only. Raises ValueError as `energy_distance`.
    Source: Heusel et al. 2017, arXiv 1706.08500, equation 6.
    """
    x, y = (rows.double() for rows in _rows(x, y))
    far = (x.mean(0) - y.mean(0)).square().sum()
    own, other = (torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1]) for rows in (x, y))
    values, vectors = torch.linalg.eigh(own)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()  # of the same spectrum as C_x C_y
    return max(0.0, float(far + own.trace() + other.trace() - 2 * cross))


def coverage(samples: Tensor, data: Tensor, neighbours: int = 3) -> Coverage:
    """Precision and recall: a row lies where the others do if it is inside the ball of one of them, which reaches to that one's
    k-th nearest of its own kind.

    Both change with the number of rows: compare sets of equal size only. Raises ValueError as `energy_distance`, and for sets
    without k + 1 rows. Source: Kynkaanniemi et al. 2019, arXiv 1904.06991, equations 1 and 2.
    """
    samples, data = _rows(samples, data)
    if not 1 <= neighbours < min(len(samples), len(data)):
        least = min(len(samples), len(data))
        raise ValueError(f"neighbours={neighbours}: must be from 1 to {least - 1} with {least} rows; lower it")
    return Coverage(_inside(samples, data, neighbours), _inside(data, samples, neighbours))


def copying(samples: Tensor, train: Tensor, held_out: Tensor) -> float:
    """The median distance of samples to their nearest training row over held-out rows' own: about 1 for new data, 0 for copies.

    Raises ValueError as `energy_distance`, and where held-out rows are training rows themselves.
    Source: the three samples of Meehan et al. 2020, arXiv 2004.05675. Differs: a ratio of medians for a rank test, over the
    whole space at once.
    """
    samples, train = _rows(samples, train)
    held_out, _ = _rows(held_out, train)
    usual = float(_nearest(held_out, train, 1).median())
    if usual == 0:
        raise ValueError("held_out: half of its rows are training rows; hold others out")
    return float(_nearest(samples, train, 1).median()) / usual


def _rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, rows in (("x", x), ("y", y)):
        if rows.ndim != 2 or len(rows) < 2 or not bool(rows.isfinite().all()):
            shape = tuple(rows.shape)
            raise ValueError(
                f"{name}: shape {shape}, expected at least two rows [N,d] of finite numbers; flatten or correct them"
            )
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x, y: rows of {x.shape[1]} and {y.shape[1]} numbers; compare like with like")
    if not x.is_floating_point() or x.dtype != y.dtype:
        raise ValueError(f"x, y: {x.dtype} and {y.dtype}, expected both float32 or both float64; convert them")
    return x, y


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The distances of some rows of x after others to all rows of y, [<= block, M]."""
    for some in x.split(_BLOCK):
        yield torch.cdist(some, y, compute_mode="donot_use_mm_for_euclid_dist")


def _contrast(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor]) -> float:
    """E k(x, x') + E k(y, y') - 2 E k(x, y) without the pairs of a row with itself; `kernel` is of the distance."""

    between = math.fsum(_summed(kernel(block)) for block in _distances(x, y)) / (len(x) * len(y))
    return _within(x, kernel) + _within(y, kernel) - 2 * between


def _within(rows: Tensor, kernel: Callable[[Tensor], Tensor]) -> float:
    """The mean of the kernel over pairs of different rows, each pair looked at once."""
    total, count = 0.0, len(rows)
    for first in range(0, count, _BLOCK):
        some = rows[first : first + _BLOCK]
        (block,) = _distances(some, rows[first:])
        values = kernel(block)
        total += 2 * _summed(values[:, len(some) :]) + _summed(values[:, : len(some)]) - _summed(values.diagonal())
    return total / (count * (count - 1))


def _summed(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _median_distance(y: Tensor) -> float:
    """Of random pairs of rows, the same for the same number of rows. Raises ValueError where most rows are equal."""
    chosen = (CounterRng.seeded([0]).uniform(2, _PAIRS)[0] * len(y)).long()
    pairs = chosen[:, chosen[0] != chosen[1]]
    median = float(torch.linalg.vector_norm(y[pairs[0]] - y[pairs[1]], dim=1).median())
    if not median > 0:
        raise ValueError("y: most rows are equal, so no scale is to be had from them; give other data")
    return median


def _nearest(x: Tensor, y: Tensor, k: int) -> Tensor:
    """[N]: the distance of each row of x to its k-th nearest row of y."""
    return torch.cat([block.kthvalue(k, dim=1).values for block in _distances(x, y)])


def _inside(x: Tensor, y: Tensor, k: int) -> float:
    """The share of rows of x that lie inside the ball of a row of y."""
    reach = _nearest(y, y, k + 1)  # the nearest of all is the row itself
    return sum(int((block <= reach).any(1).sum()) for block in _distances(x, y)) / len(x)
