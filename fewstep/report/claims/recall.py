"""Multi-query associative recall: a list of keys and values is read, then each key is asked for again, between other tokens.

Attention keeps the list; a state of fixed size holds as much of it as it has room for. Decoders of two layers are trained on lists
that are drawn afresh for every step, and asked about others.
"""

from collections.abc import Iterator
from typing import Any, cast, final

import torch
from torch import nn

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import CounterRng, Rng
from fewstep.core.recipe import Config
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.mixers.gated_deltanet import GatedDeltaNetConfig
from fewstep.nn.mixers.mamba2 import Mamba2Config
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.training.objectives.next_token import IGNORED, token_loss
from fewstep.training.optim import AdamWConfig
from fewstep.training.plan import Budget, Plan, Run
from fewstep.training.precision import PRECISIONS
from fewstep.training.schedule import SCHEDULES
from fewstep.training.trainer import Trainer

_WIDTH, _HEADS, _ROWS = 64, 2, 64  # of the decoders, and lists of a training step
_STATES = (2, 8, 32)  # of Mamba-2, each 128 numbers a layer
_EQUAL = 16  # the state at which it holds as many numbers as Gated DeltaNet with heads of 32
_PAPER = "arXiv 2312.04927"

ATTENTION = Criterion(
    "attention-recalls",
    "attention solves the task at a small width: the share of queries it answers",
    f"{_PAPER}, section 4 and figure 2; the threshold is fewstep's own",
    "at least",
    0.95,
)
GROWS = Criterion(
    "recall-grows-with-the-state",
    "a fixed state recalls as much as it has room for: share answered by Mamba-2 with a state of 32 less that of 2",
    "arXiv 2402.18668, figure 2; the threshold is fewstep's own",
    "at least",
    0.2,
)
BEHIND = Criterion(
    "a-small-state-falls-behind",
    "the share attention answers less that of Mamba-2 with a state of 8",
    f"{_PAPER}, figure 2; the threshold is fewstep's own",
    "at least",
    0.2,
)
DELTA = Criterion(
    "the-delta-rule-recalls-more",
    "the share Gated DeltaNet answers less that of Mamba-2 with a state of as many numbers",
    "arXiv 2412.06464, section 4; the threshold is fewstep's own",
    "at least",
    0.0,
)


@final
class Lists:
    """Batches of lists, a pure function of their number: `pairs` keys, each followed by its value, then `length` - 2 `pairs` other
    tokens, among which each key stands once more at a random place, to be answered with its value. Keys are tokens of the lower
    half of the vocabulary, values of the upper; the other tokens are of any kind.
    """

    def __init__(self, seed: int, rows: int = _ROWS, pairs: int = 16, length: int = 64, vocab: int = 128) -> None:
        self._rng = CounterRng.seeded([seed])
        self._rows, self._pairs, self._length, self._vocab = rows, pairs, length, vocab

    def batch(self, step: int) -> Batch:
        """Tokens [B,L] and their `labels` [B,L], the values asked for."""
        rng, half, pairs, rows = self._rng.at(step), self._vocab // 2, self._pairs, self._rows
        keys = rng.split("keys").uniform(rows, half)[0].argsort(-1)[:, :pairs]
        values = half + (rng.split("values").uniform(rows, pairs)[0] * half).long()
        rest = (rng.split("others").uniform(rows, self._length - 2 * pairs)[0] * self._vocab).long()
        places = rng.split("places").uniform(*rest.shape)[0].argsort(-1)[:, :pairs]
        labels = torch.full_like(rest, IGNORED).scatter(1, places, values)
        told = torch.stack([keys, values], 2).flatten(1)
        tokens = torch.cat([told, rest.scatter(1, places, keys)], 1)
        return Batch(tokens, extra={"labels": torch.cat([torch.full_like(told, IGNORED), labels], 1)})


@final
class Answers:
    """The objective of a batch with `labels`: the cross-entropy of what is asked for."""

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        network = cast(Decoder, model)
        value, accuracy, units = token_loss(network.unembed(network(batch.tokens).final), batch.extra["labels"])
        return Loss(value, int(units), {"accuracy": accuracy})

    def after_step(self, model: nn.Module) -> None: ...

    def validated(self, metrics: object) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    how = f"decoders of two layers, width {_WIDTH}, {bench.effort.seconds:g} s of training each; 16 pairs in 64 tokens"
    attention = recall(bench, AttentionConfig(), "attention")
    yield Finding(ATTENTION, attention, how, {"attention": attention})
    found = {state: recall(bench, Mamba2Config(state=state), f"mamba2-{state}") for state in _STATES}
    numbers = {f"state of {2 * _WIDTH * state} numbers a layer": share for state, share in found.items()}
    yield Finding(GROWS, found[_STATES[-1]] - found[_STATES[0]], how, numbers)
    yield Finding(BEHIND, attention - found[_STATES[1]], how, {"attention": attention, "mamba2": found[_STATES[1]]})
    rival = recall(bench, Mamba2Config(state=_EQUAL), f"mamba2-{_EQUAL}")
    delta = recall(bench, GatedDeltaNetConfig(), "gated_deltanet")
    yield Finding(DELTA, delta - rival, how, {"gated_deltanet": delta, "mamba2": rival})


def recall(bench: Bench, mixer: Config, name: str) -> float:
    """The share of queries that a decoder of this mixer answers once it is trained."""
    network = trained(bench, mixer, name)
    hits = asked = 0.0
    with torch.inference_mode():
        for step in range(8):
            loss = Answers().loss(network, Lists(bench.effort.seed + 1).batch(step), CounterRng.seeded([0]))
            hits, asked = hits + float(loss.metrics["accuracy"]) * loss.units, asked + loss.units
    return hits / asked


def trained(bench: Bench, mixer: Config, name: str, log_every: int = 10) -> Decoder:
    """A decoder of two layers of `mixer`, trained on lists for the bench's seconds; its log is in the folder `name` of scratch."""
    effort = bench.effort
    config = DecoderConfig(vocab=128, width=_WIDTH, depth=2, query_heads=_HEADS, hidden=2 * _WIDTH, mixers=(AttentionConfig(window=2), mixer), tied=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(effort.seed)
        network = config.build().float()
    bench.console.print(f"training a decoder with {name} for {effort.seconds:g} s")
    run = Run(seed=effort.seed, validate_every=0, checkpoint_seconds=0, checkpoint_steps=0, log_every=log_every, divergence=0)
    plan = Plan(AdamWConfig(lr=2e-3), SCHEDULES["wsd"](), PRECISIONS["fp32"](), Budget(seconds=effort.seconds), run)
    Trainer(network, Answers(), Lists(effort.seed), plan, bench.scratch / name, console=bench.console).run()
    return network.eval()


CLAIM = Claim(
    "recall",
    "Arora et al. 2023, Zoology, arXiv 2312.04927; Arora et al. 2024, Based, arXiv 2402.18668",
    "Attention answers from a list it has read at any small width; a state of fixed size, as its size allows.",
    (ATTENTION, GROWS, BEHIND, DELTA),
    measure,
)
