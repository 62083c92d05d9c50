"""Charts as inline SVG: no script, no external resource, colours from the page's style sheet, a text alternative in each.

This file knows shapes, scales and labels; it knows nothing of what is drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import final

Box = tuple[float, float, float, float]  # left, top, right, bottom

WIDTH, _MARGIN, _CHARACTER, _LINE = 720, 14, 6.9, 16  # pixels; a character of the 13-pixel font is about 6.9 wide


@final
@dataclass(frozen=True, slots=True)
class Mark:
    """A named value with its spread. `style` is a class of the style sheet; `note` follows the name."""

    name: str
    x: float
    low: float
    high: float
    style: str
    y: float = 0.0
    note: str = ""


@final
@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale from `start` to `stop` in data and from `first` to `last` in pixels."""

    label: str
    start: float
    stop: float
    first: float
    last: float

    def at(self, value: float) -> float:
        return self.first + (value - self.start) / (self.stop - self.start) * (self.last - self.first)

    def ticks(self, count: int = 6) -> list[float]:
        """About `count` round numbers inside the scale."""
        rough = (self.stop - self.start) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
        first = math.ceil(self.start / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.stop / step + 1e-9) + 1)]


def scatter(title: str, description: str, marks: Sequence[Mark], x_label: str, y_label: str, x_stop: float) -> str:
    """Points (x, y); `low` and `high` are the ends of a vertical whisker. The x axis starts at 0."""
    height = 380
    lowest, highest = min(mark.low for mark in marks), max(mark.high for mark in marks)
    pad = max(0.6 * (highest - lowest), 0.05 * max(abs(lowest), abs(highest)), 1e-3)
    x_axis = Axis(x_label, 0.0, x_stop, 66, WIDTH - _MARGIN)
    y_axis = Axis(y_label, lowest - pad, highest + pad, height - 52, _MARGIN)
    parts = [*_x_grid(x_axis, y_axis.last, y_axis.first), *_y_grid(y_axis, x_axis.first, x_axis.last)]
    boxes = [(x_axis.at(m.x) - 8, y_axis.at(m.high) - 8, x_axis.at(m.x) + 8, y_axis.at(m.low) + 8) for m in marks]
    for mark in sorted(marks, key=lambda m: m.x):
        x, y = x_axis.at(mark.x), y_axis.at(mark.y)
        box = _free_box(mark.name, x, y, boxes, (x_axis.first, y_axis.last, x_axis.last, y_axis.first))
        boxes.append(box)
        left, top, right, bottom = box
        near_y, tip = min(max(y, top), bottom), f"{mark.name}: {mark.note}"
        parts += [
            f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{min(max(x, left), right):.1f}" y2="{near_y:.1f}"/>',
            f'<path class="whisker" d="M{x:.1f} {y_axis.at(mark.low):.1f}V{y_axis.at(mark.high):.1f}"/>',
            f'<circle class="{mark.style}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{escape(tip)}</title></circle>',
            label(mark.name, (left + right) / 2, bottom - 4, "middle"),
        ]
    return document(title, description, height, parts)


def bars(title: str, description: str, marks: Sequence[Mark], x_label: str) -> str:
    """Horizontal bars of length `x` from 0, a whisker from `low` to `high`, the `note` at the end."""
    left = 18 + _CHARACTER * max(len(mark.name) for mark in marks)
    right = WIDTH - 26 - _CHARACTER * max(len(mark.note) for mark in marks)
    height = 30 * len(marks) + 62
    axis = Axis(x_label, 0.0, max(mark.high for mark in marks) * 1.02 or 1.0, left, right)
    parts = _x_grid(axis, _MARGIN, height - 52)
    for index, mark in enumerate(marks):
        y = _MARGIN + 8 + 30 * index
        end, low, high = (axis.at(value) for value in (mark.x, mark.low, mark.high))
        parts += [
            label(mark.name, left - 8, y + 14, "end"),
            f'<rect class="{mark.style}" x="{left:.1f}" y="{y}" width="{max(0.0, end - left):.1f}" height="20" rx="2"/>',
            f'<path class="whisker" d="M{low:.1f} {y + 10}H{high:.1f}M{low:.1f} {y + 5}v10M{high:.1f} {y + 5}v10"/>',
            label(mark.note, max(end, high) + 8, y + 14, "start"),
        ]
    return document(title, description, height, parts)


def stacks(title: str, description: str, rows: Sequence[tuple[str, Sequence[float]]], x_label: str) -> str:
    """One bar per row, of the shares of its parts, each part with its number (from 1) where there is room."""
    left = 18 + _CHARACTER * max(len(name) for name, _ in rows)
    height = 30 * len(rows) + 62
    axis = Axis(x_label, 0.0, 100.0, left, WIDTH - 26)
    parts = _x_grid(axis, _MARGIN, height - 52)
    for index, (name, shares) in enumerate(rows):
        y, start = _MARGIN + 8 + 30 * index, 0.0
        parts.append(label(name, left - 8, y + 14, "end"))
        for number, share in enumerate(shares, 1):
            x, width = axis.at(100 * start), axis.at(100 * (start + share)) - axis.at(100 * start)
            tip = f"{number} tokens: {100 * share:.1f}% of calls"
            parts.append(
                f'<rect class="part" fill-opacity="{min(1.0, 0.15 + 0.2 * number):.2f}" x="{x:.1f}" y="{y}" width="{width:.1f}" '
                f'height="20"><title>{tip}</title></rect>'
            )
            if width > 16:
                parts.append(label(str(number), x + width / 2, y + 14, "middle", "strong" if number > 2 else ""))
            start += share
    return document(title, description, height, parts)


def curve(title: str, description: str, points: Sequence[tuple[float, float]], x_label: str, y_label: str) -> str:
    """A line through `points`, its values written beside them; x is spaced by its logarithm in base 2."""
    height = 300
    x_axis = Axis(x_label, 0.0, math.log2(points[-1][0]) or 1.0, 66, WIDTH - 50)
    y_axis = Axis(y_label, 0.0, 1.15 * max(y for _, y in points), height - 52, _MARGIN)
    places = [(x_axis.at(math.log2(x)), y_axis.at(y)) for x, y in points]
    parts = _y_grid(y_axis, x_axis.first, x_axis.last)
    parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    for (x, y), (value, ratio) in zip(places, points, strict=True):
        parts += [
            f'<circle class="ours" cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
            label(f"{ratio:.2f}", x, y - 10, "middle"),
            label(f"{value:g}", x, y_axis.first + 18, "middle", "tick"),
        ]
    parts.append(label(x_label, (x_axis.first + x_axis.last) / 2, height - 10, "middle", "label"))
    return document(title, description, height, parts)


def document(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    """The `parts` of a chart as one inline image, with what a screen reader says of it."""
    told = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">{told}{"".join(parts)}</svg>'


def label(text: str, x: float, y: float, anchor: str, style: str = "") -> str:
    """`text` at a place; `anchor` says which of its ends is there, `style` is a class of the style sheet."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _x_grid(axis: Axis, top: float, bottom: float) -> list[str]:
    parts = []
    for tick in axis.ticks():
        x = axis.at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(label(f"{tick:g}", x, bottom + 18, "middle", "tick"))
    return [*parts, label(axis.label, (axis.first + axis.last) / 2, bottom + 42, "middle", "label")]


def _y_grid(axis: Axis, left: float, right: float) -> list[str]:
    parts = []
    for tick in axis.ticks(5):
        y = axis.at(tick)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(label(f"{tick:g}", left - 8, y + 4, "end", "tick"))
    middle = (axis.first + axis.last) / 2
    turned = (
        f'<text class="label" text-anchor="middle" transform="translate(16 {middle:.1f}) rotate(-90)">{escape(axis.label)}</text>'
    )
    return [*parts, turned]


def _free_box(name: str, x: float, y: float, taken: Sequence[Box], inside: Box) -> Box:
    """Where the name of the point (x, y) covers nothing: beside it, else above and below, farther and farther."""
    width = _CHARACTER * len(name)
    places = [(x + 12, y - 8), (x - 12 - width, y - 8)]
    text_x = min(max(x - width / 2, inside[0]), inside[2] - width)
    for level in range(12):
        places += [(text_x, y - 26 - _LINE * level), (text_x, y + 10 + _LINE * level)]
    boxes = [(left, top, left + width, top + 16) for left, top in places]
    free = (
        box
        for box in boxes
        if inside[0] <= box[0] and inside[1] <= box[1] and box[2] <= inside[2] and box[3] <= inside[3]
        if not any(box[0] < right and left < box[2] and box[1] < bottom and top < box[3] for left, top, right, bottom in taken)
    )
    return next(free, boxes[0])
