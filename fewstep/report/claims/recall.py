"""Multi-query associative recall: a list of keys and values is read, then each key is asked for again, between other tokens.

Attention keeps the list; a state of fixed size holds as much of it as it has room for. The first layer of each decoder joins
neighbours, the same in all; the second is the mixer.
"""

from collections.abc import Iterator
from typing import Any, final

import torch

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import Config
from fewstep.models.decoder import DecoderConfig
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.mixers.gated_deltanet import GatedDeltaNetConfig
from fewstep.nn.mixers.mamba2 import Mamba2Config
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.tasks import answered, trained
from fewstep.training.objectives.next_token import IGNORED

_WIDTH, _HEADS, _VOCAB = 64, 2, 64  # of the decoders
_STATES = (2, 16, 64)  # of Mamba-2, each 128 numbers
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
    "a fixed state recalls as much as it has room for: share answered by Mamba-2 with a state of 64 less that of 2",
    "arXiv 2402.18668, figure 2; the threshold is fewstep's own",
    "at least",
    0.2,
)
BEHIND = Criterion(
    "a-small-state-falls-behind",
    "the share attention answers less that of Mamba-2 with a state of 2",
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
    """Batches of lists, a pure function of their number: `pairs` keys, each followed by its value, then other tokens up
    to `length`, among which each key stands once more at a random place, to be answered with its value. Keys are tokens of the
    lower half of the vocabulary, values of the upper; the other tokens are of any kind.
    """

    def __init__(self, seed: int, rows: int = 64, pairs: int = 8, length: int = 32, vocab: int = _VOCAB) -> None:
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


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    how = f"decoders of two layers, width {_WIDTH}, {bench.effort.steps} steps of 64 lists each; 8 pairs in 32 tokens"
    attention = _recall(bench, AttentionConfig(), "attention")
    yield Finding(ATTENTION, attention, how, {"attention": attention})
    found = {state: _recall(bench, Mamba2Config(state=state), f"mamba2 with a state of {state}") for state in _STATES}
    numbers = {f"{numbers_of(Mamba2Config(state=state))} numbers": share for state, share in found.items()}
    told = ", ".join(f"{share:.2f} with {size}" for size, share in numbers.items())
    small, equal, large = found.values()
    yield Finding(GROWS, large - small, told, numbers)
    yield Finding(BEHIND, attention - small, f"{attention:.2f} and {small:.2f}", {"attention": attention, "mamba2": small})
    delta = _recall(bench, GatedDeltaNetConfig(), "gated_deltanet")
    sizes = f"{numbers_of(GatedDeltaNetConfig())} numbers and {numbers_of(Mamba2Config(state=_STATES[1]))}"
    yield Finding(DELTA, delta - equal, f"{delta:.2f} and {equal:.2f}; {sizes}", {"gated_deltanet": delta, "mamba2": equal})


def decoder(mixer: Config) -> DecoderConfig:
    """A layer that joins neighbours, then `mixer`; no MLP."""
    fields: dict[str, Any] = {"vocab": _VOCAB, "width": _WIDTH, "depth": 2, "query_heads": _HEADS, "hidden": 0}
    return DecoderConfig(mixers=(AttentionConfig(window=2), mixer), tied=False, init_std=0.1, **fields)


def _recall(bench: Bench, mixer: Config, name: str) -> float:
    """The share of queries that a decoder with this mixer answers once it is trained."""
    return answered(trained(bench, decoder(mixer), Lists(bench.effort.seed), name), Lists(bench.effort.seed + 1))


def numbers_of(mixer: Mamba2Config | GatedDeltaNetConfig) -> int:
    """What the mixer's matrix state holds."""
    carry = mixer.build(width=_WIDTH, heads=_HEADS).begin(1, "cpu", torch.float32)
    return sum(part.numel() for part in carry)


CLAIM = Claim(
    "recall",
    "Arora et al. 2023, Zoology, arXiv 2312.04927; Arora et al. 2024, Based, arXiv 2402.18668",
    "Attention answers from a list it has read at any small width; a state of fixed size, as its size allows.",
    (ATTENTION, GROWS, BEHIND, DELTA),
    measure,
)
