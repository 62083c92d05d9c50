"""What masked objectives share: which tokens of a batch are masked, what each is weighted by, and what it costs to predict them.

A cell is a set of tokens with one noise level: a row of masked diffusion, a block of block diffusion. Whatever the estimator, the
sum of weight times -ln p(token) over the masked tokens of a cell is an unbiased bound of the cell's -ln p. This file knows
decoders by their parallel pass and unembedding only.
"""

from dataclasses import dataclass
from typing import Literal, cast, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.core.objective import Batch
from fewstep.core.random import Rng
from fewstep.core.recipe import Config, choice
from fewstep.diffusion.corruptions import NOISES, AbsorbingConfig, LogLinearConfig, NoiseConfig, slope
from fewstep.models.decoder import Decoder
from fewstep.nn.masks import places

Estimator = Literal["iid-time", "antithetic-time", "iid-count", "stratified-count"]


class MaskingConfig(Config):
    """How noise levels are drawn.

    By time, a token is masked with the probability 1 - keep(t), t uniform in `window`; antithetic times are spread evenly over
    the batch. By count, exactly l of a cell's n tokens are masked, l uniform or spread evenly, and no schedule plays a part.
    """

    estimator: Estimator = "antithetic-time"
    noise: choice(lambda: NOISES, "noise") = LogLinearConfig()  # type: ignore[valid-type]
    window: tuple[float, float] = Field(default=(1e-3, 1.0))

    @model_validator(mode="after")
    def _is_a_window(self) -> "MaskingConfig":
        low, high = self.window
        if not 0 <= low <= high <= 1 or high == 0:
            raise ValueError(f"window={self.window}: expected 0 <= low <= high <= 1, times; exchange or clip them")
        return self


@final
@dataclass(frozen=True, slots=True)
class Masked:
    """`tokens` [B,T] with masks, `hidden` [B,T] where they are, `weight` [B,T] of each and its cell's share `noise` [B,T]."""

    tokens: Tensor
    hidden: Tensor
    weight: Tensor
    noise: Tensor


def scored(batch: Batch) -> Tensor:
    """[B,T] bool: the tokens to be masked and scored: all but padding, or those of `extra["scored"]` (answers, not prompts)."""
    real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.segments is None else batch.segments >= 0
    return real & batch.extra["scored"].bool() if "scored" in batch.extra else real


def masked(batch: Batch, cells: Tensor, mask_token: int, config: MaskingConfig, window: tuple[float, float], rng: Rng) -> Masked:
    """The batch with masks. `cells` [B,T] int64 count up from 0 along a row, one where each cell begins; -1: in none."""
    inside = cells >= 0
    cell, count = cells.clamp(min=0), int(cells.max()) + 1 if cells.numel() else 0
    sizes = torch.zeros(len(cells), max(count, 1), dtype=torch.int64, device=cells.device).scatter_add(1, cell, inside.long())
    share = _shares(sizes, config.estimator in ("antithetic-time", "stratified-count"), rng)
    own = rng.split("mask").uniform(cells.shape[1])
    if config.estimator in ("iid-count", "stratified-count"):
        hidden_count = 1 + torch.floor(share * sizes).long().clamp(max=(sizes - 1).clamp(min=0))
        hidden = _rank(own, cells, sizes) < hidden_count.gather(1, cell)
        weight, noise = sizes / hidden_count, hidden_count / sizes.clamp(min=1)
    else:
        low, high = window
        t = low + (high - low) * share
        level = AbsorbingConfig(noise=cast(NoiseConfig, config.noise)).build(2, 1, cells.device)
        noise = 1 - level.keep(t)
        weight = -slope(level, t) / noise.clamp(min=torch.finfo(torch.float64).tiny)
        hidden = own < noise.gather(1, cell)
    hidden = hidden & inside
    tokens = torch.where(hidden, mask_token, batch.tokens)
    return Masked(tokens, hidden, weight.gather(1, cell), noise.gather(1, cell) * inside)


def mask_token_of(decoder: Decoder, batch: Batch, kind: str) -> int:
    """The decoder's mask token. Raises ValueError where it has none, or the text holds it."""
    token = decoder.mask_token
    if token is None:
        raise ValueError(
            f"objective={kind}: the model has no mask token; set model.mask_token to an id no text has, and vocab above it"
        )
    if bool((batch.tokens == token).any()):
        raise ValueError(f"batch: holds the mask token {token}; set model.mask_token to an id that the tokenizer never gives")
    return token


def predicting(decoder: Decoder, own: Tensor, batch: Batch, before: Tensor | None = None) -> Tensor:
    """[B,T,D]: the output that predicts each token of a batch: its `own`, or that of the token before if the decoder is shifted.

    The first of a segment has none before it. `before` [B,T,D]: what is shifted, where that is not all `own`.
    """
    if not decoder.shifted:
        return own
    place = places(torch.zeros_like(batch.tokens) if batch.segments is None else batch.segments)
    return torch.where((place > 0).unsqueeze(-1), (own if before is None else before).roll(1, 1), own)


def surprise(decoder: Decoder, final_hidden: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor:
    """[B,T]: -ln p(token) in nats where `hidden`, 0 elsewhere; masks are never predicted. Cost: an unembedding of the hidden."""
    logits = decoder.unembed(final_hidden[hidden])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if decoder.mask_token is not None:
        logits = logits.index_fill(-1, tokens.new_tensor([decoder.mask_token]), -torch.inf)
    found = nn.functional.cross_entropy(logits, tokens[hidden], reduction="none")
    return torch.zeros(tokens.shape, dtype=found.dtype, device=found.device).masked_scatter(hidden, found)


def _shares(sizes: Tensor, spread: bool, rng: Rng) -> Tensor:
    """[B,C] uniform numbers of [0, 1), one a cell; `spread` evenly over all cells of the batch, each still uniform."""
    share = rng.split("level").uniform(sizes.shape[1])
    if not spread:
        return share
    real = sizes > 0
    place = real.flatten().cumsum(0).view_as(sizes) - 1
    # one shift for all: without it a row would have the same stratum at every step
    shift = rng.split("shift").uniform()[0]
    return (shift + (place + share) / real.sum().clamp(min=1)) % 1


def _rank(own: Tensor, cells: Tensor, sizes: Tensor) -> Tensor:
    """[B,T] the place of each token among those of its cell, by the numbers `own` [B,T] of [0, 1)."""
    after = cells.max() + 1
    order = (torch.where(cells >= 0, cells, after) + own).argsort(dim=1).argsort(dim=1)
    begins = sizes.cumsum(1) - sizes
    return order - begins.gather(1, cells.clamp(min=0))
