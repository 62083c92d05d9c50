"""EAGLE's networks learn from a finished trunk: its features (EAGLE-1), or its law through their own outputs (EAGLE-3).

The trunk gets no gradient. This file knows decoders by their parallel pass, embedding and unembedding only.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fewstep.core.mixer import Context
from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.models.decoder import Decoder
from fewstep.nn.eagle import Eagle3Heads, EagleNetwork, pairs, spread
from fewstep.training.objectives.ahead import HeadsObjectiveConfig
from fewstep.training.objectives.next_token import labels, token_loss
from fewstep.training.objectives.stateless import Stateless

_LEVELS = 5  # that EAGLE-1, which is trained one level deep, is asked to foresee


@final
class EagleConfig(HeadsObjectiveConfig):
    """`features` times the smooth-L1 distance of the features plus `tokens` times the cross-entropy with the trunk's law.

    `noise`: features are read with uniform noise of -noise .. noise on every channel while training.
    """

    kind: ClassVar[str] = "eagle"
    source: ClassVar[str] = "Li et al. 2024, EAGLE, arXiv 2401.15077, section 4.2"
    drafter: ClassVar[str] = "eagle"

    trunk: Literal["frozen"] = "frozen"
    features: float = Field(default=1.0, ge=0)
    tokens: float = Field(default=0.1, ge=0)
    noise: float = Field(default=0.1, ge=0)

    def build(self) -> "Eagle":
        return Eagle(self)


@final
class Eagle3Config(HeadsObjectiveConfig):
    """Training-time test of `steps` steps, step j (from 0) weighted `decay` to the power of j."""

    kind: ClassVar[str] = "eagle3"
    source: ClassVar[str] = "Li et al. 2025, EAGLE-3, arXiv 2503.01840, section 3.2"
    drafter: ClassVar[str] = "eagle3"

    trunk: Literal["frozen"] = "frozen"
    steps: int = Field(default=5, ge=1, le=16)
    decay: float = Field(default=0.8, gt=0, le=1)

    def build(self) -> "Eagle3":
        return Eagle3(self)


class _Objective(Stateless):
    """What both share: which heads they train, what these foresee, and that nothing is kept."""

    def __init__(self, name: str, levels: int) -> None:
        """`levels`: how deep the heads foresee."""
        self.name, self._levels = name, levels

    def foresee(self, model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        decoder = cast(Decoder, model)
        heads = self._heads(decoder)
        features, _, ctx, _ = _trunk(decoder, heads, batch)
        for h in heads.unroll(features, batch.tokens, decoder.embed, ctx, self._levels):
            yield spread(heads.logits(h, decoder.unembed), heads.ids, heads.vocab)

    def _heads(self, decoder: Decoder) -> EagleNetwork:
        heads = decoder.heads.get(self.name)
        if not isinstance(heads, EagleNetwork):
            raise ValueError(f"objective={self.name}: the model has no such heads; set model.heads=['{self.name}']")
        return heads


@final
class Eagle(_Objective):
    """L = features * SmoothL1(f', f) + tokens * CE(p, p'), means over the positions whose next token is known.

    p is the trunk's law after position i+1 and p' its unembedding of f'_{i+1}. Cost: the trunk's pass, the network's, and two
    unembeddings. Source: arXiv 2401.15077 section 4.2. Differs: the noise is not rescaled by the length of the text.
    Raises ValueError for a model without such heads.
    """

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config.kind, _LEVELS)
        self.config = config

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        decoder, config = cast(Decoder, model), self.config
        heads = self._heads(decoder)
        features, logits, ctx, next_token = _trunk(decoder, heads, batch)
        read = features
        if heads.training and config.noise:
            read = features + config.noise * (2 * rng.uniform(*features.shape[1:]) - 1).to(features)
        scored = _scored(batch, ctx, 1)
        h = heads.unroll(read, batch.tokens, _embed(decoder), ctx, 1)[0] if scored.shape[1] else features[:, 1:]
        units = scored.sum()
        distance = _mean(functional.smooth_l1_loss(h, features[:, 1:], reduction="none").mean(-1), scored, units)
        scores = functional.linear(h, decoder.head.weight.detach())
        surprise = _mean(_surprise(scores, logits[:, 1:]), scored, units)
        accuracy = _mean(scores.argmax(-1) == logits[:, 1:].argmax(-1), scored, units)
        metrics = {"next_token": next_token, "eagle_features": distance.detach(), "eagle_1": surprise.detach()}
        total = config.features * distance + config.tokens * surprise
        return Loss(total, int(units), {**metrics, "eagle_1_accuracy": accuracy})


@final
class Eagle3(_Objective):
    """L = sum_j decay^j CE_j: the cross-entropy with the trunk's law of what the network drafts in step j of the unrolling.

    The law is restricted to the tokens that can be drafted, and positions where the trunk's likeliest token cannot be count
    nothing; all sums are divided by the positions of step 0, drafted or not. Accuracies are the shares of the likeliest tokens
    that agree. Cost: the trunk's pass and `steps` passes of the network, whose attention keeps T^2 numbers per head and step.
    Source: arXiv 2503.01840 section 3.2 and its released code. Raises ValueError for a model without such heads.
    """

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config.kind, config.steps)
        self.config = config

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        decoder = cast(Decoder, model)
        heads = cast(Eagle3Heads, self._heads(decoder))
        features, logits, ctx, next_token = _trunk(decoder, heads, batch)
        best, ids = logits.argmax(-1), heads.ids
        draftable, restricted = heads.t2d[best], logits if ids is None else logits[..., ids]
        total, metrics = torch.zeros((), device=logits.device), {"next_token": next_token}
        units = _scored(batch, ctx, 1).sum()
        outputs = heads.unroll(features, batch.tokens, _embed(decoder), ctx, self.config.steps)
        for step, h in enumerate(outputs, 1):
            scores, scored = heads.logits(h, decoder.unembed), _scored(batch, ctx, step)
            surprise = _mean(_surprise(scores, restricted[:, step:]), scored & draftable[:, step:], units)
            total = total + self.config.decay ** (step - 1) * surprise
            drafted = scores.argmax(-1) if ids is None else ids[scores.argmax(-1)]
            accuracy = _mean(drafted == best[:, step:], scored, scored.sum())
            metrics |= {f"eagle3_{step}": surprise.detach(), f"eagle3_{step}_accuracy": accuracy}
        return Loss(total, int(units), metrics)


@torch.no_grad()
def _trunk(decoder: Decoder, heads: EagleNetwork, batch: Batch) -> tuple[Tensor, Tensor, Context, Tensor]:
    """The tapped features side by side [B,T,F], the logits [B,T,V], the context, and the trunk's own loss."""
    encoded = decoder(batch.tokens, batch.segments, taps=heads.taps)
    logits = decoder.unembed(encoded.final)
    value, _, _ = token_loss(logits[:, :-1], labels(batch, 1))
    return torch.cat([encoded.hidden[tap] for tap in heads.taps], -1), logits, encoded.context, value


def _embed(decoder: Decoder) -> Any:
    return lambda tokens: functional.embedding(tokens, decoder.embedding.weight.detach())


def _scored(batch: Batch, ctx: Context, ahead: int) -> Tensor:
    """[B,T-ahead] bool: the positions whose token `ahead` of them is of their own segment."""
    segments = pairs(ctx, ahead).segments
    return torch.ones_like(batch.tokens[:, ahead:], dtype=torch.bool) if segments is None else segments >= 0


def _surprise(scores: Tensor, logits: Tensor) -> Tensor:
    """[...] the cross-entropy in nats of the law of `scores` [...,V] with that of `logits` [...,V]."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return functional.cross_entropy(
        scores.to(dtype).flatten(0, -2), logits.to(dtype).softmax(-1).flatten(0, -2), reduction="none"
    ).view(scores.shape[:-1])


def _mean(values: Tensor, where: Tensor, units: Tensor) -> Tensor:
    """The sum of `values` at the places `where`, divided by `units`; zero where there are none."""
    return torch.where(where, values, 0).sum() / units.clamp(min=1)
