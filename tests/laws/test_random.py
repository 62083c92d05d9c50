"""The laws of `CounterRng`: a pure function of (row seed, stream, position, index), uniform, and without correlations."""

import math
from itertools import combinations

import pytest
import torch
from scipy import stats
from torch import Tensor

from fewstep.core.random import _GOLDEN, CounterRng, _mix, _mixed

FALSE_ALARM = 1e-6
DRAWS = 1 << 17


def seeded(seed: int, rows: int = 1) -> CounterRng:
    return CounterRng.seeded(range(seed, seed + rows))


def flat(rng: CounterRng, count: int = DRAWS) -> Tensor:
    return rng.uniform(count // rng.batch).flatten()


def correlated(x: Tensor, y: Tensor) -> float:
    """The p-value of the correlation of two samples: for independent ones r sqrt(n) is a standard Gaussian."""
    r = torch.corrcoef(torch.stack([x, y]))[0, 1]
    return math.erfc(abs(float(r)) * math.sqrt(len(x) / 2))


def test_asking_twice_gives_the_same_numbers(seed: int) -> None:
    rng = seeded(seed, 3)
    first = rng.uniform(4, 5)
    rng.split("other").uniform(7)
    rng.at(3).normal(2)
    assert torch.equal(rng.uniform(4, 5), first)
    assert torch.equal(seeded(seed, 3).uniform(4, 5), first)
    assert torch.equal(CounterRng.seeded(torch.tensor([seed, seed + 1, seed + 2])).uniform(4, 5), first)
    assert first.dtype == torch.float64 and first.min() >= 0 and first.max() < 1


def test_the_numbers_are_fixed() -> None:
    """Changing them changes every sampled text: SplitMix64's published outputs, and this library's own."""
    states = torch.arange(1, 4) * _GOLDEN + 1234567
    assert [value & (2**64 - 1) for value in _mix(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    rng = CounterRng.seeded([0, 12345])
    assert rng.split("verify").at(7).uniform(2).mul(2**53).long().tolist() == [
        [3056384380274945, 3544381948697393],
        [7513801161054060, 3455430022908462],
    ]


def test_the_numbers_do_not_depend_on_the_device(seed: int) -> None:
    """The CPU has its own way of mixing: the same bits, whatever the layout, and what is mixed stays as it is."""
    bits = torch.randint(-(2**63), 2**63 - 1, (7, 5))
    for x in (bits, bits.t(), bits[:, ::2], bits[:0], bits[:, :1].expand(7, 3), bits[0, 0]):
        before = x.clone()
        mixed = _mix(x)
        assert mixed.shape == x.shape and torch.equal(mixed, _mixed(x)) and torch.equal(x, before)


def test_rows_are_independent_of_their_batch(seed: int) -> None:
    rng = seeded(seed, 6)
    whole = rng.split("a").at(torch.arange(6)).uniform(3, 2)
    rows = torch.tensor([4, 0, 0, 5])
    assert torch.equal(rng.fork(rows).split("a").at(rows).uniform(3, 2), whole[rows])
    assert torch.equal(rng.split("a").at(torch.arange(6)).fork(rows).uniform(3, 2), whole[rows])
    left, right = rng.fork(torch.arange(2)), rng.fork(torch.arange(2, 6))
    assert torch.equal(left.join(right).split("a").at(torch.arange(6)).uniform(3, 2), whole)
    assert (rng.batch, rng.nbytes(), left.join(right).batch) == (6, 48, 6)
    assert rng.fork(torch.tensor([], dtype=torch.int64)).uniform(3).shape == (0, 3)


def test_entries_do_not_depend_on_the_shape_asked_for(seed: int) -> None:
    rng = seeded(seed, 2)
    for draw in (rng.uniform, rng.normal):
        large = draw(5, 4, 3)
        assert torch.equal(draw(2, 3, 1), large[:, :2, :3, :1])
        assert torch.equal(draw(9)[:, :4], draw(4))
        assert draw().shape == (2,)


def test_streams_and_positions_are_independent(seed: int) -> None:
    """Pairs of samples that a weak key schedule would tie together."""
    rng = seeded(seed)
    samples = {
        "plain": flat(rng),
        "split": flat(rng.split("draft")),
        "other split": flat(rng.split("verify")),
        "split twice": flat(rng.split("draft").split("draft")),
        "at 0": flat(rng.at(0)),
        "at 1": flat(rng.at(1)),
        "at 1, draft": flat(rng.at(1).split("draft")),
        "draft, at 1": flat(rng.split("draft").at(1)),
        "at 0, at 1": flat(rng.at(0).at(1)),
        "at 1, at 0": flat(rng.at(1).at(0)),
        "row": rng.uniform(3, DRAWS)[0, 2],
        "normal": torch.special.ndtr(rng.normal(DRAWS)[0]),
        "next seed": flat(seeded(seed + 1)),
        "far seed": flat(CounterRng.seeded([seed ^ (1 << 63)])),
        "negative seed": flat(CounterRng.seeded([-seed - 1])),
        "shifted": torch.roll(flat(rng), 1),
    }
    pairs = list(combinations(samples, 2))
    for a, b in pairs:
        assert not torch.equal(samples[a], samples[b]), (a, b)
        assert correlated(samples[a], samples[b]) > FALSE_ALARM / len(pairs), (a, b)


@pytest.mark.parametrize("kind", ["entries", "rows", "positions", "streams", "first numbers of near seeds", "row and column"])
def test_uniform(kind: str, seed: int) -> None:
    """Along every axis that a program counts: the law (Kolmogorov-Smirnov), fine cells, and pairs of neighbours (chi-square)."""
    rng = seeded(seed)
    match kind:
        case "entries":
            u = flat(rng)
        case "rows":
            u = seeded(seed, DRAWS).uniform()
        case "positions":
            u = CounterRng.seeded([seed] * DRAWS).at(torch.arange(DRAWS)).uniform()
        case "streams":
            rows = seeded(seed, 256)
            u = torch.stack([rows.split(f"{i}").uniform() for i in range(256)], 1).flatten()
        case "first numbers of near seeds":
            near = dict.fromkeys(seed ^ (1 << bit) ^ i for bit in range(64) for i in range(DRAWS // 64))
            u = CounterRng.seeded(list(near)).uniform(1)[:, 0]
        case _:
            u = seeded(seed, 256).uniform(DRAWS // 256).T.flatten()
    assert stats.kstest(u.numpy(), "uniform").pvalue > FALSE_ALARM / 24
    cells = torch.bincount((u * 1024).long(), minlength=1024)
    assert stats.chisquare(cells.numpy()).pvalue > FALSE_ALARM / 24
    pairs = (u[:-1] * 32).long() * 32 + (u[1:] * 32).long()
    assert stats.chisquare(torch.bincount(pairs[::2], minlength=1024).numpy()).pvalue > FALSE_ALARM / 24
    assert correlated(u[:-1], u[1:]) > FALSE_ALARM / 24


def test_every_bit_is_fair_and_tells_nothing_of_the_seed() -> None:
    """Turning one bit of the seed turns each of the 53 bits of a number half of the time (avalanche)."""
    count = 2048
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,))
    first = (CounterRng.seeded(seeds).uniform() * 2.0**53).long()
    bits = (first.unsqueeze(-1) >> torch.arange(53)) & 1
    tests = 65 * 53
    limit = stats.norm.isf(FALSE_ALARM / tests / 2) * math.sqrt(count) / 2
    assert (bits.sum(0) - count / 2).abs().max() < limit
    for bit in range(64):
        other = (CounterRng.seeded([value ^ (1 << bit) for value in seeds.tolist()]).uniform() * 2.0**53).long()
        turned = ((first ^ other).unsqueeze(-1) >> torch.arange(53)) & 1
        assert (turned.sum(0) - count / 2).abs().max() < limit, bit


def test_normal(seed: int) -> None:
    rng = seeded(seed, 4)
    z = rng.normal(DRAWS // 4)
    assert bool(z.isfinite().all())
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > FALSE_ALARM / 4
    assert correlated(z.flatten(), rng.uniform(DRAWS // 4).flatten()) > FALSE_ALARM / 4
    assert correlated(z[:2].flatten(), z[2:].flatten()) > FALSE_ALARM / 4
    assert correlated(z.flatten()[1:].abs(), z.flatten()[:-1].abs()) > FALSE_ALARM / 4


def test_any_integer_is_a_seed() -> None:
    seeds = [0, 1, -1, 2**31, -(2**31), 2**63 - 1, -(2**63), 2**64 - 2, 2**64 + 12345, -(10**30)]
    u = CounterRng.seeded(seeds).uniform(2)
    assert len(torch.unique(u)) == 2 * len(seeds)
    assert torch.equal(CounterRng.seeded([2**64 + 5]).uniform(3), CounterRng.seeded([5]).uniform(3))


def test_no_two_places_share_their_numbers(seed: int) -> None:
    """Over a grid of seeds, streams, positions, both orders and indices, all 2^18 numbers of 53 bits differ.

    By chance two are equal with probability 2^-18.
    """
    rng = seeded(seed, 8)
    grids = [rng.uniform(16, 16, 4), rng.uniform(16, 16), rng.uniform(16), rng.uniform()]
    for i in range(16):
        grids += [rng.at(i).split(f"{a}").uniform(16, 8) for a in range(8)]
        grids += [rng.split(f"{a}").at(i).uniform(16) for a in range(8)]
        grids += [rng.at(i).uniform(16, 4), rng.at(i).uniform(16), rng.at(i).uniform(), rng.at(i).at(i).uniform(16)]
    numbers = torch.cat([grid.flatten() for grid in grids])
    assert len(numbers) < 2**18
    assert len(torch.unique(numbers)) == len(numbers)


def test_a_position_is_one_for_all_rows_or_one_each(seed: int) -> None:
    rng = seeded(seed, 3)
    assert torch.equal(rng.at(5).uniform(2), rng.at(torch.full((3,), 5)).uniform(2))
    assert torch.equal(rng.at(torch.tensor([5, 6, 7])).uniform(2)[1], rng.at(6).uniform(2)[1])
    assert len(torch.unique(torch.cat([rng.at(i).uniform() for i in (-1, 0, 2**40, 2**63 - 1)]))) == 12
