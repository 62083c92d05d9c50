"""Masked diffusion: the weighted cross-entropy of masked tokens given the others, which bounds -ln p(text): MDLM, LLaDA."""

from typing import ClassVar, cast, final

from torch import Tensor, nn

from fewstep.core.mixer import Full
from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.models.decoder import Decoder
from fewstep.training.objectives.masking import MaskingConfig, mask_token_of, masked, predicting, scored, surprise
from fewstep.training.objectives.stateless import Stateless


@final
class MaskedConfig(MaskingConfig):
    """One noise level a row, every token sees every other of its segment."""

    kind: ClassVar[str] = "masked"
    source: ClassVar[str] = "Sahoo et al. 2024, arXiv 2406.07524, equation 10; Nie et al. 2025, arXiv 2502.09992, equation 3"
    claims: ClassVar[tuple[str, ...]] = ("diffusion-order", "stratified-count", "reversal", "infilling")

    def build(self) -> "MaskedDiffusion":
        return MaskedDiffusion(self)


@final
class MaskedDiffusion(Stateless):
    """Raises ValueError for a model without a mask token or with a mixer that only looks back. Cost: one pass.

    Differs: the mask token's logit is -inf and visible tokens are not scored, which is what carrying them over comes to.
    """

    name = MaskedConfig.kind

    def __init__(self, config: MaskedConfig) -> None:
        self.config = config

    def nats(self, model: nn.Module, batch: Batch, rng: Rng) -> Tensor:
        """[B,T]: what each token adds to the bound of its row's -ln p, in nats."""
        decoder, real = cast(Decoder, model), scored(batch)
        mask = mask_token_of(decoder, batch, self.name)
        noisy = masked(batch, real.long() - 1, mask, self.config, self.config.window, rng)
        level = noisy.noise.amax(1, keepdim=True).expand_as(noisy.noise) if decoder.noisy else None
        encoded = decoder(noisy.tokens, batch.segments, mask=Full(), noise=level)
        found = surprise(decoder, predicting(decoder, encoded.final, batch), batch.tokens, noisy.hidden)
        return found * noisy.weight.to(found.dtype)

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        units = int(scored(batch).sum())
        value = self.nats(model, batch, rng).sum() / max(units, 1)
        return Loss(value, units, {"bound": value.detach()})
