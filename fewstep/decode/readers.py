"""How a model reads a canvas: all of it in one parallel pass, from an exact or an approximate cache, or guided.

This file knows models by `core.model` and their bidirectional pass alone.
"""

import math
from typing import Any, Literal, Protocol, cast, final, runtime_checkable

import torch
from torch import Tensor

from fewstep.core.mixer import Blocks, Full, Mask, State, Tree
from fewstep.core.model import Target
from fewstep.decode.prefill import placement
from fewstep.decode.unmask import Canvas, Reader

_CHUNK = 512  # tokens of a prompt an evaluation, as in prefill
_SHORT = 32  # tokens that are read with the window behind them


class Read(Protocol):
    """What a parallel pass gives: `final` [B,T,D], to be unembedded."""

    @property
    def final(self) -> Tensor: ...


@runtime_checkable
class Network(Target, Protocol):
    """A language model with a parallel pass under any mask. `shifted`: a token is predicted by the output before it, the first
    by its own. `noisy`: it is told how much of its input is corrupted."""

    mask_token: int | None
    shifted: bool
    noisy: bool

    def __call__(
        self, tokens: Tensor, segments: Tensor | None = None, *, mask: Mask | None = None, noise: Tensor | None = None
    ) -> Read: ...

    def embed(self, tokens: Tensor, noise: Tensor | None = None) -> Tensor: ...


@final
class Whole:
    """The whole canvas, at every call: exact for masked diffusion (`Full`) and, uncached, for block diffusion (`Blocks`).

    Cost of a call: a parallel pass over the canvas, logits at the window alone.
    """

    calls = 1

    def __init__(self, network: Network, mask: Full | Blocks = Full()) -> None:
        self._network, self._mask = network, mask
        self._x = self._segments = self._place = torch.empty(0)

    def enter(self, x: Tensor, length: Tensor, first: Tensor, width: int) -> Tensor:
        if isinstance(self._mask, Blocks):
            check_width(width, self._mask.size)
        places = torch.arange(x.shape[1], device=x.device)
        self._segments = (places < length.unsqueeze(1)).long() - 1  # 0, and -1 at padding
        # one place more takes what a last block has beyond the canvas
        self._x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        self._place = (first.unsqueeze(1) + torch.arange(width, device=x.device)).clamp(max=x.shape[1])
        return torch.zeros_like(first)

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        network, count = self._network, self._x.shape[1] - 1
        canvas = self._x.scatter(1, self._place, x)[:, :count]
        level = None
        if network.noisy:
            level = noise.unsqueeze(1).expand(-1, count)
            if isinstance(self._mask, Blocks):  # earlier blocks are clean, and later ones are not seen
                level = torch.where(torch.arange(count, device=x.device) < self._place[:, :1], 0.0, level)
        segments = self._segments if bool((self._segments < 0).any()) else None
        final_hidden = network(canvas, segments, mask=self._mask, noise=level).final
        place = (self._place - int(network.shifted)).clamp(0, count - 1).unsqueeze(-1).expand(-1, -1, final_hidden.shape[-1])
        return network.unembed(final_hidden.gather(1, place))

    def fork(self, rows: Tensor) -> "Whole":
        copy = Whole(self._network, self._mask)
        if self._x.dim() == 2:
            copy._x, copy._segments, copy._place = (tensor[rows] for tensor in (self._x, self._segments, self._place))
        return copy


@final
class Cached:
    """Block diffusion from a cache of what is final: exact, since earlier blocks never see later ones.

    `state` holds the first `read` [R] tokens of each row. What became final since the last window is read in the first call of
    the next one, and by itself where it is long, so that no other row's first call is. Cost of a call: the block's tokens, and
    those that the cache lacks.
    Source: Arriola et al. 2025, arXiv 2503.09573, section 3.2.
    """

    calls = 1

    def __init__(self, network: Network, size: int, state: State, read: Tensor) -> None:
        """`size` of a block; `state` has room for the longest row beside what is pending: a window and what is not read yet."""
        self._network, self._size = network, size
        self.state, self.read = state, read
        self._x = self._first = self._length = torch.empty(0)
        self._before: Tensor | None = None  # [R,V] logits of the token before the window, which a shifted model is led by

    @classmethod
    def of(cls, network: Network, size: int, batch: int, longest: int) -> "Cached":
        """Nothing read so far, of `batch` rows of at most `longest` tokens."""
        device, dtype = placement(network)
        # what is pending begins where the longest row ends, whichever row it is of
        capacity = 2 * -(-longest // size) * size
        state = network.init_state(batch, capacity, device=device, dtype=dtype)
        return cls(network, size, state, torch.zeros(batch, dtype=torch.int64, device=device))

    def advance(self, x: Tensor, first: Tensor) -> Tensor:
        """Read the canvases `x` [R,L] up to `first` [R], where a block begins, with [R] evaluations, one for each 512 tokens."""
        chunk = max(1, _CHUNK // self._size) * self._size
        calls = -((self.read - first) // chunk)
        while (most := int((first - self.read).max())) > 0:
            order, count = torch.arange(min(most, chunk), device=x.device), (first - self.read).clamp(max=chunk)
            place = (self.read.unsqueeze(1) + order).clamp(max=x.shape[1] - 1)
            tree, need = Tree.chain(x.gather(1, place), count), (count - 1).clamp(min=0).unsqueeze(1)
            output = self._network.extend(tree, self.state, mask=Blocks(self._size), need=need)
            self.state, self.read = output.state.commit(order.expand_as(place), count), self.read + count
            self._before = _chosen(count > 0, cast(Tensor, output.logits)[:, 0], self._before)
        return calls

    def enter(self, x: Tensor, length: Tensor, first: Tensor, width: int) -> Tensor:
        check_width(width, self._size)
        self._x, self._first, self._length = x, first, (length - first).clamp(max=width)
        return self.advance(x, torch.where(first - self.read > max(width, _SHORT), first, self.read))

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        lacking = (self._first - self.read).unsqueeze(1)
        span = lacking.squeeze(1) + self._length
        order, last = torch.arange(int(span.max()), device=x.device), x.shape[1] - 1
        unread, place = order < lacking, self.read.unsqueeze(1) + order
        own = x.gather(1, (order - lacking).clamp(0, last))
        tokens = torch.where(unread, self._x.gather(1, place.clamp(max=self._x.shape[1] - 1)), own)
        level = torch.where(unread, 0.0, noise.unsqueeze(1))
        need = None  # where it is all nodes, a packed model takes the call as one
        if len(order) <= last or bool(lacking.any()):
            window = torch.arange(last + 1, device=x.device) - int(self._network.shifted)
            need = (lacking + window).clamp(0, len(order) - 1)
        output = self._network.extend(
            Tree.chain(tokens, span),
            self.state,
            mask=Blocks(self._size),
            inputs=self._network.embed(tokens, level) if self._network.noisy else None,
            need=need,
        )
        self.state, self.read = output.state.commit(order.expand_as(tokens), lacking.squeeze(1)), self._first
        logits = cast(Tensor, output.logits)
        if not self._network.shifted:
            return logits
        fresh = (lacking.squeeze(1) > 0) | (self._first == 0)
        self._before = _chosen(fresh, logits[:, 0], self._before)
        return torch.cat([self._before.unsqueeze(1), logits[:, :-1] if need is None else logits[:, 1:]], 1)

    def fork(self, rows: Tensor) -> "Cached":
        copy = Cached(self._network, self._size, self.state.fork(rows), self.read[rows])
        copy._before = None if self._before is None else self._before[rows]
        if self._x.dim() == 2:
            copy._x, copy._first, copy._length = (tensor[rows] for tensor in (self._x, self._first, self._length))
        return copy


@final
class Approximate:
    """Masked diffusion from keys and values as they were when a window was entered: those before it, "dual" those after it too.

    Not exact, since every token sees every other: `Compared` tells how far off. Cost of a window's first call: a pass over the
    canvas; of the others: the window, and under "prefix" what follows it.
    Source: Wu et al. 2025, arXiv 2505.22618, section 3.2 (Fast-dLLM).
    """

    calls = 1

    def __init__(self, network: Network, kept: Literal["prefix", "dual"]) -> None:
        self._network, self._kept = network, kept
        self._state: State | None = None
        self._x = self._length = self._first = self._end = torch.empty(0)
        self._before: Tensor | None = None

    def enter(self, x: Tensor, length: Tensor, first: Tensor, width: int) -> Tensor:
        # one place more takes what a last window has beyond the canvas
        self._x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        self._length, self._first, self._end = length, first, first + width
        self._state = None
        return torch.zeros_like(first)

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        network, first, count, width = self._network, self._first, self._x.shape[1] - 1, x.shape[1]
        window = torch.arange(width, device=x.device)
        self._x = self._x.scatter(1, (first.unsqueeze(1) + window).clamp(max=count), x)
        refresh, state = self._state is None, self._state
        begin, span = (torch.zeros_like(first), self._length) if refresh else (first, self._length - first)
        if state is None:
            device, dtype = placement(network)
            state = network.init_state(len(x), 2 * count, device=device, dtype=dtype)
        elif self._kept == "dual":
            span = span.clamp(max=width)
        order = torch.arange(int(span.max()), device=x.device)
        place = (begin.unsqueeze(1) + order).clamp(max=count - 1)
        tokens = self._x.gather(1, place)
        output = network.extend(
            Tree.chain(tokens, span),
            state,
            mask=Blocks(2 * count),  # one block: whatever is there is seen
            positions=place if self._kept == "dual" else None,
            inputs=network.embed(tokens, noise.unsqueeze(1).expand_as(tokens)) if network.noisy else None,
            need=((first - begin).unsqueeze(1) + window - int(network.shifted)).clamp(0, len(order) - 1),
        )
        self._state = self._keep(output.state, order) if refresh else output.state.rollback()
        logits = cast(Tensor, output.logits)
        if not network.shifted:
            return logits
        self._before = logits[:, 0] if refresh else _chosen(first == 0, logits[:, 0], self._before)
        return torch.cat([self._before.unsqueeze(1), logits[:, 1:]], 1)

    def fork(self, rows: Tensor) -> "Approximate":
        copy = Approximate(self._network, self._kept)
        copy._state = None if self._state is None else self._state.fork(rows)
        copy._before = None if self._before is None else self._before[rows]
        if self._x.dim() == 2:
            held = (self._x, self._length, self._first, self._end)
            copy._x, copy._length, copy._first, copy._end = (tensor[rows] for tensor in held)
        return copy

    def _keep(self, state: State, order: Tensor) -> State:
        """`state` with what stays of the pending canvas, whose places are `order` [L], committed."""
        dropped = order >= self._first.unsqueeze(1)
        if self._kept == "dual":
            after = order >= self._end.unsqueeze(1)
            dropped = (dropped & ~after) | (order >= self._length.unsqueeze(1))
        path = (order + len(order) * dropped).argsort(1)
        return state.commit(path, (~dropped).sum(1))


@final
class Compared:
    """`reader`, and beside it an `exact` one that is asked the same: how far the predictions of the two are apart.

    Calls are those of `reader` alone. Forks share what was found.
    """

    def __init__(self, reader: Reader, exact: Reader, mask_token: int, found: list[Tensor] | None = None) -> None:
        self._reader, self._exact, self._mask_token = reader, exact, mask_token
        self._found: list[Tensor] = [] if found is None else found
        self.calls = reader.calls

    @property
    def deviation(self) -> float:
        """The mean total variation between the two laws of a masked token, over all calls so far; NaN before any."""
        return float(torch.cat(self._found).mean()) if self._found else math.nan

    def enter(self, x: Tensor, length: Tensor, first: Tensor, width: int) -> Tensor:
        self._exact.enter(x, length, first, width)
        return self._reader.enter(x, length, first, width)

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        logits = self._reader(x, noise)
        laws = [each[x == self._mask_token].double() for each in (logits, self._exact(x, noise))]
        told, true = (law.index_fill(-1, x.new_tensor([self._mask_token]), -torch.inf).softmax(-1) for law in laws)
        self._found.append((told - true).abs().sum(-1) / 2)
        return logits

    def fork(self, rows: Tensor) -> "Compared":
        return Compared(self._reader.fork(rows), self._exact.fork(rows), self._mask_token, self._found)


@final
class Guided:
    """Classifier-free guidance: 1 + weight times the logits, less `weight` times those of a canvas with all given tokens masked.

    Source: Nie et al. 2025, arXiv 2410.18514, section 3 (unsupervised guidance). Cost: two calls for one.
    """

    def __init__(self, conditional: Reader, unconditional: Reader, canvas: Canvas, weight: float) -> None:
        """The two readers are alike, and hold nothing in common. Raises ValueError for a model without a mask token."""
        if canvas.mask_token is None:
            raise ValueError(f"guidance={weight}: this model has no mask token to hide the prompt with; set guidance=0")
        if not weight >= 0:
            raise ValueError(f"guidance={weight}: must be at least 0, which is none; raise it")
        self._readers, self._weight, self._mask_token = (conditional, unconditional), weight, canvas.mask_token
        self._free, self._hidden = canvas.free, torch.empty(0)
        self.calls = conditional.calls + unconditional.calls

    def enter(self, x: Tensor, length: Tensor, first: Tensor, width: int) -> Tensor:
        given, unguided = self._readers
        blank = torch.where(self._free, x, self._mask_token)
        place = (first.unsqueeze(1) + torch.arange(width, device=x.device)).clamp(max=x.shape[1] - 1)
        self._hidden = ~self._free.gather(1, place)
        return given.enter(x, length, first, width) + unguided.enter(blank, length, first, width)

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        given, unguided = self._readers
        told, free = given(x, noise), unguided(torch.where(self._hidden, self._mask_token, x), noise)
        return told + self._weight * (told - free)

    def fork(self, rows: Tensor) -> "Guided":
        given, unguided = (reader.fork(rows) for reader in self._readers)
        canvas = Canvas(self._free[:0, :0].long(), self._free[rows], rows, self._mask_token)
        copy = Guided(given, unguided, canvas, self._weight)
        copy._hidden = self._hidden[rows] if self._hidden.dim() == 2 else self._hidden
        return copy


def _chosen(rows: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """[R,V]: the new logits of the `rows` [R] that have some, the old ones of the others."""
    return new if old is None else torch.where(rows.unsqueeze(1), new, old)


def check_width(width: int, size: int) -> None:
    """Raises ValueError where a window holds no whole blocks of the model."""
    if width % size:
        raise ValueError(f"block={width}: the model attends in blocks of {size}; choose a multiple of it")


def reader_of(
    network: Any,
    canvas: Canvas,
    mask: Full | Blocks = Full(),
    *,
    cached: bool | Literal["prefix", "dual"] = False,
    guidance: float = 0.0,
) -> Reader:
    """How `network` reads `canvas` under `mask`: an exact cache (True), an approximate one by its name, or none.

    Raises ValueError for a cache that does not go with the mask.
    """

    def one() -> Reader:
        if not cached:
            return Whole(network, mask)
        if isinstance(mask, Blocks) and cached is True:
            return Cached.of(network, mask.size, len(canvas.tokens), canvas.tokens.shape[1])
        if isinstance(mask, Full) and cached is not True:
            return Approximate(network, cached)
        known = "True for Blocks(size), which is exact; 'prefix' or 'dual' for Full(), which are not; or False"
        raise ValueError(f"cached={cached!r}: not a cache for mask={type(mask).__name__}; choose {known}")

    return one() if guidance == 0 else Guided(one(), one(), canvas, guidance)
