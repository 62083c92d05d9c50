"""How well a language model predicts text: bits per byte, comparable across tokenizers and with compressors.

This file knows models by their logits alone, and no data set.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fewstep.models.model import Model

_ROWS = 8  # windows per evaluation


@final
@dataclass(frozen=True, slots=True)
class BitsPerByte:
    """`nats` of negative log-likelihood over `tokens` that spell `bytes` of UTF-8."""

    nats: float
    tokens: int
    bytes: int

    @property
    def value(self) -> float:
        return self.nats / math.log(2) / self.bytes


def bits_per_byte(model: Model, texts: Sequence[str], context: int = 384, stride: int = 192) -> BitsPerByte:
    """Score every token of every text once, each text alone, in windows of `context` tokens that advance by `stride`.

    A text follows the end-of-text token, so that its first token is scored too; later ones have at least `context` - `stride`
    tokens on their left where the text has them. `bytes` are all of the texts', and nothing but them is scored.
    Raises ValueError without a tokenizer, for a bad stride, or where there is no text.
    Cost: about context / stride evaluations of every token.
    Differs: training keeps documents apart, so a first token is no part of its loss; here it costs what the model gives it.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.eos is None:
        raise ValueError("model: has no tokenizer with an end-of-text token; load it with its tokenizer.json")
    if not 0 < stride <= context:
        raise ValueError(f"stride={stride}: must be from 1 to context={context}; lower it, or raise the context")
    if not any(texts):
        raise ValueError("texts: no character to score; give at least one")
    nats, tokens = 0.0, 0
    windows = [window for ids in tokenizer.encode_documents(texts) for window in _windows([tokenizer.eos, *ids], context, stride)]
    for first in range(0, len(windows), _ROWS):
        group = windows[first : first + _ROWS]
        inputs = _padded([ids[:-1] for ids, _ in group], 0)
        targets = _padded([[-100] * old + ids[1 + old :] for ids, old in group], -100)
        logits = model.logits(inputs).float()
        nats += float(cross_entropy(logits.flatten(0, 1), targets.to(logits.device).flatten(), reduction="sum").double())
        tokens += int((targets != -100).sum())
    return BitsPerByte(nats, tokens, sum(len(text.encode()) for text in texts))


def _windows(ids: list[int], context: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Pieces of at most `context` + 1 ids, and how many of the predictions in each were already scored by the piece before."""
    scored = 0
    for start in range(0, len(ids) - 1, stride):
        end = min(start + context, len(ids) - 1)
        if end > scored:
            yield ids[start : end + 1], scored - start
            scored = end


def _padded(rows: Sequence[list[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.int64)
