"""What recurrent mixers share: one carried state a row beside the pending tokens' inputs, histories along trees, chunks.

A mixer says what a token puts in, how tokens read a carried state and one another along their paths, and how the state moves
over a chain of tokens. From that follow the parallel form (chunk after chunk), the cached call on a chain or a tree, and commit,
which moves the state over the kept tokens' inputs: memory holds one state and the pending inputs, never a state a node.

This file knows no rule of recurrence.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import cast, final

import torch
from torch import Tensor, nn

from fewstep.core.mixer import Aux, Causal, Context
from fewstep.nn.masks import places
from fewstep.nn.slots import Slots

Carry = tuple[Tensor, ...]  # what is carried from token to token, each [B,...]
Inputs = tuple[Tensor, ...]  # what tokens put in, each [B,T,...]


@final
@dataclass(frozen=True, eq=False, slots=True)
class Links:
    """How T tokens hang together: `parent` [B,T] as in `core.mixer.Tree` (-1: it follows the carried state, -2: padding).

    `sees` [B,T,T]: the token itself and its ancestors. `fresh` [B,T]: its path begins with an empty state, not with the carried
    one. `chain`: every token but the first follows the one before it.
    """

    parent: Tensor
    sees: Tensor
    fresh: Tensor
    chain: bool = False


@final
@dataclass(frozen=True, eq=False, slots=True)
class RecurrentState:
    """`carry` after the committed tokens, the last features of these `tail` [B,R,F], and of the pending nodes `features` [B,P,F]
    and `inputs` (each [B,P,...]). `slots` counts both kinds; R is the mixer's `reach`."""

    mixer: "Recurrent"
    slots: Slots
    carry: Carry
    tail: Tensor
    features: Tensor
    inputs: Inputs

    def commit(self, path: Tensor, keep: Tensor) -> "RecurrentState":
        width = int(keep.max()) if len(keep) else 0
        real = torch.arange(width, device=path.device) < keep.unsqueeze(1)
        path = torch.where(real, path[:, :width], 0)
        carry = self.carry
        if width:
            for start in range(0, width, self.mixer.chunk):
                piece = slice(start, start + self.mixer.chunk)
                carry = self.mixer.advance(carry, tuple(_pick(x, path[:, piece]) for x in self.inputs), real[:, piece])
        tail = self.tail
        if self.mixer.reach and width:
            known = torch.cat([tail, _pick(self.features, path)], 1)
            tail = _pick(known, keep.unsqueeze(1) + torch.arange(self.mixer.reach, device=path.device))
        return self._empty(self.slots.commit(path, keep), carry, tail)

    def rollback(self) -> "RecurrentState":
        return self._empty(self.slots.rollback(), self.carry, self.tail)

    def fork(self, rows: Tensor) -> "RecurrentState":
        carry, inputs = (tuple(x[rows] for x in group) for group in (self.carry, self.inputs))
        return RecurrentState(self.mixer, self.slots.fork(rows), carry, self.tail[rows], self.features[rows], inputs)

    def join(self, other: "RecurrentState") -> "RecurrentState":
        slots = self.slots.join(other.slots)
        carry = tuple(torch.cat(pair) for pair in zip(self.carry, other.carry, strict=True))
        inputs = tuple(torch.cat(pair) for pair in zip(self.inputs, other.inputs, strict=True))
        tail, features = torch.cat([self.tail, other.tail]), torch.cat([self.features, other.features])
        return RecurrentState(self.mixer, slots, carry, tail, features, inputs)

    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.carry, self.tail, self.features, *self.inputs))

    def _empty(self, slots: Slots, carry: Carry, tail: Tensor) -> "RecurrentState":
        """With no node pending."""
        inputs = tuple(x[:, :0] for x in self.inputs)
        return RecurrentState(self.mixer, slots, carry, tail, self.features[:, :0], inputs)


class Recurrent(nn.Module, ABC):
    """A causal mixer whose past is a state of fixed size.

    `reach`: how many earlier tokens' features a token's inputs are made of (a short convolution, a token shift). `chunk`: tokens
    that are read at once; the forms agree whatever it is. Cost: as `read` and `advance` over chunks; a cached call reads all
    pending nodes, since they may be anybody's ancestors.
    """

    modes = frozenset({"causal"})
    masks: frozenset[type] = frozenset({Causal})
    reach = 0
    chunk = 64

    def features(self, x: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,F]: what tokens within `reach` show one another; by default the activations."""
        return x

    @abstractmethod
    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        """What tokens put in, each [B,T,...], from their `features` [B,T,F], those of the `reach` tokens before each [B,T,R,F]
        (the nearest last; zeros before the first) and their positions [B,T]."""

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

    @abstractmethod
    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        """[B,T,...] -> [B,T,D]: norms, gates and the output layer."""

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> RecurrentState:
        with torch.no_grad():
            nothing = self.features(torch.zeros(batch, 1, self.width, device=device, dtype=dtype))
            tail = nothing.new_zeros(batch, self.reach, nothing.shape[2])
            inputs = self.inputs(nothing, tail.unsqueeze(1), torch.zeros(batch, 1, device=device, dtype=torch.int64))
        carry = self.begin(batch, device, dtype)
        none = tuple(x[:, :0] for x in inputs)
        return RecurrentState(self, Slots.empty(batch, capacity, device), carry, tail, nothing[:, :0], none)

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
        tail = features.new_zeros(batch, self.reach, features.shape[2])
        before = _pick(torch.cat([tail, features], 1), self._window(batch, count, x.device))
        near = torch.arange(self.reach, 0, -1, device=x.device)  # how far back each of them lies
        before = before * (place.unsqueeze(-1) >= near).unsqueeze(-1)
        inputs, outputs = self.inputs(features, before, ctx.positions), []
        carry = self.begin(batch, x.device, x.dtype)
        for start in range(0, count, self.chunk):
            piece = tuple(part[:, start : start + self.chunk] for part in inputs)
            links, real, restart = _run(place[:, start : start + self.chunk])
            outputs.append(self.read(carry, piece, links))
            if start + self.chunk < count:
                if segments is not None:
                    carry = _where(restart, self.begin(batch, x.device, x.dtype), carry)
                carry = self.advance(carry, piece, real)
        return self.finish(torch.cat(outputs, 1), features), {}

    def extend(self, x: Tensor, ctx: Context, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        self._check(ctx)
        count, slots = x.shape[1], state.slots.extend(ctx.parent, x.shape[1])
        features = self.features(x)
        known = torch.cat([state.features, features], 1)
        before = self._before(known, state.tail, slots, count)
        positions = slots.index[:, -count:] if ctx.positions is None else ctx.positions
        new = self.inputs(features, before, positions)
        inputs = tuple(torch.cat(pair, 1) for pair in zip(state.inputs, new, strict=True))
        state = replace(state, slots=slots, features=known, inputs=inputs)
        y = self._read_chunks(state) if slots.pending == count > self.chunk and _straight(slots) else self._read_tree(state)
        return self.finish(y[:, -count:], features), state

    def _read_tree(self, state: RecurrentState) -> Tensor:
        slots = state.slots
        parent = _parents(slots)
        links = Links(parent, slots.reach & (parent > -2).unsqueeze(1), torch.zeros_like(parent, dtype=torch.bool), slots.chain)
        return self.read(state.carry, state.inputs, links)

    def _read_chunks(self, state: RecurrentState) -> Tensor:
        """The same for many tokens, of which each row's are one chain somewhere among padding."""
        parent, carry, outputs = _parents(state.slots), state.carry, []
        for start in range(0, parent.shape[1], self.chunk):
            piece = tuple(part[:, start : start + self.chunk] for part in state.inputs)
            here = parent[:, start : start + self.chunk]
            real, none = here > -2, torch.zeros_like(here, dtype=torch.bool)
            here = torch.where(real, (here - start).clamp(min=-1), -2)
            order = torch.arange(here.shape[1], device=here.device)
            sees = (order <= order[:, None]) & real.unsqueeze(1) | torch.eye(len(order), dtype=torch.bool, device=here.device)
            outputs.append(self.read(carry, piece, Links(here, sees & real.unsqueeze(1), none, bool(real.all()))))
            carry = self.advance(carry, piece, real)
        return torch.cat(outputs, 1)

    def _before(self, known: Tensor, tail: Tensor, slots: Slots, count: int) -> Tensor:
        """[B,count,R,F] the features of the tokens before each of the last `count` pending nodes, along its own path."""
        parent, reach = _parents(slots), self.reach
        if not reach:
            return known.new_zeros(known.shape[0], count, 0, known.shape[2])
        node, missing = parent[:, -count:], torch.zeros_like(parent[:, -count:])
        steps = []
        for _ in range(reach):
            inside = node >= 0
            # the tail's place, counted from its start: the first token before the pending ones is the last of the tail
            steps.append(torch.where(inside, reach + node.clamp(min=0), reach - 1 - missing))
            missing = torch.where(inside, missing, missing + 1)
            node = torch.where(inside, parent.gather(1, node.clamp(min=0)), -1)
        index = torch.stack(steps[::-1], 2)
        return _pick(torch.cat([tail, known], 1), index)

    def _window(self, batch: int, count: int, device: torch.device) -> Tensor:
        index = torch.arange(count, device=device).unsqueeze(1) + torch.arange(self.reach, device=device)
        return index.expand(batch, -1, -1)

    def _check(self, ctx: Context) -> None:
        if type(ctx.mask) not in self.masks:
            kind = type(self).__name__
            raise ValueError(f"mask={type(ctx.mask).__name__}: {kind} is causal and takes Causal alone; choose one of Causal")


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
    return x.to(torch.promote_types(x.dtype, torch.float32))


def even_heads(width: int, heads: int) -> int:
    """The width of a head. Raises ValueError where heads do not divide the width."""
    if width % heads:
        raise ValueError(f"heads={heads}: must divide width={width}; choose a divisor")
    return width // heads


def refuse_encoding(kind: str, position: object, *allowed: type) -> None:
    """Raises ValueError for a position encoding that a mixer cannot honour."""
    if type(position) not in allowed:
        known = ", ".join(sorted(each.__name__ for each in allowed))
        raise ValueError(f"position={type(position).__name__}: {kind} has no scores to bias; choose one of {known}")
