"""Length extrapolation: decoders trained on 128 tokens read up to 1024, with ALiBi, with rotary positions, and with YaRN's.

The texts are held out and long enough for every length, and at every length the same tokens are scored.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fewstep.core.recipe import Config
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.nn.position.alibi import AlibiConfig
from fewstep.nn.position.rope import RopeConfig
from fewstep.nn.position.stretched import NtkConfig, YarnConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.tuning import built, dataset_of, tune
from fewstep.training.data import Dataset
from fewstep.training.objectives.next_token import NextTokenConfig
from fewstep.training.plan import Run

_TRAINED, _LENGTHS = 128, (128, 256, 512, 1024)
_LONGEST, _ROWS = _LENGTHS[-1], 32  # tokens of a training step: rows of the trained length
_STRETCH = _LONGEST / _TRAINED

ALIBI = Criterion(
    "alibi-is-flat",
    "ALiBi's perplexity at 1024 tokens over that at the 128 it was trained on",
    "arXiv 2108.12409, figure 1; the threshold is fewstep's own",
    "at most",
    1.02,
)
ROPE = Criterion(
    "rope-breaks",
    "rotary positions' perplexity at 1024 tokens over that at the 128 they were trained on",
    "arXiv 2108.12409, figure 1; the threshold is fewstep's own",
    "at least",
    1.5,
)
YARN = Criterion(
    "yarn-repairs",
    "the same network's perplexity at 1024 tokens with YaRN's positions, nothing trained, over that at 128 without them",
    "arXiv 2309.00071, section 3; the threshold is fewstep's own",
    "at most",
    1.2,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    dataset = dataset_of(bench)
    texts = long_texts(dataset, bench.effort.count)
    alibi = _trained(bench, dataset, AlibiConfig())
    flat = {length: loss(alibi, texts, length, _TRAINED) for length in _LENGTHS}
    how = f"{len(texts)} texts of {_LONGEST} tokens; training of {bench.effort.seconds:g} s a network"
    yield Finding(ALIBI, _ratio(flat[_LONGEST], flat[_TRAINED]), how, {"perplexity": _perplexities(flat)})
    rope = _trained(bench, dataset, RopeConfig())
    broken = {length: loss(rope, texts, length, _TRAINED) for length in _LENGTHS}
    yield Finding(ROPE, _ratio(broken[_LONGEST], broken[_TRAINED]), how, {"perplexity": _perplexities(broken)})
    scalings = {
        "yarn": YarnConfig(factor=_STRETCH, trained_length=_TRAINED),
        "ntk": NtkConfig(factor=_STRETCH),
        "position interpolation": RopeConfig(scaling="linear", factor=_STRETCH),
    }
    found = {name: loss(placed(rope, position), texts, _LONGEST, _TRAINED) for name, position in scalings.items()}
    yield Finding(YARN, _ratio(found["yarn"], broken[_TRAINED]), how, {"perplexity at 1024": _perplexities(found)})


def long_texts(dataset: Dataset, count: int) -> Tensor:
    """[N,1024] tokens of at most `count` windows that lie within one held-out document each, spread over all of them.

    Raises ValueError where no document is so long.
    """
    windows = []
    for batch in dataset.validation(16, _LONGEST):
        assert batch.segments is not None
        windows += [row for row, segments in zip(batch.tokens, batch.segments, strict=True) if not segments.any()]
    if not windows:
        raise ValueError(f"model: none of its held-out texts has {_LONGEST} tokens; use a model of longer ones, e.g. code-nano")
    return torch.stack(windows[:: max(1, len(windows) // count)][:count])


@torch.inference_mode()
def loss(network: Decoder, texts: Tensor, length: int, shortest: int) -> float:
    """Nats per token of `texts` [N,L] read in pieces of `length` tokens.

    Each `shortest`-th token is left out: it begins a piece of that length, and all lengths are to score the same tokens.
    """
    pieces = texts.view(-1, length)
    total, scored = 0.0, 0
    for piece in pieces.split(max(1, 4 * _LONGEST // length)):
        target = piece[:, 1:].clone()
        target[:, shortest - 1 :: shortest] = -100
        logits = network.unembed(network(piece[:, :-1]).final)
        total += float(cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"))
        scored += int((target >= 0).sum())
    return total / scored


def placed(network: Decoder, position: Config) -> Decoder:
    """The same weights with another position encoding that has none of its own."""
    other = network.config.model_copy(update={"position": position}).build().float()
    other.load_state_dict(network.state_dict())
    return other.eval()


def _trained(bench: Bench, dataset: Dataset, position: Config) -> Decoder:
    """A small decoder with `position`, trained from nothing on windows of 128 tokens for the bench's seconds."""
    config = DecoderConfig(
        vocab=bench.model.network.vocab, width=192, depth=4, query_heads=4, hidden=512, position=position, max_positions=_LONGEST
    )
    network = built(config, bench.effort.seed)
    bench.console.print(f"training a decoder with {position.kind} positions for {bench.effort.seconds:g} s")
    tune(bench, dataset, network, NextTokenConfig().build(), position.kind, Run(batch=_ROWS, length=_TRAINED))
    return network


def _ratio(loss: float, other: float) -> float:
    return math.exp(loss - other)


def _perplexities(losses: Mapping[int, float] | Mapping[str, float]) -> dict[str, float]:
    return {str(name): math.exp(value) for name, value in losses.items()}


CLAIM = Claim(
    "length-extrapolation",
    "Press et al. 2021, ALiBi, arXiv 2108.12409; Peng et al. 2023, YaRN, arXiv 2309.00071",
    "Trained on short texts, ALiBi reads long ones as well, rotary positions do not, and YaRN's scaling repairs them.",
    (ALIBI, ROPE, YARN),
    measure,
)
