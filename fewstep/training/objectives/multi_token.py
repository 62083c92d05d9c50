"""Prediction beyond the next token: the extra heads of a decoder learn the tokens after it, with the trunk or on top of it.

One objective serves every kind of heads that a text alone can teach: their configs say how depths are weighted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, log_softmax

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.models.decoder import Decoder, Encoded
from fewstep.nn.heads import ParallelHeads, SequentialHeads
from fewstep.nn.medusa import FreeHeads
from fewstep.training.objectives.ahead import HeadsObjectiveConfig
from fewstep.training.objectives.next_token import IGNORED, labels, token_loss

AheadHeads = SequentialHeads | ParallelHeads | FreeHeads
Weights = Callable[[int], Sequence[float]]


@final
class MultiTokenConfig(HeadsObjectiveConfig):
    """Next token plus `weight` times the mean loss of the extra heads; `trunk` frozen trains the heads alone."""

    kind: ClassVar[str] = "mtp"
    source: ClassVar[str] = "Gloeckle et al. 2024, arXiv 2404.19737 (parallel); DeepSeek-V3, arXiv 2412.19437 (sequential)"
    claims: ClassVar[tuple[str, ...]] = ("mtp",)
    drafter: ClassVar[str] = "mtp"

    weight: float = Field(default=0.3, gt=0)
    trunk: Literal["frozen", "joint"] = "joint"

    def build(self) -> "MultiToken":
        return MultiToken(self, lambda depth: [self.weight / depth] * depth)


class _DecayingConfig(HeadsObjectiveConfig):
    """Head k weighs `decay`**k. With a `joint` trunk its next-token loss joins them, and `weight` scales theirs; the trunk is
    still left as it is for the first `warmup` steps. `distil`: heads learn the target's law of their token, not the token itself.
    """

    decay: float = Field(default=0.8, gt=0, le=1)
    weight: float = Field(default=0.2, gt=0)
    warmup: int = Field(default=200, ge=0)
    distil: bool = False

    def build(self) -> "MultiToken":
        scale = self.weight if self.trunk == "joint" else 1.0
        warmup = self.warmup if self.trunk == "joint" else 0
        return MultiToken(self, lambda depth: [scale * self.decay**k for k in range(1, depth + 1)], warmup, self.distil)


@final
class MedusaConfig(_DecayingConfig):
    """Medusa-1 on a frozen trunk, Medusa-2 with a joint one."""

    kind: ClassVar[str] = "medusa"
    source: ClassVar[str] = "Cai et al. 2024, arXiv 2401.10774, section 2.2"
    drafter: ClassVar[str] = "medusa"


@final
class HydraConfig(_DecayingConfig):
    """Hydra heads, taught with the text's own tokens before the one they predict; the trunk is frozen in the paper."""

    kind: ClassVar[str] = "hydra"
    source: ClassVar[str] = "Ankner et al. 2024, arXiv 2402.05109, section 3"
    drafter: ClassVar[str] = "hydra"


@final
class MultiToken:
    """L = L_1 + sum_k w_k L_{1+k}, all of them sums over the tokens scored divided by the number scored for L_1.

    A frozen trunk leaves L_1 out. The metrics are means over the tokens that each head scores, a few less per segment. Raises
    ValueError for a model without such heads. Cost: the trunk's pass plus one pass and one unembedding per head.
    Source: with w_k = weight / D arXiv 2412.19437 eq. 24-25, and eq. 2 of arXiv 2404.19737 where weight = D; with w_k = decay^k
    arXiv 2401.10774, section 2.2.
    """

    def __init__(self, config: HeadsObjectiveConfig, weights: Weights, warmup: int = 0, distil: bool = False) -> None:
        """`weights`: from the number of heads to the weight of each; `warmup`: the steps before a joint trunk is trained."""
        self.config, self._weights, self._warmup, self._distil = config, weights, warmup, distil
        self._steps = 0

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        decoder = cast(Decoder, model)
        heads = self._heads(decoder)
        frozen = self._frozen
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            encoded = decoder(batch.tokens, batch.segments, taps=(heads.tap,))
            logits = decoder.unembed(encoded.final)
            value, accuracy, units = token_loss(logits[:, :-1], labels(batch, 1))
        metrics = {"next_token": value.detach(), "accuracy": accuracy}
        extra = self._extra(decoder, heads, encoded, batch, logits.detach(), metrics) / units.clamp(min=1)
        return Loss(extra if frozen else value + extra, int(units), metrics)

    def foresee(self, model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        decoder = cast(Decoder, model)
        heads = self._heads(decoder)
        return self._predictions(decoder, heads, decoder(batch.tokens, batch.segments, taps=(heads.tap,)), batch)

    def after_step(self, model: nn.Module) -> None:
        self._steps += 1

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Nothing to learn from it."""

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps} if self._warmup else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"objective state {sorted(state)}: {self.config.kind} keeps {sorted(self.state_dict()) or 'none'}; "
                "the checkpoint belongs to another objective"
            )
        self._steps = state.get("steps", 0)

    @property
    def _frozen(self) -> bool:
        return self.config.trunk == "frozen" or self._steps < self._warmup

    def _extra(
        self,
        decoder: Decoder,
        heads: AheadHeads,
        encoded: Encoded,
        batch: Batch,
        law: Tensor,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        """The weighted sum of the heads' summed cross-entropies; their means join `metrics`. `law` [B,T,V]: target logits."""
        total = torch.zeros((), device=batch.tokens.device)
        name = self.config.kind
        for k, logits in enumerate(self._predictions(decoder, heads, encoded, batch), 1):
            wanted = labels(batch, k + 1)
            value, accuracy, units = token_loss(logits[:, :-1], wanted)
            metrics |= {f"{name}_{k}": value.detach(), f"{name}_{k}_accuracy": accuracy}
            if self._distil:
                value = _cross_entropy(logits[:, :-1], law[:, k:-1], wanted)
            total = total + self._weights(heads.depth)[k - 1] * value * units
        return total

    def _predictions(self, decoder: Decoder, heads: AheadHeads, encoded: Encoded, batch: Batch) -> Iterator[Tensor]:
        outputs = heads(encoded.hidden[heads.tap], batch.tokens, self._embed(decoder), encoded.context)
        shared = self._shared(decoder.head.weight)
        for k, h in enumerate(outputs, 1):
            yield heads.unembed(k, h, lambda x: linear(x, shared)) if isinstance(heads, FreeHeads) else linear(h, shared)

    def _shared(self, weight: Tensor) -> Tensor:
        return weight.detach() if self._frozen else weight

    def _embed(self, decoder: Decoder) -> Any:
        return lambda tokens: embedding(tokens, self._shared(decoder.embedding.weight))

    def _heads(self, decoder: Decoder) -> AheadHeads:
        heads = decoder.heads.get(self.config.drafter)
        if not isinstance(heads, AheadHeads):
            known = "['mtp_sequential'] or ['mtp_parallel']" if self.config.drafter == "mtp" else f"['{self.config.drafter}']"
            raise ValueError(f"objective={self.config.kind}: the model has no such extra heads; set model.heads={known}")
        return heads


def _cross_entropy(logits: Tensor, law: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the tokens scored of -sum_x p(x) log q(x), with p of the logits `law` and q of `logits`."""
    scored = wanted != IGNORED
    precise = torch.promote_types(logits.dtype, torch.float32)
    terms = -(law.to(precise).softmax(-1) * log_softmax(logits.to(precise), -1)).sum(-1)
    return torch.where(scored, terms, 0.0).sum() / scored.sum().clamp(min=1)
