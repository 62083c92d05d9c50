"""Induction heads: a token of a text is marked by a sign before it and asked for when the sign comes again, at the end.

A recurrence that chooses what it takes in keeps the marked token over any length; a convolution, the same at every token, mixes
it with whatever else stands there.
"""

from collections.abc import Iterator
from typing import final

import torch

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import Config
from fewstep.nn.mixers.mamba import MambaConfig
from fewstep.nn.mixers.s4 import S4Config
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.selective_copying import by_length, decoder
from fewstep.report.claims.tasks import answered, trained
from fewstep.training.objectives.next_token import IGNORED

_LENGTH, _LONGEST, _KINDS = 64, 1024, 16  # of a text in training, of the longest, of the tokens but the sign
_PAPER = "arXiv 2312.00752"

SOLVED = Criterion(
    "mamba-recalls",
    "Mamba solves the task: the share of texts in which it tells the marked token",
    f"{_PAPER}, section 4.1.2, recalled; the threshold is fewstep's own",
    "at least",
    0.95,
)
LONGER = Criterion(
    "mamba-recalls-in-longer-texts",
    "it does so in texts sixteen times as long as it was trained on",
    f"{_PAPER}, section 4.1.2, recalled: perfect at 4000 times the length; the threshold is fewstep's own",
    "at least",
    0.95,
)
FIXED = Criterion(
    "s4-does-not",
    "S4, the same at every token, does not: the share of texts at the trained length",
    f"{_PAPER}, section 3.1, recalled, which says so of all time-invariant models; the threshold is fewstep's own",
    "at most",
    0.5,
)


@final
class Marked:
    """Batches of texts, a pure function of their number: tokens of any of 16 kinds, a sign before one of them and at the end."""

    def __init__(self, seed: int, rows: int = 64, length: int = _LENGTH) -> None:
        self._rng, self._rows, self._length = CounterRng.seeded([seed]), rows, length

    def batch(self, step: int) -> Batch:
        """Tokens [B,L] and their `labels` [B,L], of which the last asks for the marked token."""
        rng = self._rng.at(step)
        tokens = (rng.split("tokens").uniform(self._rows, self._length)[0] * _KINDS).long()
        place = (rng.split("places").uniform(self._rows, 1)[0] * (self._length - 2)).long()
        tokens = tokens.scatter(1, place, _KINDS)
        tokens[:, -1] = _KINDS
        labels = torch.full_like(tokens, IGNORED)
        labels[:, -1:] = tokens.gather(1, place + 1)
        return Batch(tokens, extra={"labels": labels})


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    how = f"two layers of width 64, {bench.effort.steps} steps of 64 texts of {_LENGTH} tokens"
    selective = _recalled(bench, MambaConfig())
    yield Finding(SOLVED, selective[_LENGTH], how, by_length(selective))
    yield Finding(LONGER, selective[_LONGEST], f"{how}, asked in {_LONGEST}", by_length(selective))
    fixed = _recalled(bench, S4Config())
    yield Finding(FIXED, fixed[_LENGTH], f"{how}; chance is {1 / _KINDS:.3f}", by_length(fixed))


def _recalled(bench: Bench, mixer: Config) -> dict[int, float]:
    """The share of fresh texts whose marked token is told, by their length."""
    network = trained(bench, decoder(mixer, _KINDS + 1), Marked(bench.effort.seed), mixer.kind)
    return {
        length: answered(network, Marked(bench.effort.seed + 1, length=length)) for length in (_LENGTH, 4 * _LENGTH, _LONGEST)
    }


CLAIM = Claim(
    "induction-heads",
    f"Gu & Dao 2023, Mamba, {_PAPER}",
    "A state space that selects keeps a marked token over texts far longer than those it was trained on; S4 does not.",
    (SOLVED, LONGER, FIXED),
    measure,
)
