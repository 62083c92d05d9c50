"""What recurrent mixers share: one carried state a row beside the pending tokens' inputs, histories along trees, chunks.

A mixer says what a token puts in, how tokens read a carried state and one another along their paths, and how the state moves
over a chain of tokens. From that follow the parallel form (chunk after chunk), the cached call on a chain or a tree, and commit,
which moves the state over the kept tokens' inputs: memory holds one state and the pending inputs, never a state a node.

This file knows no rule of recurrence.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fewstep.core.mixer import Aux, Causal, Context
from fewstep.core.position import Shared
from fewstep.nn.masks import places
from fewstep.nn.slots import Slots

Carry = tuple[Tensor, ...]  # what is carried from token to token, each [B,...]
Inputs = tuple[Tensor, ...]  # what tokens put in, each [B,T,...]


@final
@dataclass(frozen=True, eq=False, slots=True)
class Links:
    """How T tokens hang together: `parent` [B,T] as in `core.mixer.Tree` (-1: it follows the carried state, -2: padding).

    `sees` [B,T,T]: the token itself and its ancestors. `fresh` [B,T]: its path begins with an empty state, not with the carried
    one. `chain`: every token but the first follows the one before it. `carried`: it is known that no token is fresh.
    """

    parent: Tensor
    sees: Tensor
    fresh: Tensor
    chain: bool = False
    carried: bool = False


@final
@dataclass(frozen=True, eq=False, slots=True)
class RecurrentState:
    """`carry` after the committed tokens, what the last of these show, `tail` [B,R,S], and of the `pending` nodes what they show
    [B,P,S] and their inputs, each [B,P,...]; () with none pending. `slots` counts both kinds; R is the mixer's `reach`."""

    mixer: "Recurrent"
    slots: Slots
    carry: Carry
    tail: Tensor
    pending: tuple[Tensor, ...] = ()

    def commit(self, path: Tensor, keep: Tensor) -> "RecurrentState":
        slots = self.slots.commit(path, keep)
        kept = _Kept.of(self.slots, slots, path, keep)
        if not kept.width:
            return RecurrentState(self.mixer, slots, self.carry, self.tail)
        shown, *inputs = map(kept.pick, self.pending)
        carry, tail, chunk = self.carry, self.tail, self.mixer.chunk
        for real, *piece in zip(*(x.split(chunk, 1) for x in (kept.real, *inputs)), strict=True):
            carry = self.mixer.advance(carry, tuple(piece), real)
        if reach := self.mixer.reach:
            known = torch.cat([tail, shown], 1)
            last = keep.unsqueeze(1) + torch.arange(reach, device=keep.device)
            tail = known[:, kept.width :] if kept.whole else _pick(known, last)
        return RecurrentState(self.mixer, slots, carry, tail)

    def rollback(self) -> "RecurrentState":
        return RecurrentState(self.mixer, self.slots.rollback(), self.carry, self.tail)

    def fork(self, rows: Tensor) -> "RecurrentState":
        carry, pending = (tuple(x[rows] for x in group) for group in (self.carry, self.pending))
        return RecurrentState(self.mixer, self.slots.fork(rows), carry, self.tail[rows], pending)

    def join(self, other: "RecurrentState") -> "RecurrentState":
        slots = self.slots.join(other.slots)
        carry = tuple(torch.cat(pair) for pair in zip(self.carry, other.carry, strict=True))
        return RecurrentState(self.mixer, slots, carry, torch.cat([self.tail, other.tail]))

    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.carry, self.tail, *self.pending))


@final
@dataclass(frozen=True, eq=False, slots=True)
class _Kept:
    """Which pending nodes a commit keeps: at most `width` a row, at `path` [B,width] (None: the first ones), of which the `real`
    [B,width] are there; `whole`: all of them."""

    width: int
    path: Tensor | None
    real: Tensor
    whole: bool

    @classmethod
    def of(cls, before: Slots, after: Slots, path: Tensor, keep: Tensor) -> "_Kept":
        whole = before.uniform and after.uniform
        width = after.base - before.base if whole else int(keep.max()) if len(keep) else 0
        real = torch.arange(width, device=path.device) < keep.unsqueeze(1)
        if whole and before.moves(path, keep) is None:
            return cls(width, None, real, whole)
        return cls(width, path[:, :width] if whole else torch.where(real, path[:, :width], 0), real, whole)

    def pick(self, x: Tensor) -> Tensor:
        """[B,width,...] of x [B,P,...]."""
        if self.path is not None:
            return _pick(x, self.path)
        return x if x.shape[1] == self.width else x[:, : self.width]


class Recurrent(nn.Module, ABC):
    """A causal mixer whose past is a state of fixed size.

    `reach`: how many earlier tokens show something that a token's inputs are made of (a short convolution, a token shift).
    `shows`: which of their features. `chunk`: tokens that are read at once; the forms agree whatever it is. Cost: as `read` and
    `advance` over chunks; a cached call reads all pending nodes, since they may be anybody's ancestors.
    `ctx.shared` keys: ("recurrent", ...), what layers know alike of the pending nodes and of positions.
    """

    modes = frozenset({"causal"})
    masks: frozenset[type] = frozenset({Causal})
    reach = 0
    shows = slice(None)
    chunk = 64

    def features(self, x: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,F]: what tokens make of themselves alone; by default the activations."""
        return x

    @abstractmethod
    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        """What tokens put in, each [B,T,...], from their `features` [B,T,F], what the `reach` tokens before each show [B,T,R,S]
        (the nearest last; zeros before the first) and their positions [B,T]."""

    def turned(self, inputs: Inputs, positions: Tensor, shared: Shared) -> Inputs:
        """`inputs` as a position encoding turns them, with the tables that the layers of a call have in `shared`."""
        return inputs

    @abstractmethod
    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        """The empty state: zeros or what stands for them, of float32 or wider."""

    @abstractmethod
    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        """[B,T,...] what tokens make of the carried state and of the tokens they see, themselves included.

        What a padding token holds, or one that another does not see, must not matter to a bit; padding's own result is free.
        """

    @abstractmethod
    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        """The state after a chain of at most `chunk` tokens, of which only the `real` [B,T] are there (in any pattern)."""

    def swept(self, inputs: Inputs, place: Tensor) -> Tensor | None:
        """[B,T,...] what `read` makes of whole sequences from the empty state, where a kernel does so at once; None: elsewhere.

        Each token stands at `place` [B,T] of its own sequence.
        """
        return None

    @abstractmethod
    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        """[B,T,...] -> [B,T,D]: norms, gates and the output layer."""

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> RecurrentState:
        with torch.no_grad():
            shown = self._shown(self.features(torch.zeros(batch, 1, self.width, device=device, dtype=dtype)))
        tail = shown.new_zeros(batch, self.reach, shown.shape[2])
        return RecurrentState(self, Slots.empty(batch, capacity, device), self.begin(batch, device, dtype), tail)

    @property
    @abstractmethod
    def width(self) -> int:
        """D."""

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Aux]:
        self._check(ctx)
        assert ctx.positions is not None, "a parallel pass has no state to count positions"
        (batch, count, _), segments = x.shape, ctx.segments
        place = torch.arange(count, device=x.device).expand(batch, -1) if segments is None else places(segments)
        features = self.features(x)
        before = self._before_each(self._shown(features), None if segments is None else place)
        inputs = self.turned(self.inputs(features, before, ctx.positions), ctx.positions, _tables(ctx))
        y = self.swept(inputs, place)
        return self.finish(self._chunk_by_chunk(inputs, place, ctx, x) if y is None else y, features), {}

    def _chunk_by_chunk(self, inputs: Inputs, place: Tensor, ctx: Context, x: Tensor) -> Tensor:
        """What `swept` gives, for activations `x`."""
        outputs, carry = [], self.begin(x.shape[0], x.device, x.dtype)
        key = ("recurrent", "runs", self.chunk, *place.shape)
        if key not in ctx.shared:
            ctx.shared[key] = [_run(here) for here in place.split(self.chunk, 1)]
        pieces = zip(*(part.split(self.chunk, 1) for part in inputs), strict=True)
        for i, (piece, (links, real, restart)) in enumerate(zip(pieces, ctx.shared[key], strict=True)):
            outputs.append(self.read(carry, piece, links))
            if (i + 1) * self.chunk < x.shape[1]:
                if ctx.segments is not None:
                    carry = _where(restart, self.begin(x.shape[0], x.device, x.dtype), carry)
                carry = self.advance(carry, piece, real)
        return torch.cat(outputs, 1)

    def extend(self, x: Tensor, ctx: Context, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        self._check(ctx)
        count, slots = x.shape[1], _table(ctx, state.slots, x.shape[1])
        features = self.features(x)
        shown, earlier = self._shown(features), state.pending
        known = torch.cat([earlier[0], shown], 1) if earlier else shown
        positions = slots.index[:, -count:] if ctx.positions is None else ctx.positions
        inputs = self.inputs(features, self._before(known, state.tail, ctx, slots, count), positions)
        inputs = self.turned(inputs, positions, _tables(ctx))
        if earlier:
            inputs = tuple(torch.cat(pair, 1) for pair in zip(earlier[1:], inputs, strict=True))
        if slots.pending == count > self.chunk and _straight(slots):
            y = self._read_chunks(state.carry, inputs, _parents(slots))
        else:
            y = self.read(state.carry, inputs, _links(ctx, slots))
        y = y[:, -count:] if earlier else y
        return self.finish(y, features), RecurrentState(self, slots, state.carry, state.tail, (known, *inputs))

    def _read_chunks(self, carry: Carry, inputs: Inputs, parent: Tensor) -> Tensor:
        """What `read` makes of many pending tokens, of which each row's are one chain somewhere among padding."""
        outputs = []
        for start in range(0, parent.shape[1], self.chunk):
            piece = tuple(part[:, start : start + self.chunk] for part in inputs)
            here = parent[:, start : start + self.chunk]
            real, none = here > -2, torch.zeros_like(here, dtype=torch.bool)
            here = torch.where(real, (here - start).clamp(min=-1), -2)
            order = torch.arange(here.shape[1], device=here.device)
            sees = (order <= order[:, None]) & real.unsqueeze(1) | torch.eye(len(order), dtype=torch.bool, device=here.device)
            outputs.append(self.read(carry, piece, Links(here, sees & real.unsqueeze(1), none, bool(real.all()), carried=True)))
            carry = self.advance(carry, piece, real)
        return torch.cat(outputs, 1)

    def _shown(self, features: Tensor) -> Tensor:
        """[B,T,S] of features [B,T,F]: what later tokens may need of them."""
        return features[..., self.shows if self.reach else slice(0)]

    def _before(self, known: Tensor, tail: Tensor, ctx: Context, slots: Slots, count: int) -> Tensor:
        """[B,count,R,S] what the tokens before each of the last `count` pending nodes show, along its own path."""
        if not self.reach:
            return known.new_zeros(known.shape[0], count, 0, known.shape[2])
        known = torch.cat([tail, known], 1)
        if slots.chain:
            return known.unfold(1, self.reach, 1)[:, -count - 1 : -1].transpose(2, 3)
        key = ("recurrent", "before", slots, self.reach, count)
        if key not in ctx.shared:
            ctx.shared[key] = _path(_parents(slots), self.reach)[:, -count:]
        return _pick(known, ctx.shared[key])

    def _before_each(self, shown: Tensor, place: Tensor | None) -> Tensor:
        """[B,T,R,S] what the tokens before each show, zeros before the first of its sequence, in which it stands at `place`."""
        if not self.reach:
            return shown.unsqueeze(2)[:, :, :0]
        before = pad(shown, (0, 0, self.reach, 0)).unfold(1, self.reach, 1)[:, :-1].transpose(2, 3)
        if place is None:
            return before
        near = torch.arange(self.reach, 0, -1, device=shown.device)  # how far back each of them lies
        return before * (place.unsqueeze(-1) >= near).unsqueeze(-1)

    def _check(self, ctx: Context) -> None:
        if type(ctx.mask) not in self.masks:
            kind = type(self).__name__
            raise ValueError(f"mask={type(ctx.mask).__name__}: {kind} is causal and takes Causal alone; choose one of Causal")


def _tables(ctx: Context) -> Shared:
    """Where encodings keep the tables of a call, apart from those of attention, which are as narrow as the activations."""
    tables: Shared = ctx.shared.setdefault(("recurrent", "positions"), {})
    return tables


def _table(ctx: Context, slots: Slots, count: int) -> Slots:
    """The slot table with `count` more nodes: that of the layers before, where it says the same, so that all go on with one."""
    mine = slots.extend(ctx.parent, count)
    found: Slots = ctx.shared.setdefault(("recurrent", "slots"), mine)
    if found is mine or slots.pending or found.pending != count or found.parent is not mine.parent:
        return mine
    alike = (found.base, found.capacity, found.uniform) == (mine.base, mine.capacity, mine.uniform)
    return found if alike and torch.equal(found.lengths, mine.lengths) else mine


def _links(ctx: Context, slots: Slots) -> Links:
    """How all pending nodes hang together."""
    key = ("recurrent", "links", slots)
    if key not in ctx.shared:
        parent = _parents(slots)
        sees = slots.reach if slots.chain else slots.reach & (parent > -2).unsqueeze(1)
        ctx.shared[key] = Links(parent, sees, torch.zeros_like(parent, dtype=torch.bool), slots.chain, carried=True)
    links: Links = ctx.shared[key]
    return links


def _path(parent: Tensor, reach: int) -> Tensor:
    """[B,P,R] the places of the `reach` tokens before each pending node, counted over the tail of R tokens and the nodes."""
    node, missing = parent, torch.zeros_like(parent)
    steps = []
    for _ in range(reach):
        inside = node >= 0
        # the first token before the pending ones is the last of the tail
        steps.append(torch.where(inside, reach + node.clamp(min=0), reach - 1 - missing))
        missing = torch.where(inside, missing, missing + 1)
        node = torch.where(inside, parent.gather(1, node.clamp(min=0)), -1)
    return torch.stack(steps[::-1], 2)


def _parents(slots: Slots) -> Tensor:
    """[B,P], whatever the table holds."""
    if slots.parent is not None:
        return slots.parent
    order = torch.arange(-1, slots.pending - 1, device=slots.lengths.device)
    return order.expand(slots.lengths.shape[0], -1)


def _straight(slots: Slots) -> bool:
    """Whether the pending nodes of each row are one chain without a gap."""
    if slots.chain:
        return True
    parent = cast(Tensor, slots.parent)
    order = torch.arange(parent.shape[1], device=parent.device)
    begins = (parent == -1).sum(1) <= 1
    follows = (parent == order - 1) | (parent < 0)
    after_gap = (parent[:, 1:] >= 0) & (parent[:, :-1] == -2)
    return bool(begins.all() and follows.all() and not after_gap.any())


def _run(place: Tensor) -> tuple[Links, Tensor, Tensor]:
    """A chunk of packed sequences, whose tokens stand at `place` [B,T] of theirs.

    Its links; the tokens [B,T] of the sequence that goes on behind it; whether [B] that one began within it.
    """
    count = place.shape[1]
    order = torch.arange(count, device=place.device)
    start = order - place  # where each token's sequence began, below 0: before the chunk
    sees = (order <= order[:, None]) & (order >= start.unsqueeze(2))
    last = start[:, -1:]
    parent = torch.where(place > 0, order - 1, -1).clamp(min=-1)
    whole = bool((start[:, -1] <= 0).all() and (place[:, 1:] > 0).all())
    return Links(parent, sees, start >= 0, whole), order >= last, last.squeeze(1) >= 0


def _where(condition: Tensor, yes: Carry, no: Carry) -> Carry:
    """Row by row."""
    return tuple(torch.where(condition.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(yes, no, strict=True))


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x [B,S,...] at `index` [B,K] or [B,K,R] along its second dimension."""
    flat = index.flatten(1)
    picked = x.gather(1, flat.view(*flat.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
    return picked.view(*index.shape, *x.shape[2:])


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider: what recurrences add up in."""
    return x if x.dtype.itemsize >= torch.float32.itemsize else x.float()


def even_heads(width: int, heads: int) -> int:
    """The width of a head. Raises ValueError where heads do not divide the width."""
    if width % heads:
        raise ValueError(f"heads={heads}: must divide width={width}; choose a divisor")
    return width // heads
