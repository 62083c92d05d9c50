"""The gated attention unit against attention and MLP: language models of as many parameters, trained with as many multiply-adds.

Two units take the place of one block, as in the paper, whose smallest model has fifty times the parameters of these.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import final

import torch

from fewstep.core.random import CounterRng
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.nn.mixers.gau import GAUConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.counts import multiply_adds
from fewstep.report.claims.tuning import built, dataset_of, tune
from fewstep.training.data import Dataset
from fewstep.training.objectives.next_token import NextToken, NextTokenConfig
from fewstep.training.plan import Budget, Run, Used

_WIDTH, _HEADS, _BLOCKS = 192, 3, 2
_SIZES = Run(batch=8, length=128)
_PAPER = "arXiv 2202.10447"

LOSS = Criterion(
    "as-good-as-attention-and-mlp",
    "held-out loss of gated attention units less that of attention + MLP, nats a token",
    f"{_PAPER}, section 2.2 and figure 3, recalled: on par or better; the threshold, about what a seed makes, is fewstep's own",
    "at most",
    0.02,
)
SIZE = Criterion(
    "as-many-parameters",
    "parameters of the one over those of the other, whichever is more",
    "fewstep's own, for the comparison to be fair",
    "at most",
    1.01,
)


@final
@dataclass(frozen=True, slots=True)
class Trained:
    """A network's `size` in parameters, `cost` in multiply-adds a sequence, what its training `used`, and its held-out `loss`."""

    size: int
    cost: int
    used: Used
    loss: float

    @property
    def as_dict(self) -> dict[str, float]:
        steps, seconds = self.used.steps, self.used.seconds
        return {
            "parameters": self.size,
            "multiply-adds a sequence": self.cost,
            "steps": steps,
            "seconds": seconds,
            "loss": self.loss,
        }


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    dataset = dataset_of(bench)
    units, blocks = configs(bench.model.network.vocab)
    steps = bench.effort.steps
    plain = _trained(bench, dataset, blocks, "attention and MLP", steps)
    gated = _trained(bench, dataset, units, "gated attention units", max(1, round(steps * plain.cost / cost_of(units))))
    numbers = {"gau": gated.as_dict, "attention and MLP": plain.as_dict}
    told = (
        f"{gated.loss:.3f} after {gated.used.steps} steps, {plain.loss:.3f} after {plain.used.steps}; {gated.size:,} parameters"
    )
    seconds = f"{gated.used.seconds:.0f} s and {plain.used.seconds:.0f} s of training"
    yield Finding(LOSS, gated.loss - plain.loss, f"{told}; {seconds}; one seed", numbers)
    sizes = sorted([gated.size, plain.size])
    yield Finding(SIZE, sizes[1] / sizes[0], f"{gated.size:,} and {plain.size:,}", numbers)


def configs(vocab: int) -> tuple[DecoderConfig, DecoderConfig]:
    """Two gated units a block, and attention with an MLP just wide enough for as many parameters."""
    common = DecoderConfig(vocab=vocab, width=_WIDTH, query_heads=_HEADS, max_positions=None)
    units = common.model_copy(update={"mixers": (GAUConfig(),), "depth": 2 * _BLOCKS, "hidden": 0})
    narrow = common.model_copy(update={"depth": _BLOCKS, "hidden": 1})
    spare = size_of(units) - size_of(narrow)
    return units, narrow.model_copy(update={"hidden": 1 + round(spare / (_BLOCKS * 3 * _WIDTH))})


def size_of(config: DecoderConfig) -> int:
    """Parameters of a decoder."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())


@torch.no_grad()
def cost_of(config: DecoderConfig) -> int:
    """Multiply-adds of a forward pass over one sequence of the training's length, from tokens to logits."""
    network, tokens = built(config, 0), torch.zeros(1, _SIZES.length, dtype=torch.int64)
    return multiply_adds(lambda: network.unembed(network(tokens).final))


def _trained(bench: Bench, dataset: Dataset, config: DecoderConfig, name: str, steps: int) -> Trained:
    effort = bench.effort
    network = built(config, effort.seed)
    bench.console.print(f"training {name} for {steps} steps")
    used = tune(bench, dataset, network, NextTokenConfig().build(), name, _SIZES, Budget(steps=steps))
    return Trained(size_of(config), cost_of(config), used, _held_out(network, dataset, effort.count))


@torch.no_grad()
def _held_out(network: Decoder, dataset: Dataset, count: int) -> float:
    """Nats a token over the first `count` batches of held-out text."""
    total, scored, rng = 0.0, 0, CounterRng.seeded([0])
    for batch in islice(dataset.validation(_SIZES.batch, _SIZES.length), count):
        loss = NextToken().loss(network, batch, rng)
        total, scored = total + float(loss.value) * loss.units, scored + loss.units
    return total / scored


CLAIM = Claim(
    "gau",
    f"Hua et al. 2022, Transformer Quality in Linear Time, {_PAPER}",
    "Two gated attention units predict text as well as a block of attention and MLP with as many parameters and as much compute.",
    (LOSS, SIZE),
    measure,
)
