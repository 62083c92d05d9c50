"""D3PM: the divergence of each step's reverse law from its posterior, in a chain of T steps, under either corruption."""

from typing import ClassVar, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.mixer import Full
from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.core.recipe import Config, choice
from fewstep.diffusion.corruptions import CORRUPTIONS, AbsorbingConfig, CorruptionConfig, absorber
from fewstep.models.decoder import Decoder
from fewstep.training.objectives.masking import mask_token_of, predicting, scored
from fewstep.training.objectives.score_entropy import spread_times
from fewstep.training.objectives.stateless import Stateless


@final
class D3PMConfig(Config):
    """`steps` of the chain; `auxiliary` weighs the cross-entropy of x_0 itself, which only training has."""

    kind: ClassVar[str] = "d3pm"
    source: ClassVar[str] = "Austin et al. 2021, arXiv 2107.03006, equations 1 and 5"

    corruption: choice(lambda: CORRUPTIONS, "corruption") = AbsorbingConfig()  # type: ignore[valid-type]
    steps: int = Field(default=1000, ge=1)
    auxiliary: float = Field(default=0.001, ge=0)

    def build(self) -> "D3PM":
        return D3PM(self)


@final
class D3PM(Stateless):
    """Raises ValueError for absorption without a mask token, or a mixer that only looks back. Cost: one pass, laws in float64.

    Differs: the divergence of x_1 from the prior, which no weight moves, is left out.
    """

    name = D3PMConfig.kind

    def __init__(self, config: D3PMConfig) -> None:
        self.config = config

    def nats(self, model: nn.Module, batch: Batch, rng: Rng) -> Tensor:
        """[B,T]: what each token adds to the bound of its row's -ln p, in nats."""
        return self._terms(model, batch, rng)[0]

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        units = max(int(scored(batch).sum()), 1)
        bound, guess = (terms.sum() / units for terms in self._terms(model, batch, rng))
        value = bound + self.config.auxiliary * guess if model.training else bound
        return Loss(value, int(scored(batch).sum()), {"bound": bound.detach(), "x_0": guess.detach()})

    def _terms(self, model: nn.Module, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        decoder, real, steps = cast(Decoder, model), scored(batch), self.config.steps
        corruption = cast(CorruptionConfig, self.config.corruption).build(decoder.vocab, decoder.mask_token, batch.tokens.device)
        if absorber(corruption) is not None:
            mask_token_of(decoder, batch, self.name)
        i = torch.floor(spread_times(rng) * steps)
        s, t = i / steps, (i + 1) / steps
        x_t = corruption.corrupt(batch.tokens, t, rng).where(real, batch.tokens)
        noise = (1 - corruption.keep(t)).unsqueeze(1).expand(x_t.shape) if decoder.noisy else None
        encoded = decoder(x_t, batch.segments, mask=Full(), noise=noise)
        logits = decoder.unembed(predicting(decoder, encoded.final, batch)).double()
        if decoder.mask_token is not None:
            logits = logits.index_fill(-1, x_t.new_tensor([decoder.mask_token]), -torch.inf)
        data = nn.functional.one_hot(batch.tokens, decoder.vocab).double()
        posterior = corruption.posterior(x_t, data, t, s)
        reverse = corruption.posterior(x_t, logits.softmax(-1), t, s)
        tiny = torch.finfo(torch.float64).tiny
        terms = torch.where(posterior > 0, posterior * (posterior.clamp(min=tiny).log() - reverse.clamp(min=tiny).log()), 0.0)
        guess = nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten(), reduction="none").view_as(batch.tokens)
        return steps * terms.sum(-1) * real, guess * real
