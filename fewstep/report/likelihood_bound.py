"""How well a masked model predicts text: a Monte Carlo bound of -ln p with its standard error, exact where blocks are one token.

This file knows models by the objectives that bound them, and no data set.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.models.decoder import Decoder
from fewstep.training.objectives.block import BlockConfig
from fewstep.training.objectives.masked import MaskedConfig
from fewstep.training.objectives.masking import Estimator, scored


@final
@dataclass(frozen=True, slots=True)
class NatsBound:
    """`nats` [B] above -ln p of each row in expectation, their standard `error` [B], and the `tokens` [B] that were scored."""

    nats: Tensor
    error: Tensor
    tokens: Tensor

    def bits(self, size: int) -> tuple[float, float]:
        """All rows' bits and the standard error of these, per unit of text that holds `size` of them (bytes, say)."""
        scale = math.log(2) * size
        return float(self.nats.sum()) / scale, float(self.error.square().sum().sqrt()) / scale


@torch.inference_mode()
def nats_bound(
    model: Decoder,
    batch: Batch,
    *,
    block: int | None = None,
    estimator: Estimator = "stratified-count",
    draws: int = 16,
    repeats: int = 8,
    seed: int = 0,
) -> NatsBound:
    """The bound of every row of `batch`, by `draws` patterns of masks spread evenly, `repeats` times over for the error.

    `block` None: masked diffusion; else block diffusion in blocks of so many tokens, exact at 1, where the error is 0.
    `extra["scored"]` [B,T]: the tokens to be scored given the others (an answer given its prompt). Cost: draws x repeats rows a
    row, of twice the length with blocks. Raises ValueError for less than 2 repeats and what the objectives refuse.
    Source: Nie et al. 2025, arXiv 2502.09992, equation 6, with the counts spread evenly (appendix B.5).
    """
    if repeats < 2 or draws < 1:
        raise ValueError(f"repeats={repeats}, draws={draws}: at least 2 repeats of 1 draw; an error needs two numbers")
    config = MaskedConfig(estimator=estimator) if block is None else BlockConfig(estimator=estimator, size=block)
    objective = config.build()
    rows, training = [], model.training
    model.eval()
    for i in range(len(batch.tokens)):
        one = Batch(
            batch.tokens[i].expand(draws, -1),
            None if batch.segments is None else batch.segments[i].expand(draws, -1),
            {name: value[i].expand(draws, *value.shape[1:]) for name, value in batch.extra.items()},
        )
        rng = CounterRng.seeded(range(draws), batch.tokens.device).at(seed)
        rows.append(torch.stack([objective.nats(model, one, rng.at(r)).double().sum(1).mean() for r in range(repeats)]))
    model.train(training)
    found = torch.stack(rows)
    return NatsBound(found.mean(1), found.std(1) / math.sqrt(repeats), scored(batch).sum(1))
