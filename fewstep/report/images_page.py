"""The page of a race of images: one HTML file with charts, pictures, tables and raw numbers in it, nothing fetched from anywhere.

This file knows the record that `ImageRace.as_dict` gives, and the pictures that lie beside it.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fewstep.report.images_methods import GROUNDS, METHODS, TRAININGS
from fewstep.report.lines import Line, lines
from fewstep.report.svg import Mark, bars

Record = Mapping[str, Any]

MEASURES: Mapping[str, str] = MappingProxyType(
    {
        "energy": "energy distance",
        "mmd": "MMD squared",
        "frechet": "Frechet distance",
        "precision": "precision",
        "recall": "recall",
        "copying": "copying",
    }
)
_MARKS = (1, 2, 5)  # times powers of ten: where charts of calls and seconds have their marks


def write_page(race: Record, path: Path) -> Path:
    """Write the page of `race` at `path`, with the pictures in the folder `pictures` beside it; its absolute path."""
    path.write_text(page(race, path.parent / "pictures"), encoding="utf-8")
    return path.resolve()


def page(race: Record, pictures: Path) -> str:
    """The page's HTML; every text in it is escaped. A picture that is not there is left out."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    grounds = [_ground(race, name, pictures) for name in GROUNDS if any(cell["ground"] == name for cell in race["cells"])]
    template = environment.get_template("images.html.j2")
    return template.render(
        race=race,
        grounds=grounds,
        trainings=[{**row, "name": _titled(row), "place": GROUNDS[row["ground"]].title} for row in race["trainings"]],
        cut=[row for row in race["trainings"] if row["steps"] < row["asked"]],
        methods=len({cell["method"] for cell in race["cells"]}),
        measures=MEASURES,
        facts=list(_facts(race, grounds)),
    )


def _ground(race: Record, name: str, pictures: Path) -> dict[str, Any]:
    place = GROUNDS[name]
    cells = [cell for cell in race["cells"] if cell["ground"] == name]
    floor = next((found for found in race["floors"] if found["ground"] == name), None)
    nll = [row for row in race["trainings"] if row["ground"] == name and row["nll"]]
    return {
        "title": place.title,
        "ranked": MEASURES[place.ranked],
        "images": bool(place.levels),
        "calls": _chart(cells, floor, lambda cell: float(cell["calls"]), "network calls per sample", place.title),
        "seconds": _chart(cells, floor, lambda cell: 1e3 * cell["seconds"]["median"], "milliseconds per sample", place.title),
        "nll": _nll(nll, place.title),
        "floor": None if floor is None else floor["scores"],
        "data": _inlined(pictures / f"{name}-data.png"),
        "rows": [{**cell, "title": METHODS[cell["method"]].title} for cell in cells],
        "gallery": list(_gallery(cells, name, pictures)),
        "measures": [measure for measure in MEASURES if measure in cells[0]["scores"]],
        "best": min(cells, key=lambda cell: float(cell["scores"][place.ranked]["median"])),
    }


def _chart(cells: Sequence[Record], floor: Record | None, x: Any, label: str, title: str) -> str:
    """The ranked measure of every method against `x`; what is no farther than new data is drawn as far as these."""
    ranked = GROUNDS[cells[0]["ground"]].ranked
    least = _least(floor, ranked, cells)
    drawn = []
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = sorted(((x(cell), cell) for cell in cells if cell["method"] == method), key=lambda pair: pair[0])
        points = [(place, max(least, float(cell["scores"][ranked]["median"]))) for place, cell in own]
        last = own[-1][1]
        note = f"{last['scores'][ranked]['median']:.4g} with {last['calls']:g} calls, {1e3 * last['seconds']['median']:.3g} ms"
        drawn.append(Line(METHODS[method].title, points, _style(METHODS[method].training), note))
    xs = [place for line in drawn for place, _ in line.points]
    if floor is not None:
        drawn.append(Line("new data", [(min(xs), least), (max(xs), least)], "floor", f"{least:.4g}"))
    told = "; ".join(f"{line.name}: {line.note}" for line in drawn)
    y_label = f"{MEASURES[ranked]} from data"
    return lines(f"{title}: {y_label} against {label}", told, drawn, label, y_label, _marks(min(xs), max(xs)))


def _least(floor: Record | None, ranked: str, cells: Sequence[Record]) -> float:
    """How far new data are: for a measure that is 0 on average, its largest size among them."""
    if floor is not None:
        score = floor["scores"][ranked]
        return max(1e-9, abs(score["low"]), abs(score["high"]))
    above = [value for cell in cells if (value := float(cell["scores"][ranked]["median"])) > 0]
    return min(above, default=1e-9)


def _marks(low: float, high: float) -> list[float]:
    """Round numbers from just below `low` to just above `high`."""
    values = [times * 10.0**power for power in range(-4, 6) for times in _MARKS]
    return [value for value in values if 0.9 * low <= value <= 1.1 * high]


def _style(training: str) -> str:
    row = TRAININGS[training]
    if row.kind == "flow":
        return "flow"
    return "few" if row.teacher or not row.likely else training


def _nll(rows: Sequence[Record], title: str) -> str | None:
    """The likelihoods of the networks: above the entropy where that is known, else in bits."""
    if not rows:
        return None
    marks = []
    for row in sorted(rows, key=lambda row: float(row["nll"]["value"])):
        found = row["nll"]
        named = ("value", "error") if found["gap"] is None else ("gap", "gap_error")
        value, error = found[named[0]], found[named[1]] + found["step_error"]
        shown = max(0.0, value)
        note = f"{value:.3f} +- {error:.3f} ({found['how']})"
        marks.append(
            Mark(_titled(row), shown, max(0.0, value - error), max(shown, value + error), _style(row["training"]), note=note)
        )
    unit = "bits per dimension" if rows[0]["nll"]["gap"] is None else "nats above the entropy"
    told = "; ".join(f"{mark.name}: {mark.note}" for mark in marks)
    return bars(f"{title}: negative log-likelihood of held-out rows", told, marks, f"{unit}, held-out rows")


def _gallery(cells: Sequence[Record], name: str, pictures: Path) -> Iterator[dict[str, Any]]:
    """Each method at its second number of steps: what it sampled and how it came there."""
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [cell for cell in cells if cell["method"] == method]
        shown = own[min(1, len(own) - 1)]
        stem = f"{name}-{method}-{shown['steps']}"
        samples, way = _inlined(pictures / f"{stem}.png"), _inlined(pictures / f"{stem}-way.png")
        if samples:
            yield {"title": METHODS[method].title, "calls": shown["calls"], "samples": samples, "way": way}


def _inlined(path: Path) -> str | None:
    try:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return None


def _titled(row: Record) -> str:
    return TRAININGS[row["training"]].title


def _facts(race: Record, grounds: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """What to know first: a number and what it is."""
    for ground in grounds:
        best = ground["best"]
        score = best["scores"][GROUNDS[best["ground"]].ranked]["median"]
        calls = f"{best['calls']:g} call{'s' if best['calls'] != 1 else ''}"
        yield f"{score:.3g}", f"{ground['ranked']} on {ground['title'].lower()}: {METHODS[best['method']].title}, {calls}"
    yield str(len(race["cells"])), "samplings scored"
