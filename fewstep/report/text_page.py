"""The page of a race of language models: one HTML file with charts, moving text, tables and raw numbers, nothing fetched.

This file knows the record that `TextRace.as_dict` gives.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fewstep.report.lines import Line, lines
from fewstep.report.svg import Mark, bars
from fewstep.report.text_methods import METHODS, TRAININGS

Record = Mapping[str, Any]

_CYCLE = 14.0  # seconds in which the slowest method writes its text, and all show it
_SHARE = 0.8  # of them for writing
_MARKS = tuple(times * 10.0**power for power in range(-4, 10) for times in (1, 2, 5))


def write_page(race: Record, path: Path) -> Path:
    """Write the page of `race` at `path`; its absolute path."""
    path.write_text(page(race), encoding="utf-8")
    return path.resolve()


def page(race: Record) -> str:
    """The page's HTML; every text in it is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    cells = [{**cell, "title": METHODS[cell["method"]].title, "by": METHODS[cell["method"]].by} for cell in race["cells"]]
    shown = list(_shown(cells))
    most = max((cell["frames"]["calls"] for cell in shown), default=1)
    moving = [{"title": _at(cell), "calls": cell["frames"]["calls"], **_moving(cell["frames"], most)} for cell in shown]
    tokens = [token for each in moving for token in each["tokens"]]
    return environment.get_template("text.html.j2").render(
        race=_without_frames(race),
        cells=cells,
        trainings=[{**row, "title": TRAININGS[row["training"]].title} for row in race["trainings"]],
        charts=list(_charts(race, cells)) if cells else [],
        bound=_bits(race["trainings"]) if race["trainings"] else None,
        curves=list(_curves(race["trainings"])),
        moving=moving,
        moments=sorted({token["moment"] for token in tokens}),
        spans=sorted({past["span"] for token in tokens for past in token["before"]}),
        cycle=_CYCLE,
        facts=list(_facts(race, cells)),
    )


def _bits(trainings: Sequence[Record]) -> str:
    """The bits of every network; a whisker has both the estimate's error and that of the mean over rows."""
    marks = []
    for row in sorted(trainings, key=lambda row: float(row["bits"]["value"])):
        found = row["bits"]
        wide = (found["error"] ** 2 + found["spread"] ** 2) ** 0.5
        note = f"{found['value']:.3f}" + (" exact" if found["exact"] else f" +- {found['error']:.3f}")
        training = TRAININGS[row["training"]]
        value = found["value"]
        marks.append(Mark(training.title, value, max(0.0, value - wide), value + wide, training.family, note=note))
    told = "; ".join(f"{mark.name}: {mark.note}" for mark in marks)
    return bars("Bits per byte of held-out text", told, marks, "bits per byte, held-out text: exact, or an upper bound")


def _curves(trainings: Sequence[Record]) -> Iterator[dict[str, str]]:
    """What training reached, against tokens and against seconds."""
    for x, label in (("tokens", "tokens of training"), ("seconds", "seconds of training")):
        drawn = []
        for row in trainings:
            training = TRAININGS[row["training"]]
            points = [(float(point[x]), float(point["bits"])) for point in row["curve"] if point["bits"] > 0 and point[x] > 0]
            if points:
                drawn.append(Line(training.title, points, training.family, f"{points[-1][1]:.3f} bits per byte"))
        if drawn:
            yield {
                "chart": _lines(f"Bits per byte against {label}", drawn, label, "bits per byte, training text"),
                "label": label,
            }


def _charts(race: Record, cells: Sequence[Record]) -> Iterator[dict[str, str]]:
    """Quality against calls and seconds: what the judge says, and beside it what gives a text away that repeats itself."""
    measures = (
        ("judge", "bits per byte under the judge", lambda found: float(found["judge"]["value"])),
        ("entropy", "entropy of tokens within a text, bits", lambda found: float(found["entropy"])),
        ("distinct", "share of distinct 2-grams", lambda found: float(found["distinct"]["2"])),
    )
    costs = (
        ("tokens per call", lambda cell: float(cell["tokens_per_call"])),
        ("seconds per text", lambda cell: float(cell["seconds"])),
    )
    for x_label, cost in costs:
        for name, y_label, measure in measures:
            drawn = []
            for method in dict.fromkeys(cell["method"] for cell in cells):
                points = sorted((cost(cell), max(measure(cell), 1e-3)) for cell in cells if cell["method"] == method)
                training = TRAININGS[METHODS[method].training]
                drawn.append(Line(METHODS[method].title, points, training.family, f"{points[-1][1]:.3g}"))
            if race["floor"] is not None:
                xs, level = [x for line in drawn for x, _ in line.points], max(measure(race["floor"]), 1e-3)
                drawn.append(Line("held-out text", [(min(xs), level), (max(xs), level)], "floor", f"{level:.3g}"))
            yield {"chart": _lines(f"{y_label} against {x_label}", drawn, x_label, y_label), "name": name, "cost": x_label}


def _lines(title: str, drawn: Sequence[Line], x_label: str, y_label: str) -> str:
    xs = [x for line in drawn for x, _ in line.points]
    marked = [mark for mark in _MARKS if 0.9 * min(xs) <= mark <= 1.1 * max(xs)]
    return lines(title, "; ".join(f"{line.name}: {line.note}" for line in drawn), drawn, x_label, y_label, marked)


def _shown(cells: Sequence[Record]) -> Iterator[Record]:
    """One cell of each method that is watched while it writes: its second, or its only one."""
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [cell for cell in cells if cell["method"] == method]
        yield own[min(1, len(own) - 1)]


def _moving(frames: Record, most: int) -> dict[str, Any]:
    """The tokens of a text with the moments, in percent of a cycle, at which each came to hold what; calls are the clock."""
    tokens = []
    for history in frames["tokens"]:
        moments = [round(100 * _SHARE * call / most, 1) for call, _ in history]
        texts = [text for _, text in history]
        before = [
            {"text": text.replace("\n", "\u21b5"), "span": (start, end)}
            for text, start, end in zip(texts, moments, moments[1:], strict=False)
        ]
        last = {"text": texts[-1], "moment": moments[-1]} if texts else {"text": "", "moment": 0.0}
        tokens.append({**last, "before": before})
    return {"prompt": frames["prompt"], "tokens": tokens}


def _at(cell: Record) -> str:
    """The title of a cell with its rung."""
    by = cell["by"].replace("tokens", "token") if cell["rung"] == 1 else cell["by"]
    return f"{cell['title']}, {cell['rung']:g} {by}" if cell["rung"] else str(cell["title"])


def _without_frames(race: Record) -> dict[str, Any]:
    cells = [{name: value for name, value in cell.items() if name != "frames"} for cell in race["cells"]]
    return {**race, "cells": cells}


def _facts(race: Record, cells: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """What to know first: a number and what it is."""
    for family, told in (("ar", "from left to right"), ("", "in other orders")):
        rows = [row for row in race["trainings"] if (TRAININGS[row["training"]].family == "ar") == bool(family)]
        if rows:
            best = min(rows, key=lambda row: float(row["bits"]["value"]))
            yield f"{best['bits']['value']:.3f}", f"bits per byte, the least {told}: {TRAININGS[best['training']].title}"
    varied = [cell for cell in cells if race["floor"] is None or cell["entropy"] >= 0.8 * race["floor"]["entropy"]]
    if varied:
        most = max(varied, key=lambda cell: float(cell["tokens_per_call"]))
        yield f"{most['tokens_per_call']:.2f}", f"tokens per call at no less than 0.8x the entropy of real text: {_at(most)}"
