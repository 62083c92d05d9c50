"""Data that are arrays: rows x [*shape], some with a condition c, from tables of numbers; and how they become batches.

A batch holds `extra["x"]`, and `extra["c"]` where there is one; its `tokens` [B,1] are the rows' numbers, so that a budget in
tokens counts rows. This file knows no model and no objective.
"""

import csv
import gzip
import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, ClassVar, Literal, Protocol, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng, Rng
from fewstep.core.recipe import Config, suggestion

Part = Literal["train", "validation"]
PARTS: tuple[Part, ...] = ("train", "validation")


class Batches(Protocol):
    """Training batches as a function of their number."""

    def batch(self, step: int) -> Batch: ...


class Arrays(Protocol):
    """A data set of arrays. `shape`: of a row; `context`: the numbers of its condition, 0 where there is none."""

    shape: tuple[int, ...]
    context: int

    def train(self, batch: int, seed: int) -> Batches:
        """Batches of `batch` rows."""
        ...

    def validation(self, batch: int) -> Iterator[Batch]:
        """The held-out rows, each once, always the same; the last batch may be smaller."""
        ...


class ArraysConfig(Config):
    """The base of the configs of array data."""

    @abstractmethod
    def build(self) -> Arrays:
        """The data. Raises ValueError where there are none, or none to learn from."""


def rows_of(x: Tensor, c: Tensor | None, numbers: Tensor) -> Batch:
    """The batch of x [B,*shape] and c [B,K], which have these `numbers` [B] in their data set."""
    return Batch(numbers.unsqueeze(1), extra={"x": x} if c is None else {"x": x, "c": c})


@final
@dataclass(frozen=True, slots=True)
class Content:
    """Rows x [N,*shape] of any dtype and their conditions c [N,K], and what becomes of them whenever they are read.

    `flips`: half of the rows of a training batch are mirrored left to right. `dequantised`: uniform noise on [0, 1) is added,
    since whole numbers have no density.
    """

    x: Tensor
    c: Tensor | None = None
    flips: bool = False
    dequantised: bool = False

    def batch(self, numbers: Tensor, rng: Rng, training: bool) -> Batch:
        """The rows `numbers` [B] in float32; `rng` has a row for each."""
        x = self.x[numbers].float()
        if self.flips and training:
            mirrored = rng.split("flip").uniform() < 0.5
            x = torch.where(mirrored.view(-1, *(1,) * (x.dim() - 1)), x.flip(-1), x)
        if self.dequantised:
            x = x + rng.split("noise").uniform(*x.shape[1:]).float()
        return rows_of(x, None if self.c is None else self.c[numbers], numbers)


@final
class Table:
    """`content` in memory; equal rows share a part, `held_out` of them for validation.

    Raises ValueError where either part would be empty.
    """

    def __init__(self, content: Content, held_out: float) -> None:
        self.shape, self.context = tuple(content.x.shape[1:]), 0 if content.c is None else content.c.shape[1]
        self._content, count = content, len(content.x)
        places = torch.tensor([_place(row.numpy().tobytes()) for row in content.x], dtype=torch.float64)
        self._train, self._validation = ((places >= held_out).nonzero()[:, 0], (places < held_out).nonzero()[:, 0])
        if not len(self._train) or not len(self._validation):
            raise ValueError(
                f"data.held_out={held_out}: {len(self._validation)} of {count} rows; give more rows or another share"
            )

    def train(self, batch: int, seed: int) -> "Epochs":
        if len(self._train) < batch:
            raise ValueError(f"run.batch={batch}: more than the {len(self._train)} rows there are to learn from; lower it")
        return Epochs(self._content, self._train, batch, seed)

    def validation(self, batch: int) -> Iterator[Batch]:
        for numbers in self._validation.split(batch):
            yield self._content.batch(numbers, _each(numbers, 0, "validation"), training=False)

    def rows(self, part: Part) -> Batch:
        """All rows of a part as they are, neither mirrored nor noised."""
        numbers, content = self._train if part == "train" else self._validation, self._content
        return rows_of(content.x[numbers].float(), None if content.c is None else content.c[numbers], numbers)


@final
class Epochs:
    """Batches of the rows `numbers` of `content`, shuffled anew each epoch; what fills no batch waits for the next."""

    def __init__(self, content: Content, numbers: Tensor, batch: int, seed: int) -> None:
        self._content, self._numbers, self._batch, self._seed = content, numbers, batch, seed
        self._rng = CounterRng.seeded([seed]).split("rows")
        self._epoch, self._order = -1, numbers

    def batch(self, step: int) -> Batch:
        epoch, place = divmod(step, len(self._numbers) // self._batch)
        if epoch != self._epoch:
            order = self._rng.at(epoch).uniform(len(self._numbers))[0].argsort(stable=True)
            self._epoch, self._order = epoch, self._numbers[order]
        numbers = self._order[place * self._batch : (place + 1) * self._batch]
        return self._content.batch(numbers, _each(step * self._batch + torch.arange(self._batch), self._seed, "train"), True)


@final
class CSVConfig(ArraysConfig):
    """A table of numbers, `path` (.csv or .csv.gz): each line a row, a first line without any number the names of the columns.

    `given`: the columns that are conditions; the others are the data, in their order and unit. A column has the name of the
    header, or its number from 1. Raises ValueError naming row and column for a cell that is no finite number, for a ragged row,
    an unknown name, and a column that is constant, which has no density.
    """

    kind: ClassVar[str] = "csv"

    path: Path = Field(default=Path("table.csv"), description="the file")
    given: tuple[str, ...] = ()
    held_out: float = Field(default=0.1, gt=0, lt=1)

    def build(self) -> Table:
        names, rows = read_table(self.path)
        for name in self.given:
            if name not in names:
                raise ValueError(f"data.given={name!r}: no such column in {str(self.path)!r}; {suggestion(name, names)}")
        kept = [i for i, name in enumerate(names) if name not in self.given]
        constant = next((i for i in kept if bool((rows[:, i] == rows[0, i]).all())), None)
        if not kept or constant is not None:
            told = "every column is given" if constant is None else f"column {names[constant]!r} is constant and has no density"
            raise ValueError(f"data.path={str(self.path)!r}: {told}; change `given` or drop it from the file")
        given = rows[:, [names.index(name) for name in self.given]] if self.given else None
        return Table(Content(rows[:, kept], given), self.held_out)


@final
class DigitsConfig(ArraysConfig):
    """The 1797 handwritten digits of 8x8 pixels and 17 grey levels that come with scikit-learn, which is not imported.

    x [B,1,8,8] holds the levels 0 .. 16; with `classes` c [B,10] names the digit; `dequantised` adds uniform noise on [0, 1) to
    the levels. Source: Alpaydin and Kaynak 1998.
    """

    kind: ClassVar[str] = "digits"

    classes: bool = False
    dequantised: bool = False
    held_out: float = Field(default=0.1, gt=0, lt=1)

    def build(self) -> Table:
        package = find_spec("sklearn")
        if package is None or not package.submodule_search_locations:
            raise ValueError(
                "data='digits': the images come with scikit-learn, which is not installed; pip install 'fewstep[digits]'"
            )
        _, rows = read_table(Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz")
        labels = one_hot(rows[:, -1], 10) if self.classes else None
        return Table(Content(rows[:, :-1].reshape(-1, 1, 8, 8), labels, dequantised=self.dequantised), self.held_out)


def one_hot(numbers: Tensor, classes: int) -> Tensor:
    """c [N,classes] float32 of class numbers [N]."""
    return torch.nn.functional.one_hot(numbers.long(), classes).float()


def read_table(path: Path) -> tuple[list[str], Tensor]:
    """The names of the columns and the rows [N,K] float32 of a CSV file. Raises ValueError as `CSVConfig` does."""
    if not path.is_file():
        raise ValueError(f"data.path={str(path)!r}: no such file; give a .csv or .csv.gz file")
    names, rows = list[str](), list[list[float]]()
    try:
        with _text(path) as file:
            for number, cells in enumerate(csv.reader(file), 1):
                if not cells:
                    continue
                if not names and not any(map(_is_number, cells)):
                    names = [cell.strip() for cell in cells]
                    continue
                names = names or [str(i) for i in range(1, len(cells) + 1)]
                rows.append(_numbers(cells, names, f"data.path={str(path)!r}: row {number}"))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data.path={str(path)!r}: not a readable CSV file ({error}); write it again") from None
    if not rows:
        raise ValueError(f"data.path={str(path)!r}: no row of numbers; give a table with some")
    return names, torch.tensor(rows)


def _text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _numbers(cells: Sequence[str], names: Sequence[str], place: str) -> list[float]:
    if len(cells) != len(names):
        raise ValueError(f"{place} has {len(cells)} cells, expected {len(names)}; correct that row")
    for cell, name in zip(cells, names, strict=True):
        if not _is_number(cell) or not math.isfinite(float(cell)):
            raise ValueError(
                f"{place}, column {name!r} holds {cell!r}, which is no finite number; correct it or drop that column"
            )
    return [float(cell) for cell in cells]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _each(numbers: Tensor, seed: int, part: str) -> CounterRng:
    """A row of randomness for each number."""
    return CounterRng.seeded([seed]).split(part).fork(torch.zeros_like(numbers)).at(numbers)


def _place(row: bytes) -> float:
    """Where in [0, 1) a row's hash falls."""
    return int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "big") / 2.0**64
