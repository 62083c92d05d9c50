"""Whether a model that read "A is B" knows who B is: random pairs of names, three ways to ask, and what each comes to.

A masked model fills the slot on the left, for it learnt every slot. Asked in the other order it knows no more than a model that
reads from left to right, which ranks the pairs correctly by their likelihood.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast, final

import torch
from rich.console import Console
from torch import Tensor

from fewstep.core.objective import Batch, Objective
from fewstep.core.random import CounterRng
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.filling import FillConfig, Filling, Row
from fewstep.decode.generate import decode
from fewstep.decode.stream import Settings
from fewstep.diffusion.orders.ranked import ConfidenceConfig
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.models.model import Model
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.tuning import built, finished
from fewstep.report.text_cells import exact
from fewstep.training.objectives.masked import MaskedConfig
from fewstep.training.objectives.next_token import NextTokenConfig
from fewstep.training.optim import AdamWConfig
from fewstep.training.plan import Budget, Plan, Run
from fewstep.training.precision import PRECISIONS
from fewstep.training.schedule import SCHEDULES
from fewstep.training.trainer import Trainer

_PAIRS, _NAME, _SYMBOLS, _ROWS = 100, 3, 64, 32
_IS, _MASK = _SYMBOLS, _SYMBOLS + 1
_CONFIG = DecoderConfig(
    vocab=_SYMBOLS + 2, mask_token=_MASK, width=64, depth=2, query_heads=2, hidden=128, mixers=(AttentionConfig(head_width=32),)
)
_OURS = "fewstep's own"

FORWARD = Criterion("forward", "asked as it was learnt: the share of pairs that both models complete", _OURS, "at least", 0.95)
SLOT = Criterion(
    "slot",
    "the masked model fills the left slot, given the right one",
    "arXiv 2502.09992, section 3.3",
    "at least",
    0.95,
)
PROMPTED = Criterion(
    "reversed-prompt", "asked in the other order: the better of both models", "arXiv 2309.12288; 2602.02133", "at most", 0.05
)
RANKED = Criterion(
    "ranking", "the autoregressive model ranks all left names by the likelihood of the whole", _OURS, "at least", 0.95
)


@final
@dataclass(frozen=True, slots=True)
class Pairs:
    """`rows` [P,2N+1]: a name, "is", another name; as training data, drawn with replacement by `seed`."""

    rows: Tensor
    seed: int

    @classmethod
    def drawn(cls, seed: int) -> "Pairs":
        """Random names, no two alike."""
        draws = CounterRng.seeded([seed]).split("names").uniform(8 * _PAIRS, _NAME)[0]
        names = list(dict.fromkeys(map(tuple, torch.floor(draws * _SYMBOLS).long().tolist())))
        rows = [[*names[2 * i], _IS, *names[2 * i + 1]] for i in range(_PAIRS)]
        return cls(torch.tensor(rows), seed)

    def batch(self, step: int) -> Batch:
        """Rows of training batch `step`."""
        draws = CounterRng.seeded([self.seed]).split("rows").at(step).uniform(_ROWS)[0]
        return Batch(self.rows[torch.floor(draws * len(self.rows)).long()])

    @property
    def left(self) -> list[list[int]]:
        return cast(list[list[int]], self.rows[:, :_NAME].tolist())

    @property
    def right(self) -> list[list[int]]:
        return cast(list[list[int]], self.rows[:, _NAME + 1 :].tolist())


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    effort, pairs = bench.effort, Pairs.drawn(bench.effort.seed)
    masked_objective = MaskedConfig(estimator="stratified-count").build()
    reader = _learnt(pairs, NextTokenConfig().build(), effort.steps, bench.scratch / "reader", bench.console)
    masked = _learnt(pairs, masked_objective, effort.steps, bench.scratch / "masked", bench.console)
    how = f"{_PAIRS} pairs, {effort.steps} steps"
    known = {"autoregressive": _told(reader, pairs.left, pairs.right), "masked": _told_masked(masked, pairs.left, pairs.right)}
    yield Finding(FORWARD, min(known.values()), how, known)
    gap: list[int | None] = [None] * _NAME
    filled = _filled(masked, [[*gap, _IS, *right] for right in pairs.right])
    yield Finding(SLOT, _right([row[:_NAME] for row in filled], pairs.left), how)
    known = {"autoregressive": _told(reader, pairs.right, pairs.left), "masked": _told_masked(masked, pairs.right, pairs.left)}
    yield Finding(PROMPTED, max(known.values()), how, known)
    yield Finding(RANKED, _ranked(reader, pairs), how)


def _learnt(pairs: Pairs, objective: Objective, steps: int, directory: Path, console: Console) -> Decoder:
    network = built(_CONFIG, pairs.seed)
    run = Run(seed=pairs.seed, batch=_ROWS, validate_every=0, checkpoint_seconds=0, checkpoint_steps=0, divergence=0)
    plan = Plan(AdamWConfig(lr=3e-3, weight_decay=0.0), SCHEDULES["wsd"](), PRECISIONS["fp32"](), Budget(steps=steps), run)
    finished(Trainer(network, objective, pairs, plan, directory, console=console).run())
    return network.eval()


def _told(network: Decoder, given: list[list[int]], wanted: list[list[int]]) -> float:
    """The share of names that the most likely tokens spell after another and "is"."""
    prompts = [[*name, _IS] for name in given]
    rows = decode(network, SilentConfig().build(network, lambda path: network), prompts, Settings(max_new_tokens=_NAME))
    return _right([row.tokens for row in rows], wanted)


def _told_masked(network: Decoder, given: list[list[int]], wanted: list[list[int]]) -> float:
    filled = _filled(network, [[*name, _IS, *[None] * _NAME] for name in given])
    return _right([row[_NAME + 1 :] for row in filled], wanted)


def _filled(network: Decoder, rows: list[Row]) -> list[list[int]]:
    """The rows with the most probable token in each gap, the surest first, one a step."""
    filling = Filling(Model(network, None), rows, FillConfig(order=ConfidenceConfig(temperature=0)))
    for _ in filling.steps():
        pass
    return [result.tokens for result in filling.results()]


def _ranked(network: Decoder, pairs: Pairs) -> float:
    """The share of right names for which the true left name makes the likeliest whole, given the first symbol of each."""
    best = []
    for right in pairs.right:
        rows = pairs.rows.clone()
        rows[:, _NAME + 1 :] = torch.tensor(right)
        best.append(int(exact(network, Batch(rows)).nats.argmin()))
    return sum(i == place for i, place in enumerate(best)) / len(best)


def _right(found: list[list[int]], wanted: list[list[int]]) -> float:
    return sum(one == other for one, other in zip(found, wanted, strict=True)) / len(wanted)


CLAIM = Claim(
    "reversal",
    "Berglund et al. 2023, arXiv 2309.12288; Nie et al. 2025, arXiv 2502.09992, section 3.3",
    "A masked model fills the slot of a name it learnt on the left. Asked in the other order it fails as an autoregressive one "
    "does, whose likelihood knows the pair: no cure.",
    (FORWARD, SLOT, PROMPTED, RANKED),
    measure,
)
