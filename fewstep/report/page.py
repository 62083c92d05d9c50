"""The page of a race: one HTML file with its charts, tables and raw numbers inside, nothing fetched from anywhere.

This file knows the record that `Race.as_dict` gives.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fewstep.report.contest import PLAIN
from fewstep.report.svg import Mark, bars, curve, scatter, stacks

CHART = "quality.svg"
_HERE, _STYLE = Path(__file__).parent, "chart.css"


def write_page(race: Mapping[str, Any], path: Path) -> Path:
    """Write the page of `race` at `path`, and its first chart beside it as `quality.svg`; the absolute path of the page."""
    path.write_text(page(race), encoding="utf-8")
    chart = _quality(_rows(race), race["setting"])
    style = (_HERE / _STYLE).read_text(encoding="utf-8")
    path.with_name(CHART).write_text(chart.replace("<title>", f"<style>{style}</style><title>", 1), encoding="utf-8")
    return path.resolve()


def page(race: Mapping[str, Any]) -> str:
    """The page's HTML; every text in it is escaped."""
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    rows = _rows(race)
    ours = [row for row in rows if row["library"] == "fewstep"]
    best = max(ours, key=lambda row: row["tokens_per_call"])
    fastest = max((row for row in ours if row["name"] != PLAIN), key=lambda row: row["tokens_per_second"]["median"], default=best)
    charts = {
        "quality": _quality(rows, race["setting"]),
        "speed": _speed(rows),
        "accepted": _accepted(rows),
        "verification": _verification(race["machine"]),
    }
    template = environment.get_template("race.html.j2")
    return template.render(race=race, rows=rows, best=best, fastest=fastest, **charts)


def _rows(race: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**row, "label": label(row)} for row in race["entries"]]


def label(row: Mapping[str, Any]) -> str:
    """A contestant's name, with its library where that is not this one."""
    return str(row["name"]) if row["library"] == "fewstep" else f"{row['library']} {row['name']}"


def _style(row: Mapping[str, Any]) -> str:
    return "peer" if row["library"] != "fewstep" else "plain" if row["name"] == PLAIN else "ours"


def _quality(rows: list[dict[str, Any]], setting: Mapping[str, Any]) -> str:
    marks = []
    for row in rows:
        mean, error, calls = row["quality"]["mean"], row["quality"]["error"], row["calls_per_token"]
        error = 0.0 if setting["temperature"] == 0 else error  # one text per prompt: nothing was drawn
        note = f"{calls:.3f} calls per token, log2 p = {mean:.3f} per token"
        marks.append(Mark(row["label"], calls, mean - error, mean + error, _style(row), mean, note))
    told = "; ".join(f"{mark.name}: {mark.note}" for mark in marks)
    stop = 1.08 * max(mark.x for mark in marks)
    return scatter(
        "Quality against calls", told, marks, "target calls per token", "log2-probability per token under the target", stop
    )


def _speed(rows: list[dict[str, Any]]) -> str:
    marks = []
    for row in rows:
        speed, ratio = row["tokens_per_second"], row["speed_over_plain"]["median"]
        note = f"{speed['median']:.0f}  ({ratio:.2f}x)"
        marks.append(Mark(row["label"], speed["median"], speed["low"], speed["high"], _style(row), note=note))
    told = "; ".join(f"{mark.name}: {mark.note} tokens per second" for mark in marks)
    return bars("Tokens per second", told, marks, "tokens per second, prompt included: median, slowest and fastest round")


def _accepted(rows: list[dict[str, Any]]) -> str:
    counts = [(row["label"], row["accepted"]) for row in rows if row["accepted"]]
    shares = [(name, [count / sum(histogram) for count in histogram]) for name, histogram in counts]
    parts = [f"{name}: " + ", ".join(f"{100 * share:.0f}%" for share in row) for name, row in shares]
    return stacks("Tokens emitted per call", f"shares of calls with 1, 2, ... tokens. {'; '.join(parts)}", shares, "% of calls")


def _verification(machine: Mapping[str, Any]) -> str:
    points = [(float(count), float(ratio)) for count, ratio in machine["verification"].items()]
    told = "; ".join(f"{count:g} tokens: {ratio:.2f}" for count, ratio in points)
    return curve("What verification costs", told, points, "tokens evaluated in one call, n", "seconds, relative to n = 1")
