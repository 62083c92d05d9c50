"""Selective copying: letters stand at random places among blanks and are to be told in their order at the end.

How far each letter has to travel depends on where it stands, so a convolution, the same at every token, cannot line them up; a
recurrence that chooses what it takes in can, at lengths it was not trained on too. Decoders of two layers are trained on texts
that are drawn afresh for every step.
"""

from collections.abc import Iterator
from typing import final

import torch

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import Config
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.nn.mixers.mamba import MambaConfig
from fewstep.nn.mixers.s4 import S4Config
from fewstep.nn.position.none import NoPositionConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.recall import Answers
from fewstep.training.objectives.next_token import IGNORED
from fewstep.training.optim import AdamWConfig
from fewstep.training.plan import Budget, Plan, Run
from fewstep.training.precision import PRECISIONS
from fewstep.training.schedule import SCHEDULES
from fewstep.training.trainer import Trainer

_WIDTH, _LENGTH, _LETTERS, _KINDS = 64, 64, 8, 16  # of the decoders; of a text, of its letters, of the alphabet
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
    how = f"decoders of two layers, width {_WIDTH}, {bench.effort.seconds:g} s of training each; {_LETTERS} letters of {_KINDS}"
    mamba = trained(bench, MambaConfig())
    found = {length: copied(mamba, length, bench.effort.seed) for length in (_LENGTH, 2 * _LENGTH, _LONGER * _LENGTH)}
    numbers = {f"length {length}": share for length, share in found.items()}
    yield Finding(SOLVED, found[_LENGTH], f"{how}, among {_LENGTH}", numbers)
    yield Finding(LONGER, found[_LONGER * _LENGTH], f"among {_LONGER * _LENGTH}", numbers)
    fixed = copied(trained(bench, S4Config()), _LENGTH, bench.effort.seed)
    yield Finding(FIXED, fixed, f"chance is {1 / _KINDS:.3f}", {"s4": fixed})


@torch.inference_mode()
def copied(network: Decoder, length: int, seed: int) -> float:
    """The share of letters told in 512 fresh texts of that length."""
    hits = asked = 0.0
    for step in range(8):
        loss = Answers().loss(network, Texts(seed + 1, length=length).batch(step), CounterRng.seeded([0]))
        hits, asked = hits + float(loss.metrics["accuracy"]) * loss.units, asked + loss.units
    return hits / asked


def trained(bench: Bench, mixer: Config) -> Decoder:
    """A decoder of two layers of `mixer`, trained on texts for the bench's seconds."""
    effort = bench.effort
    config = DecoderConfig(
        vocab=_VOCAB,
        width=_WIDTH,
        depth=2,
        query_heads=1,
        hidden=0,
        mixers=(mixer,),
        position=NoPositionConfig(),
        tied=False,
        max_positions=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(effort.seed)
        network = config.build().float()
    bench.console.print(f"training a decoder with {mixer.kind} for {effort.seconds:g} s")
    run = Run(seed=effort.seed, validate_every=0, checkpoint_seconds=0, checkpoint_steps=0, divergence=0)
    plan = Plan(AdamWConfig(lr=2e-3), SCHEDULES["wsd"](), PRECISIONS["fp32"](), Budget(seconds=effort.seconds), run)
    Trainer(network, Answers(), Texts(effort.seed), plan, bench.scratch / mixer.kind, console=bench.console).run()
    return network.eval()


CLAIM = Claim(
    "selective-copying",
    f"Gu & Dao 2023, Mamba, {_PAPER}",
    "A state space that selects copies letters from anywhere in a text, longer ones than it was trained on too; S4 does not.",
    (SOLVED, LONGER, FIXED),
    measure,
)
