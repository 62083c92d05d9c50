"""Randomness by row: what a request draws depends on its own seed and place alone, never on who shares the batch.

`CounterRng` is a pure function of (row seed, stream, position, index): nothing is consumed, so a draw can be repeated,
moved to another batch or device, or skipped, and every other draw stays as it was. This file knows no distribution but the
uniform and the Gaussian.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol, Self, final

import torch
from torch import Tensor


class Rows(Protocol):
    """Anything kept per request: one row per request along the batch."""

    def fork(self, rows: Tensor) -> Self:
        """A copy that holds row `rows[i]` ([M] int64, repeats allowed) as its row i: samples, beams, eviction."""
        ...

    def join(self, other: Self) -> Self:
        """This batch followed by `other`'s rows (continuous batching); the larger capacity wins. Consumes both."""
        ...

    def nbytes(self) -> int:
        """Bytes held."""
        ...


class Rng(Rows, Protocol):
    """Counter-based draws, one independent stream per row. Asking twice gives the same numbers: split or move instead."""

    def uniform(self, *shape: int) -> Tensor:
        """[B, *shape] float64 in [0, 1). Entry [b, i, j] does not depend on the sizes asked for."""
        ...

    def normal(self, *shape: int) -> Tensor:
        """[B, *shape] float64 standard Gaussian, independent of `uniform` of the same rng."""
        ...

    def split(self, stream: str) -> Self:
        """The independent stream of that name (drafter and verifier never share one)."""
        ...

    def at(self, position: Tensor | int) -> Self:
        """The independent stream at `position` ([B] int64 or one for all rows), e.g. the number of tokens emitted."""
        ...


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_ROUNDS = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)
_GOLDEN, _MIX1, _MIX2 = (_signed(c) for c in (0x9E3779B97F4A7C15, *(factor for _, factor in _ROUNDS)))


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)  # logical shift: int64 shifts arithmetically


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors (multiplication wraps); on the CPU by NumPy, in a half to a third of the time."""
    if x.device.type != "cpu":
        return _mixed(x)
    bits = x.reshape(-1).numpy().view("uint64")
    for shift, factor in _ROUNDS:
        bits = (bits >> shift) ^ bits
        bits *= factor
    return torch.from_numpy(((bits >> 31) ^ bits).view("int64")).view(x.shape)


def _mixed(x: Tensor) -> Tensor:
    """The same on any device."""
    x = _shift(x, 30).bitwise_xor_(x).mul_(_MIX1)
    x = _shift(x, 27).bitwise_xor_(x).mul_(_MIX2)
    return _shift(x, 31).bitwise_xor_(x)


def _absorb(key: Tensor, index: Tensor | int) -> Tensor:
    step = (index + 1) * _GOLDEN if isinstance(index, Tensor) else _signed((index + 1) * _GOLDEN)
    return _mix(_mix(key + _GOLDEN) ^ step)


def _number(stream: str) -> int:
    return _signed(int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little"))


@final
class CounterRng:
    """The `Rng` of this library: SplitMix64 mixing of (row seed, stream, position, index), identical on every device.

    Source: Salmon et al. 2011 (counter-based generators); the mixing function is Steele et al. 2014.
    Cost: 8 bytes per row; a draw is about twenty elementwise operations per index level, `split` and `at` nothing until then.
    """

    def __init__(self, key: Tensor | Callable[[], Tensor]) -> None:
        """`key` [B] int64, or how to make it: a stream that is never drawn from costs nothing."""
        self._source = key

    @cached_property
    def _key(self) -> Tensor:
        return self._source if isinstance(self._source, Tensor) else self._source()

    @classmethod
    def seeded(cls, seeds: Tensor | Sequence[int], device: torch.device | str = "cpu") -> "CounterRng":
        """One row per seed ([B] integers); equal seeds give equal rows."""
        values = seeds if isinstance(seeds, Tensor) else torch.tensor([_signed(int(seed)) for seed in seeds], dtype=torch.int64)
        return cls(_absorb(values.to(device, torch.int64), 0))

    @property
    def batch(self) -> int:
        return self._key.shape[0]

    def uniform(self, *shape: int) -> Tensor:
        return _shift(self._bits(shape), 11).double().mul_(2.0**-53)

    def normal(self, *shape: int) -> Tensor:
        streams = torch.tensor([[_number("radius")], [_number("angle")]], device=self._key.device)
        u, v = CounterRng(_absorb(self._key, streams)).uniform(*shape)  # both at once: half as many small operations
        return u.neg_().log1p_().mul_(-2.0).sqrt_().mul_(v.mul_(2.0 * math.pi).cos_())

    def split(self, stream: str) -> "CounterRng":
        return CounterRng(lambda: _absorb(self._key, _number(stream)))

    def at(self, position: Tensor | int) -> "CounterRng":
        return CounterRng(lambda: _absorb(self._key ^ _MIX1, position))

    def fork(self, rows: Tensor) -> "CounterRng":
        return CounterRng(self._key[rows])

    def join(self, other: "CounterRng") -> "CounterRng":
        return CounterRng(torch.cat([self._key, other._key]))

    def nbytes(self) -> int:
        return self._key.nbytes

    def _bits(self, shape: Sequence[int]) -> Tensor:
        bits = self._key
        for size in shape:
            bits = _absorb(bits.unsqueeze(-1), torch.arange(size, device=bits.device))
        return _mix(bits)
