"""Which position encoding goes with which mixer: found by building and running each pair, never from a list.

This file knows neither by name. The laws hold every pair that works to be right (`tests/laws/test_position.py`).
"""

from collections.abc import Mapping
from typing import Any, cast

import torch

from fewstep.core.mixer import Causal, Context, Full
from fewstep.nn.mixers import MIXERS
from fewstep.nn.position import POSITIONS

TESTED = "tested"
UNUSED = "unused: the mixer orders tokens by itself and leaves the encoding to other layers"
_WIDTH, _HEADS, _TOKENS = 16, 4, 6


def encoding_matrix() -> dict[str, dict[str, str]]:
    """For each encoding and each mixer `TESTED`, `UNUSED`, or the reason in one line for which the mixer refuses the encoding."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return {encoding: {mixer: _cell(encoding, mixer) for mixer in MIXERS} for encoding in POSITIONS}


def markdown(matrix: Mapping[str, Mapping[str, str]]) -> str:
    """The matrix as a table, encodings down and mixers across; the reasons stand below it, numbered."""
    mixers = list(next(iter(matrix.values())))
    lines = [f"| encoding | {' | '.join(mixers)} |", "|" + "---|" * (len(mixers) + 1)]
    marks = {TESTED: "✓", UNUSED: "–"}
    for encoding, row in matrix.items():
        told = [cell.replace(f"position={encoding!r}: ", "").replace(mixer, "it", 1) for mixer, cell in row.items()]
        for reason in told:
            marks.setdefault(reason, f"({len(marks) - 1})")
        lines.append(f"| {encoding} | {' | '.join(marks[reason] for reason in told)} |")
    return "\n".join([*lines, "", *(f"- {mark} {reason}" for reason, mark in marks.items())])


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
