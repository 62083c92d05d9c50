"""Batches from shards: which tokens make batch n is a function of (seed, n) alone, so a resumed run needs only its step.

This file knows no corpus, no tokenizer but its end-of-text id, and no objective.
"""

from collections.abc import Iterator, Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.training.data.shards import Shard


@final
class Loader:
    """Training batches of packed windows in a shuffled order, a new one each epoch.

    The documents of a shard, end-of-text after each, form one stream, which is cut into windows of `length` tokens: a document
    that does not fit goes on in another window as a segment of its own. Each epoch shifts the cuts by a random offset, uses
    each window at most once, and leaves out what fills no window or no batch.

    `batch` rows and `length` tokens per row, both >= 1; `seed` any integer.
    Raises ValueError if the shards hold less than one batch.
    Cost: an epoch's order takes 8 bytes per window; a batch reads `batch * length` tokens and one binary search for each.
    """

    def __init__(self, shards: Sequence[Shard], *, batch: int, length: int, seed: int) -> None:
        _positive(batch, length)
        self._shards, self._batch, self._length = tuple(shards), batch, length
        self._rng = CounterRng.seeded([seed]).split("data")
        # One token per window is kept back so that every offset below `length` leaves the same number of windows.
        counts = [max(0, (len(shard) - length + 1) // length) for shard in self._shards]
        self._starts = np.cumsum([0, *counts])
        self.steps_per_epoch = int(self._starts[-1]) // batch
        if self.steps_per_epoch < 1:
            tokens = sum(map(len, self._shards))
            needed = f"batch={batch} rows of length={length}"
            raise ValueError(f"data: {tokens} tokens do not fill one batch ({needed}); add text or lower batch or length")
        self._epoch, self._order, self._offset = self._arrange(0)

    @property
    def tokens_per_batch(self) -> int:
        return self._batch * self._length

    def batch(self, step: int) -> Batch:
        """Batch number `step` >= 0 of the run: `tokens` and `segments` [B,T] int64; a row's segments count from 0."""
        if step < 0:
            raise ValueError(f"step={step}: must be >= 0; count steps from the start of the run")
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order, self._offset = self._arrange(epoch)
        windows = self._order[place * self._batch : (place + 1) * self._batch]
        tokens = np.empty((self._batch, self._length), dtype=np.int64)
        segments = np.empty_like(tokens)
        owners = np.searchsorted(self._starts, windows, side="right") - 1
        for row, (window, owner) in enumerate(zip(windows, owners, strict=True)):
            start = int(window - self._starts[owner]) * self._length + self._offset
            tokens[row], segments[row] = _window(self._shards[owner], start, self._length)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(segments))

    def _arrange(self, epoch: int) -> tuple[int, NDArray[np.int64], int]:
        rng = self._rng.at(epoch)
        order: Tensor = rng.split("order").uniform(int(self._starts[-1]))[0].argsort(stable=True)
        offset = int(rng.split("offset").uniform()[0].item() * self._length)
        return epoch, order.numpy(), offset


def validation_batches(shards: Sequence[Shard], *, batch: int, length: int, eos: int) -> Iterator[Batch]:
    """Every token of `shards` exactly once, in order: [B,T] batches whose unused places hold `eos` with segment -1.

    Windows are cut as in training; the last window of a shard and the last batch are padded, so all batches have one shape.
    """
    _positive(batch, length)
    rows = [(shard, start) for shard in shards for start in range(0, len(shard), length)]
    for first in range(0, len(rows), batch):
        tokens = np.full((batch, length), eos, dtype=np.int64)
        segments = np.full((batch, length), -1, dtype=np.int64)
        for row, (shard, start) in enumerate(rows[first : first + batch]):
            width = min(length, len(shard) - start)
            tokens[row, :width], segments[row, :width] = _window(shard, start, width)
        yield Batch(torch.from_numpy(tokens), torch.from_numpy(segments))


def _window(shard: Shard, start: int, width: int) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
    owner = np.searchsorted(shard.ends, np.arange(start, start + width), side="right")
    return shard.tokens[start : start + width], owner - owner[0]


def _positive(batch: int, length: int) -> None:
    for field, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise ValueError(f"{field}={value}: must be >= 1; give the rows and the tokens per row")
