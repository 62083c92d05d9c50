"""Multi-token prediction: the extra heads of a decoder learn the tokens beyond the next one, with the trunk or on top of it."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.models.decoder import Decoder, Encoded
from fewstep.nn.heads import ParallelHeads, SequentialHeads
from fewstep.training.objectives.next_token import labels, token_loss


@final
class MultiTokenConfig(Config):
    """Next token plus `weight` times the mean loss of the extra heads; `trunk` frozen trains the heads alone."""

    kind: ClassVar[str] = "mtp"
    source: ClassVar[str] = "Gloeckle et al. 2024, arXiv 2404.19737 (parallel); DeepSeek-V3, arXiv 2412.19437 (sequential)"
    claims: ClassVar[tuple[str, ...]] = ("mtp",)

    weight: float = Field(default=0.3, gt=0)
    trunk: Literal["joint", "frozen"] = "joint"

    def build(self) -> "MultiToken":
        return MultiToken(self)


@final
class MultiToken:
    """L = L_1 + (weight / D) sum_k L_{1+k}, all of them sums over the tokens scored divided by the number scored for L_1.

    Source: arXiv 2412.19437 eq. 24-25. With parallel heads and weight = D it is eq. 2 of arXiv 2404.19737. The metrics are means
    over the tokens that each head scores, a few less per segment. Cost: the trunk's pass plus one block and one unembedding per
    head. Raises ValueError for a model without extra heads.
    """

    def __init__(self, config: MultiTokenConfig) -> None:
        self.config = config

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        decoder = cast(Decoder, model)
        heads = _heads(decoder)
        frozen = self.config.trunk == "frozen"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            encoded = decoder(batch.tokens, batch.segments, taps=(heads.tap,))
            value, accuracy, units = token_loss(decoder.unembed(encoded.final[:, :-1]), labels(batch, 1))
        metrics = {"next_token": value.detach(), "accuracy": accuracy}
        extra = self._extra(decoder, heads, encoded, batch, metrics) / units.clamp(min=1)
        total = self.config.weight / heads.depth * extra
        return Loss(total if frozen else value + total, int(units), metrics)

    def _extra(
        self, decoder: Decoder, heads: SequentialHeads | ParallelHeads, encoded: Encoded, batch: Batch, metrics: dict[str, Tensor]
    ) -> Tensor:
        """The summed cross-entropy of every head; its means join `metrics`."""
        outputs = heads(encoded.hidden[heads.tap], batch.tokens, self._embed(decoder), encoded.context)
        total = torch.zeros((), device=batch.tokens.device)
        for k, h in enumerate(outputs, 1):
            logits = torch.nn.functional.linear(h, self._shared(decoder.head.weight))
            value, accuracy, units = token_loss(logits[:, :-1], labels(batch, k + 1))
            metrics |= {f"mtp_{k}": value.detach(), f"mtp_{k}_accuracy": accuracy}
            total = total + value * units
        return total

    def _shared(self, weight: Tensor) -> Tensor:
        return weight.detach() if self.config.trunk == "frozen" else weight

    def _embed(self, decoder: Decoder) -> Any:
        return lambda tokens: torch.nn.functional.embedding(tokens, self._shared(decoder.embedding.weight))

    def after_step(self, model: nn.Module) -> None:
        """Nothing to do."""

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Nothing to learn from it."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"objective state {sorted(state)}: mtp keeps none; the checkpoint belongs to another objective")


def _heads(decoder: Decoder) -> SequentialHeads | ParallelHeads:
    heads = decoder.heads.get("mtp")
    if not isinstance(heads, SequentialHeads | ParallelHeads):
        raise ValueError("objective=mtp: the model has no extra heads; set model.heads=['mtp_sequential'] or ['mtp_parallel']")
    return heads
