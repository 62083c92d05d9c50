"""Where tokens live in a cache: committed tokens first, then the pending nodes of a tree, per row.

`Slots` is the bookkeeping that every cache of a stack shares; it holds no activations. Row b's committed tokens fill slots
0 .. lengths[b]-1; the pending nodes of all rows start at one common slot `base` = max(lengths), so that appending is a slice
and rejecting is free; committing copies the kept nodes down to each row's own end.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast, final

import torch
from torch import Tensor

from fewstep.core.mixer import ancestors, depths


@final
@dataclass(frozen=True, eq=False)
class Moves:
    """Copies within a cache: slot `source` [B,K] to slot `target` [B,K] (repeats of one copy where a row keeps fewer)."""

    source: Tensor
    target: Tensor

    def apply(self, cache: Tensor) -> Tensor:
        """`cache` [B,C,S,E] (slots along dimension 2) after the copies; in place unless it carries a graph."""
        shape = (-1, cache.shape[1], -1, cache.shape[3])
        if cache.requires_grad:  # a scatter's backward would count each repeat
            slots = torch.arange(cache.shape[2], device=cache.device).expand(cache.shape[0], -1)
            return cache.gather(2, slots.scatter(1, self.target, self.source)[:, None, :, None].expand(shape))
        kept = cache.gather(2, self.source[:, None, :, None].expand(shape))
        return cache.scatter_(2, self.target[:, None, :, None].expand(shape), kept)


@final
class Slots:
    """An immutable slot table: `lengths` [B] committed tokens, `pending` nodes from slot `base` on, their `parent` [B,P].

    `parent` None means a chain without padding; `uniform`: all rows have `base` tokens. Every transition is a pure function; the
    last result is remembered per argument, so that the layers of a stack, which make the same transition one after another,
    share one new table.
    """

    def __init__(
        self, lengths: Tensor, capacity: int, base: int, uniform: bool, pending: int = 0, parent: Tensor | None = None
    ) -> None:
        self.lengths, self.capacity, self.base, self.uniform = lengths, capacity, base, uniform
        self.pending, self.parent = pending, parent
        self._last: tuple[tuple[Any, ...], Any] | None = None
        self._moved: tuple[tuple[Any, ...], Moves | None] | None = None

    @classmethod
    def empty(cls, batch: int, capacity: int, device: torch.device | str) -> "Slots":
        return cls(torch.zeros(batch, dtype=torch.int64, device=device), capacity, base=0, uniform=True)

    @property
    def end(self) -> int:
        """The first slot never used so far."""
        return self.base + self.pending

    def extend(self, parent: Tensor | None, count: int) -> "Slots":
        """`count` more pending nodes with `parent` [B,count] (None: a chain). Raises ValueError over capacity."""
        return self._remember(("extend", parent, count), lambda: self._extend(parent, count))

    def commit(self, path: Tensor, keep: Tensor) -> "Slots":
        """The table after keeping `keep[b]` nodes of `path`; the caches owe it `moves`."""
        return self._remember(("commit", path, keep), lambda: self._commit(path, keep))

    def moves(self, path: Tensor, keep: Tensor) -> Moves | None:
        """The copies that committing takes in a cache; None: every node is in place."""
        if self._moved is None or not _same(self._moved[0], (path, keep)):
            self._moved = ((path, keep), self._moves(path, keep))
        return self._moved[1]

    def rollback(self) -> "Slots":
        return self._remember(("rollback",), lambda: Slots(self.lengths, self.capacity, self.base, self.uniform))

    def fork(self, rows: Tensor) -> "Slots":
        return self._remember(("fork", rows), lambda: self._fork(rows))

    def join(self, other: "Slots") -> "Slots":
        """Both tables one after the other. Raises ValueError while nodes are pending."""
        return self._remember(("join", other), lambda: self._join(other))

    @cached_property
    def chain(self) -> bool:
        """Whether the pending nodes of every row are one branch without padding."""
        if self.parent is None:
            return True
        order = torch.arange(-1, self.pending - 1, device=self.parent.device)
        return torch.equal(self.parent, order.expand_as(self.parent))

    @cached_property
    def reach(self) -> Tensor:
        """[B,P,P] bool: which pending nodes each pending node sees."""
        if not self.chain:
            return ancestors(cast(Tensor, self.parent))
        chain = torch.ones(self.pending, self.pending, dtype=torch.bool, device=self.lengths.device).tril()
        return chain.expand(self.lengths.shape[0], -1, -1)

    @cached_property
    def index(self) -> Tensor:
        """[B,P] the sequence index of each pending node: committed length + depth in the tree."""
        if not self.chain:
            return self.lengths[:, None] + depths(cast(Tensor, self.parent))
        return self.lengths[:, None] + torch.arange(self.pending, device=self.lengths.device)

    def visible(self, count: int, window: int | None) -> Tensor | None:
        """[B,1,count,end] bool for the last `count` pending nodes over all slots; None: they see everything."""
        if self.uniform and count == 1 and self.chain and (window is None or self.end <= window):
            return None
        device = self.lengths.device
        slot = torch.arange(self.base, device=device)
        committed = (slot < self.lengths[:, None])[:, None].expand(-1, count, -1)
        allowed = torch.cat([committed, self.reach[:, self.pending - count :]], 2)
        if window is not None:
            keys = torch.cat([slot.expand(self.lengths.shape[0], -1), self.index], 1)
            allowed = allowed & (self.index[:, self.pending - count :, None] - keys[:, None] < window)
        return allowed[:, None]

    def _remember(self, key: tuple[Any, ...], make: Any) -> Any:
        if self._last is None or not _same(self._last[0], key):
            self._last = (key, make())
        return self._last[1]

    def _extend(self, parent: Tensor | None, count: int) -> "Slots":
        if self.end + count > self.capacity:
            raise ValueError(
                f"capacity={self.capacity}: {self.end} slots in use, {count} more asked for; make a state of larger capacity"
            )
        pending = self.pending + count
        if self.pending and not (self.parent is None and parent is None):
            order = torch.arange(-1, pending - 1, device=self.lengths.device).expand(self.lengths.shape[0], -1)
            earlier = order[:, : self.pending] if self.parent is None else self.parent
            parent = torch.cat([earlier, order[:, self.pending :] if parent is None else parent], 1)
        return Slots(self.lengths, self.capacity, self.base, self.uniform, pending, parent)

    def _commit(self, path: Tensor, keep: Tensor) -> "Slots":
        counts = keep.tolist()
        lengths, uniform = self.lengths + keep, self.uniform and min(counts) == max(counts)
        base = self.base + counts[0] if uniform else int(lengths.max())
        return Slots(lengths, self.capacity, base, uniform)

    def _moves(self, path: Tensor, keep: Tensor) -> Moves | None:
        most = int(keep.max())
        order, path = torch.arange(most, device=path.device), path[:, :most]
        kept = order < keep[:, None]
        if not most or (self.uniform and not bool(((path != order) & kept).any())):
            return None
        source = self.base + torch.where(kept, path, path[:, :1])
        target = torch.where(kept, self.lengths[:, None] + order, self.lengths[:, None])
        return Moves(source, target)  # a row that keeps nothing writes one slot beyond its end

    def _fork(self, rows: Tensor) -> "Slots":
        lengths = self.lengths[rows]
        if self.pending or not len(rows):
            parent = None if self.parent is None else self.parent[rows]
            return Slots(lengths, self.capacity, self.base, self.uniform, self.pending, parent)
        base = int(lengths.max())
        return Slots(lengths, self.capacity, base, uniform=int(lengths.min()) == base)

    def _join(self, other: "Slots") -> "Slots":
        if self.pending or other.pending:
            raise ValueError(
                f"pending={self.pending}+{other.pending}: states join only when nothing is pending; commit or roll back first"
            )
        lengths = torch.cat([self.lengths, other.lengths])
        uniform = self.uniform and other.uniform and self.base == other.base
        return Slots(lengths, max(self.capacity, other.capacity), max(self.base, other.base), uniform)


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(x is y or (isinstance(x, str | int) and x == y) for x, y in zip(a, b, strict=True))
