"""The one loop of generating tokens in any order: block after block, step after step of an order, until no gap is left.

This file knows orders and corruptions through their contracts only, and models as what reads a canvas.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, final

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.core.corruption import Corruption, Order
from fewstep.core.event import Cost, Event
from fewstep.core.random import Rng
from fewstep.diffusion.categorical import draw
from fewstep.diffusion.corruptions import absorber
from fewstep.diffusion.scores import law_of_scores, log_scores


class Reader(Protocol):
    """How a model reads a canvas: what it sees beside the window asked about, from which cache, guided by what.

    A reader is linear as a state is: `enter` and calls change it, only `fork` copies.
    """

    calls: int  # evaluations of the network a row and call

    def enter(self, x: Tensor, length: Tensor, first: Tensor, width: int) -> Tensor:
        """Turn to the positions `first` [R] .. first + width - 1 of canvases `x` [R,L] of `length` [R] tokens.

        Everything before `first` is final. Gives [R] int64: the evaluations it took to read what the cache lacked.
        """
        ...

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        """The logits [R,W,V] at the window, which holds `x` [R,W] with a share `noise` [R] of it corrupted."""
        ...

    def fork(self, rows: Tensor) -> Self:
        """A copy that holds row `rows[i]` as its row i."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Canvas:
    """What is to be filled: `tokens` [B,L] int64, gaps and padding included, `free` [B,L] True at gaps, `length` [B] of each row.

    `mask_token`: the id that no text has, None where the vocabulary has none.
    """

    tokens: Tensor
    free: Tensor
    length: Tensor
    mask_token: int | None


@final
@dataclass(frozen=True, slots=True)
class Settings:
    """`block`: the positions filled together before the next are begun, counted from the start of each row (None: all at once).

    `eos`: tokens that end a row where only gaps follow; the blocks after them are never begun. `scores`: the network puts out
    log-scores, as score entropy trains it.
    """

    block: int | None = None
    eos: tuple[int, ...] = ()
    scores: bool = False


@final
@dataclass(frozen=True, slots=True)
class Step:
    """What one step left, for the R rows that took it.

    `rows` [R]: the row of the canvas of each entry. `first` [R]: the position of the window's first token. `tokens` [R,W]: the
    window, `changed` [R,W] where it changed. `done` [R]: the window is final. `ended` [R]: so is the row. `calls` [R]:
    evaluations of the network, what was read for the cache included.
    """

    rows: Tensor
    first: Tensor
    tokens: Tensor
    changed: Tensor
    done: Tensor
    ended: Tensor
    calls: Tensor


@torch.inference_mode()
def unmask(
    reader: Reader,
    corruption: Corruption,
    order: Order[Any],
    grid: Tensor,
    canvas: Canvas,
    rng: Rng,
    settings: Settings = Settings(),
) -> Iterator[Event[Step]]:
    """Fill the gaps of every row, each at its own pace within a block; one event a step.

    One row of `rng` a row: its tokens depend on its own canvas and seed alone. `grid` [K+1] is gone through for each block. A row
    that is done with its block leaves the batch until all are. Costs are cumulative; reading a prompt is a call like any other.
    Raises ValueError for what order and corruption refuse, and for logits that are not numbers.
    """
    begun, cost = time.perf_counter(), Cost()
    width = settings.block or canvas.tokens.shape[1]
    noise = draw(corruption.prior.expand(*canvas.tokens.shape, -1), rng.split("start").uniform(canvas.tokens.shape[1]))
    # one place more takes what a last block has beyond the canvas
    x = functional.pad(torch.where(canvas.free, noise, canvas.tokens), (0, 1))
    tail = _tail(canvas)
    agenda = _agenda(canvas.free, width)
    held = list(range(len(x)))  # the rows that the reader holds, in its order
    ended: set[int] = set()
    for stage in range(max(map(len, agenda), default=0)):
        alive = [row for row in held if row not in ended and len(agenda[row]) > stage]
        if not alive:
            return
        if alive != held:
            reader, held = reader.fork(_index([held.index(row) for row in alive], x)), alive
        rows, block = _index(alive, x), _index([agenda[row][stage] for row in alive], x)
        work = _Window(reader, corruption, canvas, settings, rows, block * width)
        for step in work.steps(order, grid, x, width, rng.fork(rows).at(block), tail):
            ended |= set(step.rows[step.ended].tolist())
            cost = Cost(
                calls=cost.calls + int(step.calls.sum()),
                tokens=cost.tokens + work.filled(step, tail),
                seconds=time.perf_counter() - begun,
            )
            yield Event(step, cost)


@final
class _Window:
    """One block of each row: the positions `first` [R] and those after them."""

    def __init__(
        self, reader: Reader, corruption: Corruption, canvas: Canvas, settings: Settings, rows: Tensor, first: Tensor
    ) -> None:
        self._reader, self._corruption, self._canvas, self._settings = reader, corruption, canvas, settings
        self._rows, self._first = rows, first

    def steps(self, order: Order[Any], grid: Tensor, x: Tensor, width: int, rng: Rng, tail: Tensor) -> Iterator[Step]:
        """The steps of `order` on the window; `x` [B,L+1] holds what they leave."""
        canvas, rows, first, reader = self._canvas, self._rows, self._first, self._reader
        read = reader.enter(x[rows, :-1], canvas.length[rows], first, width)
        place = (first.unsqueeze(1) + torch.arange(width, device=x.device)).clamp(max=x.shape[1] - 1)
        tokens, free = x[rows].gather(1, place), functional.pad(canvas.free, (0, 1))[rows].gather(1, place)
        memory, i = order.init(tokens, free, self._corruption, grid), 0
        while True:
            prediction = _Prediction(reader, self._corruption, canvas.mask_token, self._settings.scores)
            before, (tokens, memory) = tokens, order.step(prediction, tokens, i, memory, rng.at(i))
            x[rows.unsqueeze(1), place] = tokens
            done = memory.done
            ended = done & self._ends(tokens, place, free, rows, tail) if bool(done.any()) else done
            yield Step(rows, first, tokens, tokens != before, done, ended, read + prediction.calls)
            if bool(done.all()):
                return
            i, read = i + 1, torch.zeros_like(read)
            if bool(done.any()):
                left = (~done).nonzero().squeeze(1)
                reader, memory, rng, read = reader.fork(left), memory.fork(left), rng.fork(left), read[left]
                rows, first, tokens, place, free = (v[left] for v in (rows, first, tokens, place, free))

    def filled(self, step: Step, tail: Tensor) -> int:
        """The gaps that `step` closed, up to a token that ends its row."""
        canvas, total = self._canvas, 0
        for i in step.done.nonzero().squeeze(1).tolist():
            row, first = int(step.rows[i]), int(step.first[i])
            free = canvas.free[row, first : first + step.tokens.shape[1]].tolist()
            tokens = step.tokens[i, : len(free)].tolist()
            cut = _cut(tokens, free, max(0, int(tail[row]) - first), self._settings.eos)
            total += sum(free[:cut])
        return total

    def _ends(self, tokens: Tensor, place: Tensor, free: Tensor, rows: Tensor, tail: Tensor) -> Tensor:
        """[R]: no gap is left after this window, or a token that ends the row stands in it."""
        after = torch.arange(self._canvas.free.shape[1], device=place.device) > place[:, -1:]
        ends = ~(self._canvas.free[rows] & after).any(1)
        for token in self._settings.eos:
            ends = ends | ((tokens == token) & free & (place >= tail[rows].unsqueeze(1))).any(1)
        return ends


@final
class _Prediction:
    """The predicted law of x_0, from a reader's logits or scores; its calls are counted. Raises ValueError for NaN."""

    def __init__(self, reader: Reader, corruption: Corruption, mask_token: int | None, scored: bool) -> None:
        self._reader, self._corruption, self._mask_token, self._scored = reader, corruption, mask_token, scored
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        logits = self._reader(x, 1 - self._corruption.keep(t))
        self.calls += self._reader.calls
        law = self._law(logits.double(), x, t)
        wrong = law.sum(-1).isnan()
        if bool(wrong.any()):
            row, position = wrong.nonzero()[0].tolist()
            raise ValueError(f"logits: not a number at row {row}, position {position} of the block; look at the weights")
        return law

    def _law(self, logits: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self._scored and absorber(self._corruption) is None:  # under absorption the output is a law but for its sum
            found = log_scores(self._corruption, x, logits, t, self._mask_token).exp()
            return law_of_scores(self._corruption, x, found, t)
        if self._mask_token is not None:
            logits = logits.index_fill(-1, x.new_tensor([self._mask_token]), -torch.inf)
        return logits.softmax(-1)


def canvas_of(
    rows: Sequence[Sequence[int | None]],
    vocab: int,
    mask_token: int | None,
    *,
    longest: int | None = None,
    device: torch.device | str = "cpu",
) -> Canvas:
    """The canvas of rows of token ids in which None is a gap; `longest` the context of the model.

    Raises ValueError for no rows, a row that is empty or beyond the context, ids outside the vocabulary, and the mask token.
    """
    if not rows:
        raise ValueError("rows=[]: empty; give at least one")
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"rows[{i}]=[]: empty; give tokens, None for each gap")
        if longest is not None and len(row) > longest:
            raise ValueError(f"rows[{i}]: {len(row)} positions exceed the context of {longest}; shorten the text or the gaps")
        given = [token for token in row if token is not None]
        unknown = [token for token in given if not 0 <= token < vocab]
        if unknown:
            raise ValueError(
                f"rows[{i}]: token {unknown[0]} is outside 0..{vocab - 1}; encode the text with this model's tokenizer"
            )
        if mask_token in given:
            raise ValueError(f"rows[{i}]: holds the mask token {mask_token}, which no text has; give None where there is a gap")
    width = max(map(len, rows))
    tokens = torch.tensor([[token or 0 for token in row] + [0] * (width - len(row)) for row in rows], device=device)
    free = torch.tensor([[token is None for token in row] + [False] * (width - len(row)) for row in rows], device=device)
    return Canvas(tokens, free, torch.tensor([len(row) for row in rows], device=device), mask_token)


@final
@dataclass(frozen=True, slots=True)
class Filled:
    """A row: its `tokens`, gaps filled, up to a generated token that ends it; what it cost; "eos" or "length"."""

    tokens: list[int]
    cost: Cost
    finish: str


def fill(
    reader: Reader,
    corruption: Corruption,
    order: Order[Any],
    grid: Tensor,
    canvas: Canvas,
    rng: Rng,
    settings: Settings = Settings(),
) -> list[Filled]:
    """`unmask` run to the end: one result a row."""
    x, calls, seconds = canvas.tokens.clone(), [0] * len(canvas.tokens), [0.0] * len(canvas.tokens)
    for event in unmask(reader, corruption, order, grid, canvas, rng, settings):
        step = event.payload
        for i, row in enumerate(step.rows.tolist()):
            first, end = int(step.first[i]), min(int(step.first[i]) + step.tokens.shape[1], x.shape[1])
            x[row, first:end] = step.tokens[i, : end - first]
            calls[row] += int(step.calls[i])
            seconds[row] = event.cost.seconds
    results = []
    for row, tail in enumerate(_tail(canvas).tolist()):
        length = int(canvas.length[row])
        tokens, free = x[row, :length].tolist(), canvas.free[row, :length].tolist()
        cut = _cut(tokens, free, tail, settings.eos)
        cost = Cost(calls=calls[row], tokens=sum(free[:cut]), seconds=seconds[row])
        ends = cut < length or (free[-1] and tokens[-1] in settings.eos)
        results.append(Filled(tokens[:cut], cost, "eos" if ends else "length"))
    return results


def _tail(canvas: Canvas) -> Tensor:
    """[B] the first position after which a row holds gaps alone."""
    place = torch.arange(canvas.free.shape[1], device=canvas.free.device)
    given = ~canvas.free & (place < canvas.length.unsqueeze(1))
    return torch.where(given, place + 1, 0).amax(1)


def _cut(tokens: list[int], free: list[bool], tail: int, eos: tuple[int, ...]) -> int:
    """How many tokens are kept: up to the first generated one that ends the row, that one included."""
    ends = (i + 1 for i in range(tail, len(tokens)) if free[i] and tokens[i] in eos)
    return next(ends, len(tokens))


def _agenda(free: Tensor, width: int) -> list[list[int]]:
    """For each row its blocks that have a gap, left to right."""
    return [sorted({i // width for i, gap in enumerate(row) if gap}) for row in free.tolist()]


def _index(values: list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)
