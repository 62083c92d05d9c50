"""Filling gaps as users ask for it: a model and texts with gaps in, text out. Everything else is the loop's.

This file knows how text becomes tokens, and what a model's recipe says of how it learnt to fill gaps. It knows no file format,
and no objective by name but the one that puts out scores.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch
from pydantic import Field

from fewstep.core.corruption import Corruption
from fewstep.core.event import Cost, Event
from fewstep.core.mixer import Blocks, Full
from fewstep.core.random import CounterRng
from fewstep.core.recipe import Config, choice, resolve
from fewstep.decode.generate import row_seed
from fewstep.decode.readers import Compared, reader_of
from fewstep.decode.unmask import Canvas, Reader, Settings, Step, canvas_of, unmask
from fewstep.diffusion.corruptions import CORRUPTIONS
from fewstep.diffusion.orders import ORDERS
from fewstep.diffusion.orders.ranked import ConfidenceConfig
from fewstep.models.model import Model

Row = Sequence[int | None]  # token ids, None at each gap

_GAP = re.compile(r"<gap(?::(\d+))?>")


@final
class FillConfig(Config):
    """How gaps are filled.

    `order`: which positions are revealed or redone next, at which temperature. `block`: positions filled together before the next
    are begun (None: the blocks that the model attends in, else all at once). `steps` for each block (None: as many as positions).
    `attends`: what tokens see: "trained" as the recipe says, "all", or blocks of that many. `cached`: a block model reads what is
    final once, which changes no token; "prefix" and "dual", for models that see everything, are not exact: with `compare` they
    are held against what is. `guidance`: how much more the given tokens count. `ignore_eos` goes on past end-of-text.
    """

    order: choice(lambda: ORDERS, "order") = ConfidenceConfig()  # type: ignore[valid-type]
    block: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    attends: Literal["trained", "all"] | int = "trained"
    cached: bool | Literal["prefix", "dual"] = True
    compare: bool = False
    guidance: float = Field(default=0.0, ge=0)
    ignore_eos: bool = False
    seed: int | tuple[int, ...] = 0


@final
@dataclass(frozen=True, slots=True)
class Manner:
    """How a model fills gaps: what its tokens see, what noise is to it, and whether it puts out log-scores."""

    mask: Full | Blocks
    corruption: Corruption
    scored: bool


@final
@dataclass(frozen=True, slots=True)
class Patch:
    """The text of `row` that became certain, from left to right; `filled`: it stands in a gap."""

    row: int
    text: str
    filled: bool


@final
@dataclass(frozen=True, slots=True)
class Result:
    """A row: all its `tokens` up to one that ends it, which of them are `filled`, the `text`, the cost, and "eos" or "length"."""

    tokens: list[int]
    filled: list[bool]
    text: str
    cost: Cost
    finish: str


def manner_of(model: Model, attends: Literal["trained", "all"] | int = "trained") -> Manner:
    """As the objective in the model's recipe says. Raises ValueError for a model that was not trained to fill gaps."""
    network, told = model.network, cast(Mapping[str, Any], model.recipe.get("objective", {}))
    if network.mask_token is None and "corruption" not in told:
        how = f"objective.kind={told['kind']!r}" if "kind" in told else "no mask token"
        raise ValueError(f"model: {how}, which fills no gaps; choose one trained as code-mdlm, code-sedd or code-bd4 are")
    kind = told.get("corruption") or {"kind": "absorbing", "noise": told.get("noise", "log-linear")}
    config = cast(Any, resolve(kind, CORRUPTIONS, "recipe.objective.corruption"))
    size = told.get("size") if attends == "trained" else attends
    if isinstance(size, int) and size < 1:
        raise ValueError(f"attends={size}: below 1; give the tokens of a block, 'all' or 'trained'")
    mask = Blocks(size) if isinstance(size, int) else Full()
    corruption = config.build(network.vocab, network.mask_token, model.device)
    return Manner(mask, corruption, told.get("kind") == "score_entropy")


def gapped(model: Model, text: str, length: int) -> list[int | None]:
    """The tokens of `text`, in which <gap:N> is a gap of N tokens and <gap> one of `length`; without either, one is at the end.

    Raises ValueError for a model without a tokenizer, or a gap of no token.
    """
    if model.tokenizer is None:
        raise ValueError("text: the model has no tokenizer to read it with; load it with its tokenizer.json")
    parts = _GAP.split(text)
    if len(parts) == 1:
        parts += [None, ""]
    row: list[int | None] = []
    for i, part in enumerate(parts):
        if i % 2 == 0:
            row += model.tokenizer.encode(part or "", add_special_tokens=i == 0)
            continue
        count = length if part is None else int(part)
        if count < 1:
            raise ValueError(f"gap={count}: below 1; give the tokens of each gap, e.g. <gap:8>, or leave it out")
        row += [None] * count
    return row


@final
class Filling:
    """Rows of tokens with gaps under way: iterate for text as it becomes certain, block by block, then ask for the results.

    Raises ValueError for a row that is empty, beyond the context or holds the mask token, blocks that do not divide those that
    the model attends in, a mixer that cannot look ahead, and logits that are not numbers.
    """

    def __init__(self, model: Model, rows: Sequence[Row], config: FillConfig = FillConfig()) -> None:
        network, manner = model.network, manner_of(model, config.attends)
        canvas = canvas_of(rows, network.vocab, network.mask_token, longest=network.max_positions, device=model.device)
        block = config.block or (manner.mask.size if isinstance(manner.mask, Blocks) else None)
        seeds = [config.seed] * len(rows) if isinstance(config.seed, int) else config.seed
        if len(seeds) != len(rows):
            raise ValueError(f"seed: {len(seeds)} values for {len(rows)} rows; give one, or one per row")
        self.cost = Cost()
        self._model, self._eos = model, () if config.ignore_eos else model.eos_ids
        self._rows = [_Row.of(row) for row in rows]
        grid = torch.linspace(1, 0, 1 + (config.steps or block or _widest(canvas)), dtype=torch.float64, device=model.device)
        cached = isinstance(manner.mask, Blocks) if config.cached is True else config.cached
        reader: Reader = reader_of(network, canvas, manner.mask, cached=cached, guidance=config.guidance)
        self._compared: Compared | None = None
        if config.compare and cached and not isinstance(manner.mask, Blocks) and network.mask_token is not None:
            exact = reader_of(network, canvas, manner.mask, guidance=config.guidance)
            reader = self._compared = Compared(reader, exact, network.mask_token)
        self._events = unmask(
            reader,
            manner.corruption,
            cast(Any, config.order).build(),
            grid,
            canvas,
            CounterRng.seeded([row_seed(seed, 0) for seed in seeds], model.device),
            Settings(block=block, eos=self._eos, scores=manner.scored),
        )

    def __iter__(self) -> Iterator[Patch]:
        streams = [None if self._model.tokenizer is None else self._model.tokenizer.stream() for _ in self._rows]
        told = [0] * len(self._rows)
        for _ in self.steps():
            for i, (row, stream) in enumerate(zip(self._rows, streams, strict=True)):
                end = row.certain(self._eos)
                for place in range(told[i], end):
                    text = stream.push(row.tokens[place]) if stream else ""
                    text += stream.flush() if stream and place + 1 == row.end(self._eos) else ""
                    yield Patch(i, text, row.free[place])
                told[i] = max(told[i], end)

    @property
    def deviation(self) -> float | None:
        """How far predictions by an approximate cache are from exact ones, in total variation; None if they are not compared."""
        return None if self._compared is None else self._compared.deviation

    def steps(self) -> Iterator[Event[Step]]:
        """The loop's own events instead of text, for measurements."""
        for event in self._events:
            step, self.cost = event.payload, event.cost
            columns = (step.rows, step.first, step.tokens, step.done, step.calls)
            for row, first, tokens, done, calls in zip(*(column.tolist() for column in columns), strict=True):
                self._rows[row].take(first, tokens, done, calls, event.cost.seconds)
            yield event

    def results(self) -> list[Result]:
        """One a row, as far as they have come."""
        return [row.result(self._model, self._eos) for row in self._rows]


def fill(model: Model, texts: Sequence[str], config: FillConfig = FillConfig(), length: int = 32) -> list[Result]:
    """Texts with gaps as `gapped` reads them, filled: one result a text. Raises ValueError as `gapped` and `Filling` do."""
    filling = Filling(model, [gapped(model, text, length) for text in texts], config)
    for _ in filling.steps():
        pass
    return filling.results()


@final
@dataclass(slots=True)
class _Row:
    """What a row holds so far: `pending` gaps are not final, and `tail` is where nothing but gaps follows."""

    tokens: list[int]
    free: list[bool]
    pending: list[bool]
    tail: int
    calls: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, row: Row) -> "_Row":
        free = [token is None for token in row]
        tail = max((i + 1 for i, gap in enumerate(free) if not gap), default=0)
        return cls([token or 0 for token in row], free, list(free), tail)

    def take(self, first: int, tokens: list[int], done: bool, calls: int, seconds: float) -> None:
        end = min(first + len(tokens), len(self.tokens))
        self.tokens[first:end] = tokens[: end - first]
        if done:
            self.pending[first:end] = [False] * (end - first)
        self.calls, self.seconds = self.calls + calls, seconds

    def end(self, eos: tuple[int, ...]) -> int:
        """How many tokens are kept: up to the first generated one that ends the row, that one included."""
        ends = (i + 1 for i in range(self.tail, len(self.tokens)) if not self.pending[i] and self.tokens[i] in eos)
        return next(ends, len(self.tokens))

    def certain(self, eos: tuple[int, ...]) -> int:
        """How many tokens from the left are final."""
        open_ = next((i for i, pending in enumerate(self.pending) if pending), len(self.pending))
        return min(open_, self.end(eos))

    def result(self, model: Model, eos: tuple[int, ...]) -> Result:
        end = self.end(eos)
        tokens, filled = self.tokens[:end], self.free[:end]
        text = "" if model.tokenizer is None else model.tokenizer.decode(tokens)
        ended = bool(tokens) and filled[-1] and tokens[-1] in eos and end > self.tail
        return Result(tokens, filled, text, Cost(calls=self.calls, tokens=sum(filled), seconds=self.seconds), _FINISH[ended])


_FINISH = ("length", "eos")


def _widest(canvas: Canvas) -> int:
    """The gaps of the row that has most, at least one."""
    return max(1, int(canvas.free.sum(1).max()))
