"""Selective copying: letters stand at random places among blanks and are to be told in their order at the end.

How far each letter has to travel depends on where it stands, so a convolution, the same at every token, cannot line them up; a
recurrence that chooses what it takes in can, at lengths it was not trained on too.
"""

from collections.abc import Iterator, Mapping
from typing import final

import torch

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import Config
from fewstep.models.decoder import DecoderConfig
from fewstep.nn.mixers.mamba import MambaConfig
from fewstep.nn.mixers.s4 import S4Config
from fewstep.nn.position.none import NoPositionConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.tasks import answered, trained
from fewstep.training.objectives.next_token import IGNORED

_WIDTH, _LENGTH, _LETTERS, _KINDS = 64, 32, 8, 16  # of the decoders; of a text, of its letters, of the alphabet
_BLANK, _ASK, _VOCAB = _KINDS, _KINDS + 1, _KINDS + 2
_LONGER = 4
_PAPER = "arXiv 2312.00752"

SOLVED = Criterion(
    "mamba-copies",
    "Mamba solves the task: the share of letters it tells",
    f"{_PAPER}, table 1: 99.8% at length 4096; the threshold is fewstep's own",
    "at least",
    0.95,
)
LONGER = Criterion(
    "mamba-copies-longer",
    "it does so in texts four times as long as it was trained on",
    f"{_PAPER}, section 4.1, which shows it for induction heads; the threshold is fewstep's own",
    "at least",
    0.9,
)
FIXED = Criterion(
    "s4-does-not",
    "S4, the same at every token, does not: the share of letters it tells at the trained length",
    f"{_PAPER}, table 1: 18.3% at length 4096; the threshold is fewstep's own",
    "at most",
    0.5,
)
FIXED_LONGER = Criterion(
    "s4-does-not-in-longer-texts",
    "nor in texts four times as long",
    f"{_PAPER}, section 3.1, recalled; the threshold is fewstep's own",
    "at most",
    0.5,
)


@final
class Texts:
    """Batches of texts, a pure function of their number: `length` places, `letters` of them letters, then as many askings."""

    def __init__(self, seed: int, rows: int = 64, length: int = _LENGTH, letters: int = _LETTERS) -> None:
        self._rng = CounterRng.seeded([seed])
        self._rows, self._length, self._letters = rows, length, letters

    def batch(self, step: int) -> Batch:
        """Tokens [B,L] and their `labels` [B,L], the letters asked for."""
        rng, rows, count = self._rng.at(step), self._rows, self._letters
        letters = (rng.split("letters").uniform(rows, count)[0] * _KINDS).long()
        places = rng.split("places").uniform(rows, self._length)[0].argsort(-1)[:, :count].sort(-1).values
        text = torch.full((rows, self._length), _BLANK).scatter(1, places, letters)
        tokens = torch.cat([text, torch.full_like(letters, _ASK)], 1)
        return Batch(tokens, extra={"labels": torch.cat([torch.full_like(text, IGNORED), letters], 1)})


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    how = f"two layers of width {_WIDTH}, {bench.effort.steps} steps of 64 texts; {_LETTERS} letters of {_KINDS} kinds among"
    selective = _copied(bench, MambaConfig())
    yield Finding(SOLVED, selective[_LENGTH], f"{how} {_LENGTH}", by_length(selective))
    yield Finding(LONGER, selective[_LONGER * _LENGTH], f"{how} {_LONGER * _LENGTH}", by_length(selective))
    fixed = _copied(bench, S4Config())
    yield Finding(FIXED, fixed[_LENGTH], f"{how} {_LENGTH}; chance is {1 / _KINDS:.3f}", by_length(fixed))
    yield Finding(FIXED_LONGER, fixed[_LONGER * _LENGTH], f"{how} {_LONGER * _LENGTH}", by_length(fixed))


def decoder(mixer: Config, vocab: int) -> DecoderConfig:
    """Two layers of `mixer` alone, without MLP or positions."""
    return DecoderConfig(
        vocab=vocab,
        width=_WIDTH,
        depth=2,
        query_heads=1,
        hidden=0,
        mixers=(mixer,),
        position=NoPositionConfig(),
        tied=False,
        max_positions=None,
        init_std=0.1,
    )


def _copied(bench: Bench, mixer: Config) -> dict[int, float]:
    """The share of letters told in fresh texts, by their length."""
    network = trained(bench, decoder(mixer, _VOCAB), Texts(bench.effort.seed), mixer.kind)
    lengths = (_LENGTH, 2 * _LENGTH, _LONGER * _LENGTH)
    return {length: answered(network, Texts(bench.effort.seed + 1, length=length)) for length in lengths}


def by_length(shares: Mapping[int, float]) -> dict[str, float]:
    """For a finding's numbers."""
    return {f"length {length}": share for length, share in shares.items()}


CLAIM = Claim(
    "selective-copying",
    f"Gu & Dao 2023, Mamba, {_PAPER}",
    "A state space that selects copies letters from anywhere in a text, longer ones than it was trained on too; S4 does not.",
    (SOLVED, LONGER, FIXED, FIXED_LONGER),
    measure,
)
