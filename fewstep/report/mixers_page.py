"""The page of a race of mixers: one HTML file with its charts, tables and raw numbers inside, nothing fetched from anywhere.

This file knows the record that `MixerRace.as_dict` gives.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fewstep.report.lines import Line, lines
from fewstep.report.mixer_costs import BOTH_WAYS, SOFTMAX, WORKS
from fewstep.report.mixer_quality import TASKS
from fewstep.report.svg import Mark, bars

Record = Mapping[str, Any]

_TITLES: Mapping[str, str] = MappingProxyType(
    {"forward": "Forward", "training": "Forward and backward", "prefill": "Prefill", "decode": "Decoding one token"}
)
_ENOUGH = 0.95  # of a task: solved


def write_page(race: Record, path: Path) -> Path:
    """Write the page of `race` at `path`; its absolute path."""
    path.write_text(page(race), encoding="utf-8")
    return path.resolve()


def page(race: Record) -> str:
    """The page's HTML; every text in it is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    styles = {name: _style(race, name) for name in dict.fromkeys(cell["mixer"] for cell in race["costs"])}
    reasons: list[str] = []
    works = [
        {
            "title": _TITLES[work],
            "meaning": meaning,
            "chart": _costs(race, work, styles),
            "rows": list(_rows(race, work, styles, reasons)),
        }
        for work, meaning in WORKS.items()
        if any(cell["work"] == work and "seconds" in cell for cell in race["costs"])
    ]
    tasks = [
        {
            "title": task.title,
            "statement": task.statement,
            "chance": task.chance,
            "chart": _answers(race, name, styles),
            "steps": " or ".join(str(steps) for steps in sorted({answer["steps"] for answer in _answered(race, name)})),
        }
        for name, task in TASKS.items()
        if _answered(race, name)
    ]
    unasked = {answer["mixer"]: answer["reason"] for answer in race["quality"] if answer["share"] is None}
    template = environment.get_template("mixers.html.j2")
    return template.render(
        race=race,
        lengths=_lengths(race),
        works=works,
        states=_states(race, styles),
        sizes={name: sizes for name in styles if (sizes := _sizes(race, name))},
        tasks=tasks,
        reasons=reasons,
        unasked=unasked,
        facts=list(_facts(race)),
    )


def _lengths(race: Record) -> list[int]:
    return sorted({cell["length"] for cell in race["costs"]})


def _sizes(race: Record, name: str) -> dict[int, int]:
    """Bytes of the state of `name` by length."""
    return {row["length"]: row["bytes"] for row in race["states"] if row["mixer"] == name}


def _style(race: Record, name: str) -> str:
    sizes = _sizes(race, name)
    if name in (SOFTMAX, BOTH_WAYS):
        return "softmax"
    if not sizes:
        return "stateless"
    return "grows" if sizes[max(sizes)] > sizes[min(sizes)] else "fixed"


def _cells(race: Record, work: str, name: str) -> dict[int, Record]:
    return {cell["length"]: cell for cell in race["costs"] if (cell["work"], cell["mixer"]) == (work, name)}


def _measured(race: Record, work: str, name: str) -> dict[int, Record]:
    return {length: cell for length, cell in _cells(race, work, name).items() if "seconds" in cell}


def _costs(race: Record, work: str, styles: Mapping[str, str]) -> str:
    drawn = []
    for name, style in styles.items():
        cells = _measured(race, work, name)
        if cells:
            points = [
                (float(length), 1e6 * cell["median_seconds"] / _tokens(work, length)) for length, cell in sorted(cells.items())
            ]
            last = max(cells)
            drawn.append(Line(name, points, style, f"{_milliseconds(cells[last])} at {last} tokens"))
    told = "; ".join(f"{line.name}: {line.note}" for line in drawn)
    label = "tokens before it" if work == "decode" else "tokens in the sequence"
    return lines(_TITLES[work], told, drawn, label, "microseconds per token")


def _tokens(work: str, length: int) -> int:
    return 1 if work == "decode" else length


def _states(race: Record, styles: Mapping[str, str]) -> str | None:
    drawn = []
    for name, style in styles.items():
        sizes = _sizes(race, name)
        if sizes:
            last = max(sizes)
            note = f"{sizes[last] / 1e3:.1f} kB at {last} tokens, {sizes[last] / last:.4g} bytes per token"
            drawn.append(Line(name, [(float(length), size / 1e3) for length, size in sorted(sizes.items())], style, note))
    told = "; ".join(f"{line.name}: {line.note}" for line in drawn)
    return lines("State", told, drawn, "tokens taken up", "kilobytes") if drawn else None


def _answered(race: Record, task: str) -> list[Record]:
    return [answer for answer in race["quality"] if answer["task"] == task and answer["share"] is not None]


def _answers(race: Record, task: str, styles: Mapping[str, str]) -> str:
    shares = sorted(((answer["share"], answer["mixer"]) for answer in _answered(race, task)), reverse=True)
    marks = [Mark(name, share, share, share, styles[name], note=f"{share:.3f}") for share, name in shares]
    told = "; ".join(f"{mark.name}: {mark.note}" for mark in marks)
    return bars(TASKS[task].title, told, marks, "share of what was asked that is answered")


def _rows(race: Record, work: str, styles: Mapping[str, str], reasons: list[str]) -> Iterator[dict[str, Any]]:
    """A row of the table of `work` for everybody; what was left out refers to `reasons`, which grows."""
    for name in styles:
        cells, told = _cells(race, work, name), []
        for length in _lengths(race):
            cell = cells.get(length, {"reason": "not asked for"})
            if "seconds" in cell:
                told.append({"time": _milliseconds(cell), "speed": cell["speed_over_softmax"], "rate": _rate(cell)})
                continue
            if cell["reason"] not in reasons:
                reasons.append(cell["reason"])
            told.append({"reason": reasons.index(cell["reason"]) + 1})
        if any("time" in cell for cell in told):
            yield {"name": name, "cells": told, "faster_from": _faster_from(race, work, name)}


def _faster_from(race: Record, work: str, name: str) -> int | None:
    """The length from which on it is faster than softmax attention at every length that was measured."""
    found = None
    for length, cell in sorted(_measured(race, work, name).items(), reverse=True):
        speed = cell["speed_over_softmax"]
        if name in (SOFTMAX, BOTH_WAYS) or speed is None or speed["median"] <= 1:
            break
        found = length
    return found


def _facts(race: Record) -> Iterator[tuple[str, str]]:
    """What to know first: a number and what it is."""
    last = _lengths(race)[-1]
    ours = [name for name in dict.fromkeys(cell["mixer"] for cell in race["costs"]) if name not in (SOFTMAX, BOTH_WAYS)]
    for work, told in (("training", "in training"), ("decode", "in decoding")):
        cells = (cell for name in ours if (cell := _measured(race, work, name).get(last)) and cell["speed_over_softmax"])
        best = max(cells, key=_speed, default=None)
        if best:
            yield f"{_speed(best):.2f}x", f"the speed of softmax attention {told} with {best['mixer']}, {last} tokens"
    sizes = {name: size for name in ours if (size := _sizes(race, name).get(last))}
    if sizes:
        least = min(sizes, key=lambda name: sizes[name])
        full = _sizes(race, SOFTMAX)[last]
        yield (
            f"{sizes[least] / 1e3:.3g} kB",
            f"of state with {least} after {last} tokens; {full / 1e3:.0f} kB with softmax attention",
        )
    for task in TASKS:
        shares = [answer["share"] for answer in _answered(race, task)]
        if shares:
            yield f"{sum(share >= _ENOUGH for share in shares)}/{len(shares)}", f"mixers answer {_ENOUGH:.0%} of {task}"


def _speed(cell: Record) -> float:
    return float(cell["speed_over_softmax"]["median"])


def _milliseconds(cell: Record) -> str:
    return f"{1e3 * cell['median_seconds']:.3g} ms"


def _rate(cell: Record) -> str:
    rate = cell["tokens_per_second"]["median"]
    return f"{rate / 1e3:.3g} k" if rate >= 1e3 else f"{rate:.3g}"
