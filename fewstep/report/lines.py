"""A chart of many lines over two logarithmic scales, as inline SVG in the manner of `svg`: each line named at its end.

This file knows shapes, scales and labels; it knows nothing of what is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log2, log10
from typing import final

from fewstep.report.svg import WIDTH, Axis, document, label

_TOP, _LINE, _CHARACTER = 14, 15, 6.9  # pixels; lines of names are so far apart, and a character about so wide


@final
@dataclass(frozen=True, slots=True)
class Line:
    """A named line through `points` (x, y), all above 0, x ascending. `style` is a class of the style sheet; `note` follows the
    name where the line is pointed at."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    note: str = ""


def lines(
    title: str, description: str, drawn: Sequence[Line], x_label: str, y_label: str, marked: Sequence[float] | None = None
) -> str:
    """The lines, their names in a column at the right where none covers another. `marked`: where x has its marks; None: at each
    x, which are few then."""
    height = max(400, _LINE * len(drawn) + 100)
    right = WIDTH - 40 - _CHARACTER * max(len(line.name) for line in drawn)
    xs = sorted({x for line in drawn for x, _ in line.points})
    ys = [y for line in drawn for _, y in line.points]
    x_axis = Axis(x_label, log2(xs[0]) - 0.2, log2(xs[-1]) + 0.2, 66, right)
    y_axis = Axis(y_label, log10(min(ys)) - 0.05, log10(max(ys)) + 0.05, height - 52, _TOP)
    parts = [*_x_grid(x_axis, y_axis, xs if marked is None else marked), *_y_grid(y_axis, x_axis)]
    order = sorted(drawn, key=lambda line: -line.points[-1][1])
    places = _apart([y_axis.at(log10(line.points[-1][1])) for line in order], _TOP + 6, height - 52)
    for line, place in zip(order, places, strict=True):
        path = [(x_axis.at(log2(x)), y_axis.at(log10(y))) for x, y in line.points]
        end_x, end_y = path[-1]
        tip = f"{line.name}: {line.note}" if line.note else line.name
        parts += [
            f'<g class="{line.style}"><title>{escape(tip)}</title>',
            f'<path class="lead" d="M{end_x:.1f} {end_y:.1f}L{right + 14:.1f} {place:.1f}"/>',
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in path)}"/>',
            *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in path),
            f"{label(line.name, right + 18, place + 4, 'start')}</g>",
        ]
    return document(title, description, height, parts)


def _apart(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Places near the `wanted` ones (ascending), a line apart, between `top` and `bottom` if there is room."""
    placed: list[float] = []
    for place in wanted:
        placed.append(max(place, placed[-1] + _LINE if placed else top))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], bottom - _LINE * (len(placed) - 1 - i))
    return placed


def _x_grid(axis: Axis, y_axis: Axis, values: Sequence[float]) -> list[str]:
    bottom = y_axis.first
    parts = []
    for value in values:
        x = axis.at(log2(value))
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{y_axis.last}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(label(f"{value:g}", x, bottom + 18, "middle", "tick"))
    return [*parts, label(axis.label, (axis.first + axis.last) / 2, bottom + 42, "middle", "label")]


def _y_grid(axis: Axis, x_axis: Axis) -> list[str]:
    parts = []
    for tick in _ticks(axis.start, axis.stop):
        y = axis.at(log10(tick))
        parts.append(f'<line class="grid" x1="{x_axis.first}" y1="{y:.1f}" x2="{x_axis.last:.1f}" y2="{y:.1f}"/>')
        parts.append(label(f"{tick:g}", x_axis.first - 8, y + 4, "end", "tick"))
    turn = f"translate(16 {(axis.first + axis.last) / 2:.1f}) rotate(-90)"
    return [*parts, f'<text class="label" text-anchor="middle" transform="{turn}">{escape(axis.label)}</text>']


def _ticks(start: float, stop: float) -> list[float]:
    """1, 2 and 5 times the powers of 10 between the exponents `start` and `stop`; over many of them, the powers alone."""
    steps = (1, 2, 5) if stop - start < 4 else (1,)
    values = [step * 10.0**power for power in range(floor(start), ceil(stop) + 1) for step in steps]
    return [value for value in values if start <= log10(value) <= stop]
