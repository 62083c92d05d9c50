"""The race of language models: bits per byte, quality of what they write, calls and seconds, after equal training.

This file knows who races by name, and writes down what the pieces of work find. What a piece is, `text_cells` knows; who races,
`text_methods`.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fewstep.report.costs import cpu_name
from fewstep.report.kept import RECORD, kept
from fewstep.report.text_cells import Setup, floor, learn, race
from fewstep.report.text_methods import METHODS, TRAININGS, TextRaceConfig
from fewstep.report.text_page import write_page
from fewstep.training.data.shards import write_atomically
from fewstep.training.log import duration

PAGE = "race.html"
QUICK: Mapping[str, Any] = MappingProxyType({"tokens": 400_000, "windows": 24, "draws": 4, "repeats": 4, "count": 8, "rungs": 2})
_FREE = ("methods", "rungs")  # parts of a setting that leave a finished piece what it is

Record = dict[str, Any]
Name = tuple[str, ...]  # of a piece: "floor"; training; or method and rung


@final
@dataclass(slots=True)
class TextRace:
    """A race, finished or under way: `setting` in plain values; records by name; `left_out`: why a piece has none."""

    setting: Mapping[str, Any]
    floors: dict[Name, Record] = field(default_factory=dict)
    trainings: dict[Name, Record] = field(default_factory=dict)
    cells: dict[Name, Record] = field(default_factory=dict)
    left_out: dict[Name, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Every number in JSON values, for `race.json`, the table and the page."""
        left = [{"piece": "/".join(name), "reason": reason} for name, reason in self.left_out.items()]
        trainings = [self.trainings[name,] for name in TRAININGS if (name,) in self.trainings]
        cells = sorted(self.cells.values(), key=_place)
        return {
            "setting": dict(self.setting),
            "floor": next(iter(self.floors.values()), None),
            "trainings": trainings,
            "cells": cells,
            "left_out": left,
        }

    def table(self) -> Table:
        """What each method comes to at each rung, for a terminal."""
        return _table(self.as_dict())


@final
@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of work: its books, its name, what it does, and the time it takes in tokens of autoregressive training."""

    books: dict[Name, Record]
    name: Name
    work: Callable[[], Record]
    weight: float


def race_text(config: TextRaceConfig, directory: Path | str, *, console: Console | None = None) -> TextRace:
    """Race the methods of `config`; `race.json`, the page and the networks are written into `directory`.

    A piece that is done stays, so that a killed race goes on where it was and a further method joins the others. Everything runs
    one after another in this process, on as many threads as PyTorch takes. Raises ValueError for a directory that holds a race
    under other circumstances (training, text, judge, seed, machine, PyTorch), or a judge that cannot be loaded.
    """
    console, folder = console or Console(), Path(directory)
    found = _begun(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    setup = Setup(config, folder, console)
    _ = setup.judge  # better refused now than after hours of training
    pieces = [piece for piece in _pieces(config, setup, found) if piece.name not in piece.books]
    with _clock(console, sum(piece.weight for piece in pieces)) as tell:
        for piece in pieces:
            found.left_out.pop(piece.name, None)
            try:
                piece.books[piece.name] = piece.work()
                told = _brief(piece.books[piece.name])
            except ValueError as error:  # a training that diverged, and what needs its network
                found.left_out[piece.name] = told = str(error)
            write_atomically(folder / RECORD, json.dumps(found.as_dict(), indent=1).encode())
            tell(piece.weight, f"{'/'.join(piece.name)}: {told}")
    write_page(found.as_dict(), folder / PAGE)
    return found


def race_text_here(config: TextRaceConfig, directory: Path, console: Console | None = None) -> TextRace:
    """`race_text` as a command: the result printed."""
    console = console or Console()
    found = race_text(config, directory, console=console)
    console.print(found.table())
    console.print(f"{(directory / PAGE).resolve()}", soft_wrap=True)
    return found


def _pieces(config: TextRaceConfig, setup: Setup, found: TextRace) -> list[_Piece]:
    """Everything a race consists of, in an order in which it can be done: networks, held-out text, cells."""

    def training(name: str) -> _Piece:
        weight = TRAININGS[name].weight if config.seconds is None else 1.0
        return _Piece(found.trainings, (name,), lambda: learn(setup, name), weight * config.tokens)

    def cell(name: str, rung: float) -> _Piece:
        share = config.count * (config.length - config.prompt) * 20.0  # a written token takes about as long as 20 to learn from
        return _Piece(found.cells, (name, f"{rung:g}"), lambda: race(setup, name, rung), share)

    rungs = [(rung, name) for name in config.entrants for rung in enumerate(METHODS[name].rungs[: config.rungs])]
    return [
        *(training(name) for name in config.trained),
        _Piece(found.floors, ("held-out text",), lambda: floor(setup, config.trained[0]), 0.0),
        *(cell(name, rung) for (_, rung), name in sorted(rungs, key=lambda pair: pair[0][0])),  # first rungs of all first
    ]


@contextmanager
def _clock(console: Console, total: float) -> Iterator[Callable[[float, str], None]]:
    """Prints a line after each piece, with the time that is left; trainings have a bar of their own."""
    begun, done = time.perf_counter(), 0.0

    def tell(weight: float, line: str) -> None:
        nonlocal done
        done += weight
        left = (time.perf_counter() - begun) * (total - done) / done if done else 0.0
        console.print(f"{line} ({duration(left)} left)", highlight=False, markup=False, soft_wrap=True)

    yield tell


def _begun(config: TextRaceConfig, folder: Path) -> TextRace:
    """An empty race, or what the folder's record holds of one under the same circumstances."""
    own = {
        **config.model_dump(mode="json"),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
    }

    def read(record: Mapping[str, Any]) -> TextRace:
        return TextRace(
            own,
            {} if record["floor"] is None else {("held-out text",): record["floor"]},
            {(each["training"],): each for each in record["trainings"]},
            {(each["method"], f"{each['rung']:g}"): each for each in record["cells"]},
        )

    return kept(folder, own, _FREE, read) or TextRace(own)


def _place(cell: Record) -> tuple[int, int]:
    """Where a cell stands in the tables."""
    return list(METHODS).index(cell["method"]), METHODS[cell["method"]].rungs.index(cell["rung"])


def _brief(found: Mapping[str, Any]) -> str:
    if "bits" in found:
        told = found["bits"]
        return f"{found['steps']} steps in {found['seconds']:.0f} s, {told['value']:.3f} +- {told['error']:.3f} bits per byte"
    quality = f"judge {found['judge']['value']:.3f} bits per byte, entropy {found['entropy']:.2f} bits"
    return quality if "calls" not in found else f"{found['tokens_per_call']:.2f} tokens per call, {quality}"


def _table(record: Mapping[str, Any]) -> Table:
    bound = {row["training"]: row["bits"] for row in record["trainings"]}
    caption = "bits and judge: per byte; what repeats itself has a low entropy and few distinct 2-grams, and the judge likes it"
    table = Table(title="language models after equal training", caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in ("bits", "at", "tok/call", "s/text", "judge", "entropy", "distinct"):
        table.add_column(column, justify="right", no_wrap=True)
    if record["floor"] is not None:
        table.add_row("held-out text", "", "", "", "", *_quality(record["floor"]))
    for cell in record["cells"]:
        method = METHODS[cell["method"]]
        known = bound.get(method.training)
        own = "-" if known is None else f"{known['value']:.3f}" if known["exact"] else f"<{known['value']:.3f}"
        spent = f"{cell['rung']:g}", f"{cell['tokens_per_call']:.2f}", f"{cell['seconds']:.2f}"
        table.add_row(method.title, own, *spent, *_quality(cell))
    return table


def _quality(found: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{found['judge']['value']:.2f}", f"{found['entropy']:.2f}", f"{found['distinct']['2']:.2f}"
