"""Measures of sample quality against computations of their definitions by other means: loops over pairs, and SciPy's root."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from fewstep.report.quality import copying, coverage, energy_distance, frechet_distance, mmd
from fewstep.report.quality_features import Classifier, accuracy, classifier_of, features
from fewstep.training.data.arrays import Table
from fewstep.training.data.drawings import GlyphsConfig
from fewstep.training.data.points import PointsConfig


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def far(a: Tensor, b: Tensor) -> float:
    return math.dist(a.tolist(), b.tolist())


def pairs(x: Tensor) -> list[float]:
    return [far(a, b) for a, b in itertools.permutations(x, 2)]


def across(x: Tensor, y: Tensor) -> list[float]:
    return [far(a, b) for a in x for b in y]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 23, 3), (2, 5, 1), (140, 30, 2)])
def test_energy_distance_is_the_mean_over_pairs(n: int, m: int, d: int, seed: int) -> None:
    x, y = drawn(seed, n, d), drawn(seed + 1, m, d) + 0.3
    expected = 2 * mean(across(x, y)) - mean(pairs(x)) - mean(pairs(y))
    assert energy_distance(x, y) == pytest.approx(expected, abs=1e-12)
    assert energy_distance(y, x) == pytest.approx(expected, abs=1e-12)
    assert energy_distance(x.float(), y.float()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 23, 3), (135, 30, 1)])
def test_mmd_is_the_mean_of_three_kernels_over_pairs(n: int, m: int, d: int, seed: int) -> None:
    x, y = drawn(seed, n, d), drawn(seed + 1, m, d) + 0.3
    assert len(candidates(x, y)) == 1, "one distance within y is the scale that explains the value"


def candidates(x: Tensor, y: Tensor) -> list[float]:
    """The median distances, each of a pair of y, with which the definition gives what `mmd` says."""
    found = mmd(x, y)
    within_x, within_y, between = (np.array(values) for values in (pairs(x), pairs(y), across(x, y)))

    def kernel(distances: np.ndarray, median: float) -> float:
        return float(np.mean([np.exp(-(distances**2) / (2 * (share * median) ** 2)) for share in (0.5, 1, 2)]))

    return [
        median
        for median in sorted(set(within_y))
        if abs(kernel(within_x, median) + kernel(within_y, median) - 2 * kernel(between, median) - found) < 1e-12
    ]


def test_the_scale_of_the_kernels_is_about_the_median_distance(seed: int) -> None:
    x, y = drawn(seed, 60, 2), drawn(seed + 1, 60, 2)
    (median,) = candidates(x, y)
    share = float((np.array(pairs(y)) < median).mean())
    assert abs(share - 0.5) < 0.05
    assert mmd(7 * x, 7 * y) == pytest.approx(mmd(x, y), abs=1e-12), "and no other scale matters"


def test_unbiased_distances_are_about_zero_for_one_law_and_grow_with_a_shift(seed: int) -> None:
    for measure in (energy_distance, mmd):
        same = torch.tensor([measure(drawn(seed + 2 * i, 100, 2), drawn(seed + 2 * i + 1, 100, 2)) for i in range(60)])
        assert abs(float(same.mean())) < 6 * float(same.std()) / 60**0.5
        assert (same < 0).any() and (same > 0).any()
        assert measure(drawn(seed, 100, 2) + 1.5, drawn(seed + 1, 100, 2)) > float(same.max())


@pytest.mark.parametrize(("n", "m", "d"), [(50, 70, 6), (30, 40, 1), (5, 9, 12)])
def test_frechet_distance_is_scipys(n: int, m: int, d: int, seed: int) -> None:
    x, y = drawn(seed, n, d) @ drawn(seed + 2, d, d), 2 * drawn(seed + 1, m, d) + 1
    first, second = (np.atleast_2d(np.cov(rows.numpy().T)) for rows in (x, y))
    root = sqrtm(first @ second)
    expected = float(((x.mean(0) - y.mean(0)) ** 2).sum()) + np.trace(first + second - 2 * np.real(root))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5 if n <= d else 1e-9)  # a singular product has a rough root
    assert frechet_distance(x, x) < 1e-9 * float(np.trace(first)) * d


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_what_balls_say(k: int, seed: int) -> None:
    samples, data = 0.5 * drawn(seed, 41, 2), drawn(seed + 1, 33, 2)

    def inside(x: Tensor, y: Tensor) -> float:
        reach = [sorted(far(a, b) for j, b in enumerate(y) if j != i)[k - 1] for i, a in enumerate(y)]
        return mean([float(any(far(a, b) <= radius for b, radius in zip(y, reach, strict=True))) for a in x])

    found = coverage(samples, data, k)
    assert found == pytest.approx((inside(samples, data), inside(data, samples)))
    assert coverage(data + 100, data, k) == (0, 0) and coverage(data, data, k) == (1, 1)


def test_copies_are_told_from_new_rows(seed: int) -> None:
    train, held_out, fresh = drawn(seed, 300, 2), drawn(seed + 1, 300, 2), drawn(seed + 2, 300, 2)

    def median(x: Tensor) -> float:
        return float(torch.tensor([min(far(a, b) for b in train) for a in x]).median())

    assert copying(fresh, train, held_out) == pytest.approx(median(fresh) / median(held_out), rel=1e-6)
    assert copying(train[:50], train, held_out) == 0
    assert copying(held_out, train, held_out) == 1
    with pytest.raises(ValueError, match=r"^held_out: half of its rows are training rows; "):
        copying(fresh, train, train[:50])


def test_bad_rows_are_refused_in_one_line() -> None:
    good, bad = torch.zeros(4, 2), torch.full((4, 2), math.nan)
    for call, told in (
        (lambda: energy_distance(good[:1], good), r"^x: shape \(1, 2\), expected at least two rows"),
        (lambda: energy_distance(good, good[:, 0]), r"^y: shape \(4,\), "),
        (lambda: frechet_distance(good, bad), r"^y: shape \(4, 2\), expected at least two rows \[N,d\] of finite numbers; "),
        (lambda: mmd(good, torch.zeros(4, 3)), r"^x, y: rows of 2 and 3 numbers; "),
        (lambda: mmd(good, good), r"^y: most rows are equal, "),
        (lambda: mmd(good, good.double()), r"^x, y: torch\.float32 and torch\.float64, "),
        (lambda: coverage(good, good, 4), r"^neighbours=4: must be from 1 to 3 with 4 rows; "),
    ):
        with pytest.raises(ValueError, match=told) as refusal:
            call()
        assert "\n" not in str(refusal.value)


def test_a_classifier_learns_the_classes_once_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = GlyphsConfig(characters="0H", turn=5.0, count=200, size=8, classes=True, held_out=0.2)
    table = data.build()
    assert isinstance(table, Table)
    learnt = classifier_of(data, steps=40, seed=1, cache=tmp_path)
    assert accuracy(learnt, table.rows("validation")) > 0.8, "a guess is right half of the time"
    images = table.rows("validation").extra["x"]
    found = features(learnt, images)
    assert found.shape == (len(images), 64) and found.min() >= 0
    torch.testing.assert_close(learnt.out(found), learnt(images))
    monkeypatch.setattr("fewstep.report.quality_features.Trainer", None)  # it is not trained again
    again = classifier_of(data, steps=40, seed=1, cache=tmp_path)
    assert isinstance(again, Classifier) and torch.equal(features(again, images), found)
    with pytest.raises(ValueError, match=r"^data\.kind='points': no images of even sides with classes; "):
        classifier_of(PointsConfig(), cache=tmp_path)
    with pytest.raises(ValueError, match=r"^data\.kind='glyphs': "):
        classifier_of(GlyphsConfig(count=100), cache=tmp_path)
