"""Score entropy: the network learns the ratios of probabilities of sequences one token apart: SEDD, under either corruption."""

from typing import ClassVar, cast, final

from pydantic import Field
from torch import Tensor, nn

from fewstep.core.mixer import Full
from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.core.recipe import Config, choice
from fewstep.diffusion.corruptions import CORRUPTIONS, AbsorbingConfig, CorruptionConfig, absorber
from fewstep.diffusion.scores import log_scores, score_entropy
from fewstep.models.decoder import Decoder
from fewstep.training.objectives.masking import mask_token_of, predicting, scored
from fewstep.training.objectives.stateless import Stateless


@final
class ScoreEntropyConfig(Config):
    """Denoising score entropy at times spread evenly over [`least`, 1], one a row."""

    kind: ClassVar[str] = "score_entropy"
    source: ClassVar[str] = "Lou et al. 2024, arXiv 2310.16834, equation 10"
    claims: ClassVar[tuple[str, ...]] = ("diffusion-order",)

    corruption: choice(lambda: CORRUPTIONS, "corruption") = AbsorbingConfig()  # type: ignore[valid-type]
    least: float = Field(default=1e-3, gt=0, lt=1)

    def build(self) -> "ScoreEntropy":
        return ScoreEntropy(self)


@final
class ScoreEntropy(Stateless):
    """Raises ValueError for absorption without a mask token, or a mixer that only looks back. Cost: one pass, all in float64.

    Differs: a model that is not `noisy` is not told the time; under absorption nothing is lost by that (arXiv 2406.03736).
    """

    name = ScoreEntropyConfig.kind

    def __init__(self, config: ScoreEntropyConfig) -> None:
        self.config = config

    def nats(self, model: nn.Module, batch: Batch, rng: Rng) -> Tensor:
        """[B,T]: what each token adds to the bound of its row's -ln p, in nats."""
        decoder, real, config = cast(Decoder, model), scored(batch), cast(CorruptionConfig, self.config.corruption)
        corruption = config.build(decoder.vocab, decoder.mask_token, batch.tokens.device)
        if absorber(corruption) is not None:
            mask_token_of(decoder, batch, self.name)
        t = self.config.least + (1 - self.config.least) * spread_times(rng)
        x_t = corruption.corrupt(batch.tokens, t, rng).where(real, batch.tokens)
        noise = (1 - corruption.keep(t)).unsqueeze(1).expand(x_t.shape) if decoder.noisy else None
        encoded = decoder(x_t, batch.segments, mask=Full(), noise=noise)
        logits = decoder.unembed(predicting(decoder, encoded.final, batch))
        log_score = log_scores(corruption, x_t, logits, t, decoder.mask_token)
        return score_entropy(corruption, x_t, batch.tokens, log_score, t) * real

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        units = int(scored(batch).sum())
        value = self.nats(model, batch, rng).sum() / max(units, 1)
        return Loss(value, units, {"bound": value.detach()})


def spread_times(rng: Rng) -> Tensor:
    """[B] uniform numbers of [0, 1), spread evenly over the batch, each still uniform."""
    own = rng.split("level").uniform()
    place = own.new_ones(len(own)).cumsum(0) - 1
    return (rng.split("shift").uniform()[0] + (place + own) / len(own)) % 1
