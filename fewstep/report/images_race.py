"""The race of generative models of points and images: likelihood, distance from data, calls and seconds, on four grounds.

This file knows who races by name, shares the pieces of work among processes and writes down what they find. What a piece is,
`images_cells` knows; who races on what, `images_methods`.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from pydantic import Field, field_validator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from fewstep.core.recipe import Config, lookup
from fewstep.report.costs import cpu_name
from fewstep.report.images_cells import Setup, floor, learn, race
from fewstep.report.images_methods import GROUNDS, METHODS, TRAININGS
from fewstep.report.images_page import write_page
from fewstep.report.kept import RECORD, kept
from fewstep.training.data.shards import write_atomically

PAGE = "race.html"
_TRAINING = 0.7  # of the time may go to training
_FREE = ("methods", "grounds", "minutes", "workers", "rungs")  # parts of a setting that leave a finished piece what it is

QUICK: Mapping[str, Any] = MappingProxyType({"share": 0.25, "count": 4096, "seeds": 2, "rows": 32, "rungs": 3, "minutes": 15.0})

Name = tuple[str, ...]  # of a piece: ground and training, or ground, method and steps
Record = dict[str, Any]


@final
class ImageRaceConfig(Config):
    """What a race of images holds equal for everybody.

    `methods` and `grounds`: names of the tables; (): all. Networks get a `share` of their full training, and each method as many
    samples as `seeds`, of `count` points, or as many images as are held out, at the first `rungs` of its numbers of steps.
    Likelihoods by the ODE are taken of `rows` images, or sixteen times as many points. `workers` processes of one thread share
    the work for `minutes` at most; what is not done by then is left out, and done when the race goes on.
    """

    methods: tuple[str, ...] = ()
    grounds: tuple[str, ...] = ()
    share: float = Field(default=1.0, gt=0)
    count: int = Field(default=10000, ge=64)
    seeds: int = Field(default=3, ge=1)
    rungs: int = Field(default=4, ge=1)
    rows: int = Field(default=128, ge=2)
    minutes: float = Field(default=60.0, gt=0)
    workers: int = Field(default=2, ge=1)
    seed: int = 0

    @field_validator("methods", "grounds")
    @classmethod
    def _are_known(cls, names: tuple[str, ...], info: Any) -> tuple[str, ...]:
        for name in names:
            lookup(METHODS if info.field_name == "methods" else GROUNDS, name, info.field_name)
        return tuple(dict.fromkeys(names))

    def setup(self, folder: Path) -> Setup:
        """The same for the pieces of work."""
        return Setup(folder, self.share, self.count, self.seeds, self.rows, self.seed)

    @property
    def places(self) -> list[str]:
        """The grounds that are raced on."""
        return [name for name in GROUNDS if name in (self.grounds or GROUNDS)]

    @property
    def entrants(self) -> list[str]:
        """The methods that race."""
        return [name for name in METHODS if name in (self.methods or METHODS)]


@final
@dataclass(slots=True)
class ImageRace:
    """A race, finished or under way: `setting` in plain values; records of floors, trainings and cells by name; `left_out`: why a
    piece has none."""

    setting: Mapping[str, Any]
    floors: dict[Name, Record] = field(default_factory=dict)
    trainings: dict[Name, Record] = field(default_factory=dict)
    cells: dict[Name, Record] = field(default_factory=dict)
    left_out: dict[Name, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Every number in JSON values, for `race.json`, the table and the page."""
        left = [{"piece": "/".join(name), "reason": reason} for name, reason in self.left_out.items()]
        books = {"floors": self.floors, "trainings": self.trainings, "cells": self.cells}
        parts = {part: [found[name] for name in sorted(found, key=_place)] for part, found in books.items()}
        return {"setting": dict(self.setting), **parts, "left_out": left}

    def write_down(self, books: dict[Name, Record], name: Name, found: Record | str) -> None:
        """What a piece found, in its books, or why it found nothing."""
        self.left_out.pop(name, None)
        if isinstance(found, str):
            self.left_out[name] = found
        else:
            books[name] = found

    def table(self) -> Table:
        """What each method comes to on each ground, for a terminal."""
        return _table(self)


def race_images(config: ImageRaceConfig, directory: Path | str, *, console: Console | None = None) -> ImageRace:
    """Race the methods of `config`; `race.json`, the page, networks and pictures are written into `directory`.

    A piece that is done stays, so that a killed race goes on where it was and a further method joins the others. Raises
    ValueError for a directory that holds a race under other circumstances (share, seed, counts, machine, PyTorch).
    """
    console, folder, begun = console or Console(), Path(directory), time.time()
    race_ = _begun(config, folder)
    stages = _stages(config, race_)
    with _bar(console, sum(len(pieces) for _, pieces in stages)) as tell, _hands(config.workers) as each:
        for books, pieces in stages:
            for piece, found in each(pieces, config.setup(folder), begun + 60 * config.minutes):
                race_.write_down(books, piece.name, found)
                write_atomically(folder / RECORD, json.dumps(race_.as_dict(), indent=1).encode())
                tell("/".join(piece.name))
                console.print(f"{'/'.join(piece.name)}: {found if isinstance(found, str) else _brief(found)}", highlight=False)
    write_atomically(folder / RECORD, json.dumps(race_.as_dict(), indent=1).encode())
    write_page(race_.as_dict(), folder / PAGE)
    return race_


def race_images_here(config: ImageRaceConfig, directory: Path, console: Console | None = None) -> ImageRace:
    """`race_images` as a command: the result printed."""
    console = console or Console()
    found = race_images(config, directory, console=console)
    if found.cells:
        console.print(found.table())
    console.print(f"{(directory / PAGE).resolve()}", soft_wrap=True)
    return found


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of work by name; `extra`: what the work is told besides."""

    work: Callable[..., Record]
    name: Name
    extra: tuple[Any, ...] = ()
    steps: int | None = None

    def done(self, setup: Setup, until: float) -> Record | str:
        """What it finds, or why it finds nothing. It begins nothing after `until`, seconds of the clock."""
        if time.time() > until:
            return "no time was left; race again to go on"
        given = self.name if self.steps is None else (*self.name[:-1], self.steps)
        try:
            return self.work(setup, *given, *self.extra)
        except ValueError as error:
            return str(error)


Each = Callable[[Sequence[Piece], Setup, float], Iterator[tuple[Piece, Record | str]]]


@contextmanager
def _hands(workers: int) -> Iterator[Each]:
    """Whoever does the work: this process, or `workers` others of one thread each."""
    if workers == 1:
        yield lambda pieces, setup, until: ((piece, piece.done(setup, until)) for piece in pieces)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:

        def each(pieces: Sequence[Piece], setup: Setup, until: float) -> Iterator[tuple[Piece, Record | str]]:
            begun = {pool.submit(piece.done, setup, until): piece for piece in pieces}
            for future in as_completed(begun):
                yield begun[future], future.result()

        try:
            yield each
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_thread() -> None:
    torch.set_num_threads(1)


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over the pieces, with the time left; silent where the console is no terminal."""
    columns = (TextColumn("{task.description:>28}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, advance=1, description=name)


def _stages(config: ImageRaceConfig, race_: ImageRace) -> list[tuple[dict[Name, Record], list[Piece]]]:
    """What is still to be done, in stages that wait for one another, and where each is written down.

    Floors, networks, networks that have teachers, cells; the longest training first.
    """
    wanted = {METHODS[name].training for name in config.entrants}
    wanted |= {TRAININGS[name].teacher for name in wanted}
    names = [(place, name) for place in config.places for name in TRAININGS if name in wanted]
    left = sorted((name for name in names if name not in race_.trainings), key=lambda name: -_weight(*name))
    seconds = _TRAINING * 60 * config.minutes * config.workers / (sum(_weight(*name) for name in left) or 1.0)
    learning = [Piece(learn, name, (max(1.0, seconds * _weight(*name)),)) for name in left]
    cells = [Piece(race, (place, method, str(steps)), (), steps) for steps, place, method in _cells(config)]
    return [
        (race_.floors, [Piece(floor, (place,)) for place in config.places if (place,) not in race_.floors]),
        (race_.trainings, [piece for piece in learning if not TRAININGS[piece.name[1]].teacher]),
        (race_.trainings, [piece for piece in learning if TRAININGS[piece.name[1]].teacher]),
        (race_.cells, [piece for piece in cells if piece.name not in race_.cells]),
    ]


def _cells(config: ImageRaceConfig) -> list[tuple[int, str, str]]:
    """Steps, ground and method of each cell, few steps first, so that a race out of time has something of everybody."""
    found = [
        (rung, METHODS[method].steps[rung], place, method)
        for place in config.places
        for method in config.entrants
        for rung in range(min(config.rungs, len(METHODS[method].steps)))
    ]
    return [(steps, place, method) for _, steps, place, method in sorted(found, key=lambda cell: cell[0])]


def _weight(place: str, training: str) -> float:
    return TRAININGS[training].pace(GROUNDS[place]).weight


def _begun(config: ImageRaceConfig, folder: Path) -> ImageRace:
    """An empty race, or what the folder's record holds of one under the same circumstances."""
    own = {**config.model_dump(mode="json"), "cpu": cpu_name(), "torch": torch.__version__}

    def read(record: Mapping[str, Any]) -> ImageRace:
        names = {"floors": ("ground",), "trainings": ("ground", "training"), "cells": ("ground", "method", "steps")}
        return ImageRace(own, **{part: {_name(found, keys): found for found in record[part]} for part, keys in names.items()})

    return kept(folder, own, _FREE, read) or ImageRace(own)


def _name(found: Mapping[str, Any], keys: Sequence[str]) -> Name:
    return tuple(str(found[key]) for key in keys)


def _place(name: Name) -> tuple[int, ...]:
    """Where a piece stands in the order of the tables."""
    order = [list(GROUNDS).index(name[0])]
    if len(name) > 1:
        order.append(list(TRAININGS if len(name) == 2 else METHODS).index(name[1]))
    return (*order, *map(int, name[2:]))


def _brief(found: Mapping[str, Any]) -> str:
    if "nll" in found:
        nll = found["nll"]
        likely = f", {nll['value']:.3f} {nll['unit']}" if nll else ""
        return f"{found['steps']} steps in {found['seconds']:.0f} s{likely}"
    ranked = GROUNDS[found["ground"]].ranked
    score = found["scores"][ranked]
    told = f"{ranked} {score['median']:.4g}"
    return told if "calls" not in found else f"{found['calls']:g} calls, {1e3 * found['seconds']['median']:.3g} ms, {told}"


def _score(cell: Mapping[str, Any]) -> str:
    score = cell["scores"][GROUNDS[cell["ground"]].ranked]
    return f"{score['median']:.4f} ({cell['calls']:g})"


def _table(race_: ImageRace) -> Table:
    """The score of each method at its most steps, with its calls, by ground."""
    table = Table(title="distance from data (calls); points: energy, images: Frechet", box=SIMPLE_HEAD, show_edge=False)
    places = [name for name in GROUNDS if any(cell[0] == name for cell in race_.cells)]
    for column in ("", *places):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for method in dict.fromkeys(name[1] for name in sorted(race_.cells, key=_place)):
        row = []
        for place in places:
            found = [cell for (ground, entrant, _), cell in race_.cells.items() if (ground, entrant) == (place, method)]
            last = max(found, key=lambda cell: float(cell["calls"]), default=None)
            row.append(_score(last) if last else "-")
        table.add_row(METHODS[method].title, *row)
    return table
