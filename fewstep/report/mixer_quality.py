"""What a mixer recalls: small decoders trained on made-up tasks, all of one size and for as many steps.

This file knows the tasks by what they ask; their texts are drawn where the claims about them are measured. The first layer of
each decoder joins neighbours, the same in all, so that any mixer can tell what stands behind what; the second is the mixer.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, final

from rich.console import Console

from fewstep.core.recipe import Config
from fewstep.report.claims.induction_heads import Marked
from fewstep.report.claims.recall import Lists, decoder
from fewstep.report.claims.tasks import answered, learned
from fewstep.training.trainer import Data

_ROWS, _LENGTH = 32, 32  # texts of a training step and tokens of a text
_PAIRS, _VOCAB, _KINDS = 8, 64, 16


@final
@dataclass(frozen=True, slots=True)
class Task:
    """What is asked: `texts` makes its training data from a seed, over `vocab` tokens; `chance`: the share of guesses among what
    is told that are right."""

    title: str
    statement: str
    vocab: int
    chance: float
    texts: Callable[[int], Data]


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "recall": Task(
            "Multi-query associative recall",
            f"{_PAIRS} keys and their values are told, then each key is asked for once, among other tokens",
            _VOCAB,
            1 / _PAIRS,
            lambda seed: Lists(seed, _ROWS, _PAIRS, _LENGTH, _VOCAB),
        ),
        "induction": Task(
            "Induction",
            "one token of a text is marked by a sign before it and asked for at the end",
            _KINDS + 1,
            1 / _KINDS,
            lambda seed: Marked(seed, _ROWS, _LENGTH),
        ),
    }
)


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """The `share` of what was asked that a mixer answered after `steps` of training, and the `seconds` they took; or the
    `reason` for which it was not asked."""

    mixer: str
    task: str
    steps: int
    share: float | None = None
    seconds: float = 0.0
    parameters: int = 0
    reason: str = ""

    def numbers(self) -> dict[str, Any]:
        """Everything in JSON values."""
        return asdict(self)

    @classmethod
    def read(cls, numbers: Mapping[str, Any]) -> Self:
        """An answer from its `numbers`."""
        return cls(**numbers)


def asked(mixer: str, config: Config, task: str, steps: int, seed: int) -> Answer:
    """Train a decoder of two layers, the second of the mixer `config`, on `task`; what it answers in fresh texts."""
    start, chosen = time.perf_counter(), TASKS[task]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            sized = decoder(config).model_copy(update={"vocab": chosen.vocab})
            network = learned(sized, chosen.texts(seed), steps, seed, Path(scratch), Console(quiet=True), log_every=steps)
        share = answered(network, chosen.texts(seed + 1))
    except ValueError as error:
        return Answer(mixer, task, steps, reason=str(error))
    return Answer(mixer, task, steps, share, time.perf_counter() - start, sum(each.numel() for each in network.parameters()))
