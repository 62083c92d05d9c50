"""Next-token prediction: the cross-entropy of each token given those before it in its segment.

This file knows decoders by their parallel pass and unembedding only.
"""

from typing import ClassVar, cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.models.decoder import Decoder
from fewstep.training.objectives.stateless import Stateless

IGNORED = -100  # the label that cross_entropy leaves out


@final
class NextTokenConfig(Config):
    """Plain language modelling."""

    kind: ClassVar[str] = "next_token"
    source: ClassVar[str] = "Bengio et al. 2003; Radford et al. 2018"

    def build(self) -> "NextToken":
        return NextToken()


def labels(batch: Batch, ahead: int) -> Tensor:
    """[B,T-ahead] int64: token i + ahead where it belongs to the segment of token i, else IGNORED."""
    target = batch.tokens[:, ahead:]
    if batch.segments is None:
        return target
    source, later = batch.segments[:, :-ahead], batch.segments[:, ahead:]
    return torch.where((source == later) & (source >= 0), target, IGNORED)


def token_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy (natural logarithm), its accuracy, and the number of tokens scored; zero where none is."""
    scored = target != IGNORED
    units = scored.sum()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
    hits = ((logits.detach().argmax(-1) == target) & scored).sum()
    return total / units.clamp(min=1), hits / units.clamp(min=1), units


@final
class NextToken(Stateless):
    """The objective of a language model. Cost: one forward pass and one unembedding."""

    name = NextTokenConfig.kind

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        decoder = cast(Decoder, model)
        encoded = decoder(batch.tokens, batch.segments)
        value, accuracy, units = token_loss(decoder.unembed(encoded.final[:, :-1]), labels(batch, 1))
        return Loss(value, int(units), {"next_token": value.detach(), "accuracy": accuracy})
