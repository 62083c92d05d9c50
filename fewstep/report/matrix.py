"""Which position encoding goes with which mixer: found by building and running each pair, never from a list.

This file knows neither by name. The laws hold every pair that works to be right (`tests/laws/test_position.py`).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from fewstep.core.mixer import Causal, Context, Full
from fewstep.nn.mixers import MIXERS
from fewstep.nn.position import POSITIONS

TESTED = "tested"
UNUSED = "unused: the mixer orders tokens by itself and leaves the encoding to other layers"
Matrix = Mapping[str, Mapping[str, str]]  # cells by encoding and mixer

_WIDTH, _HEADS, _TOKENS = 16, 4, 6


def encoding_matrix() -> dict[str, dict[str, str]]:
    """For each encoding and each mixer `TESTED`, `UNUSED`, or the reason in one line for which the mixer refuses the encoding."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return {encoding: {mixer: _cell(encoding, mixer) for mixer in MIXERS} for encoding in POSITIONS}


def markdown(matrix: Matrix) -> str:
    """The matrix as a table, encodings down and mixers across; the reasons stand below it, numbered."""
    rows, reasons = _marked(matrix, lambda i: f"({i + 1})")
    lines = [f"| encoding | {' | '.join(_mixers(matrix))} |", "|" + "---|" * (len(_mixers(matrix)) + 1)]
    lines += [f"| {encoding} | {' | '.join(row)} |" for encoding, row in rows.items()]
    return "\n".join([*lines, "", *(f"- {mark} {reason}" for mark, reason in reasons.items())])


def text(matrix: Matrix) -> str:
    """The same for a terminal: names of mixers run down, so that a column is as narrow as its marks."""
    rows, reasons = _marked(matrix, lambda i: chr(ord("a") + i))
    width, high = max(map(len, matrix)), max(map(len, _mixers(matrix)))
    heads = zip(*(name.rjust(high) for name in _mixers(matrix)), strict=True)
    lines = [f"{'':{width}} {' '.join(letters)}".rstrip() for letters in heads]
    lines += [f"{encoding:{width}} {' '.join(row)}" for encoding, row in rows.items()]
    return "\n".join([*lines, "", *(f"{mark} {reason}" for mark, reason in reasons.items())])


def write(matrix: Matrix, path: Path) -> None:
    """The matrix as JSON: for each encoding and each mixer the cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(matrix, indent=1), encoding="utf-8")


def _mixers(matrix: Matrix) -> list[str]:
    return list(next(iter(matrix.values())))


def _marked(matrix: Matrix, mark: Callable[[int], str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """A mark for each cell of each encoding, and what each mark stands for; refusals have the marks 0, 1, ..."""
    marks = {TESTED: "✓", UNUSED: "–"}
    rows: dict[str, list[str]] = {}
    for encoding, row in matrix.items():
        told = [cell.replace(f"position={encoding!r}: ", "").replace(mixer, "it", 1) for mixer, cell in row.items()]
        rows[encoding] = [marks.setdefault(reason, mark(len(marks) - 2)) for reason in told]
    return rows, {mark: reason for reason, mark in marks.items()}


def _cell(encoding: str, mixer: str) -> str:
    config = cast(Any, MIXERS[mixer]())
    head_width = config.widths(_WIDTH, _HEADS)[1]
    position = cast(Any, POSITIONS[encoding]()).build(head_width=head_width, width=_WIDTH, heads=_HEADS)
    try:
        module = config.build(width=_WIDTH, heads=_HEADS, position=position)
    except ValueError as error:
        return str(error)
    return TESTED if position.parts <= {"embed"} or _reads_positions(module) else UNUSED


def _reads_positions(module: Any) -> bool:
    """Whether a mixer computes something else for tokens twice as far apart."""
    x, places = torch.randn(1, _TOKENS, _WIDTH), torch.arange(_TOKENS).unsqueeze(0)
    mask = Causal() if Causal in module.masks else Full()
    near, far = (module(x, Context(positions, mask=mask))[0] for positions in (places, 2 * places))
    return not torch.equal(near, far)
