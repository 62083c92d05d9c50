"""LayerSkip: a decoder learns to predict from every depth, so that its first blocks can draft for the whole of it."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.models.decoder import Decoder
from fewstep.training.objectives.next_token import labels, token_loss


@final
class LayerSkipConfig(Config):
    """Next token from all depths, with blocks dropped at random, deeper ones more often.

    `dropout`: the probability p_max of the last block, sample by sample. `scale`: e_scale, the weight of early exits beside the
    last layer's. `curriculum`: which early exits count at a step: every `every`-th, rotating; from the last downwards, one more
    each steps / (2 depth) steps; or all. `steps` [optimizer steps]: over these dropout grows from 0, and exits are added; 0:
    dropout is full from the start, as for a model that is trained already.
    """

    kind: ClassVar[str] = "layerskip"
    source: ClassVar[str] = "Elhoushi et al. 2024, LayerSkip, arXiv 2404.16710"

    dropout: float = Field(default=0.1, ge=0, lt=1)
    scale: float = Field(default=0.2, ge=0)
    curriculum: Literal["rotational", "gradual", "all"] = "rotational"
    every: int = Field(default=4, ge=1)
    steps: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _lasts(self) -> "LayerSkipConfig":
        if self.curriculum == "gradual" and not self.steps:
            raise ValueError("steps=0: a gradual curriculum needs a length; give the steps of the run, or use 'rotational'")
        return self

    def build(self) -> "LayerSkip":
        return LayerSkip(self)


@final
class LayerSkip:
    """L = sum_l w_l CE(unembed(norm(x_{l+1}))), w_l = C(t,l) e(l) / sum_i C(t,i) e(i), over the blocks l = 0 .. L-1.

    e(l) = e_scale l (l+1) / 2 below the last, e(L-1) = L - 1 + e_scale (L-2) (L-1) / 2; the last always counts. Block l leaves a
    sample as it is with probability p_max S(t) (exp(l ln 2 / (L-1)) - 1), where S(t) = exp(t ln 2 / (T-1)) - 1; in evaluation
    none does. Source: arXiv 2404.16710, sections 4.1 (dropout) and 4.2 (eq. 4-6, loss and curricula).
    The metrics are those of the last layer and `early_exit`, the mean loss of the early exits that counted.
    Cost: the trunk's pass and one unembedding per exit; a dropped block is computed all the same.
    Raises ValueError for a model of one block, and with recomputed activations, which would not drop the same blocks.
    """

    def __init__(self, config: LayerSkipConfig) -> None:
        self.config, self.step = config, 0

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        decoder = cast(Decoder, model)
        if decoder.depth < 2:
            raise ValueError(f"model.depth={decoder.depth}: no early exit from so few blocks; give it at least 2")
        weights = self.weights(decoder.depth)
        early = [layer for layer, weight in enumerate(weights[:-1]) if weight]
        with _dropping(decoder, self._kept(decoder, rng)):
            encoded = decoder(batch.tokens, batch.segments, taps=tuple(f"layer.{layer}" for layer in early))
        target = labels(batch, 1)
        value, accuracy, units = token_loss(decoder.unembed(encoded.final[:, :-1]), target)
        total, exits = weights[-1] * value, torch.zeros_like(value)
        for layer in early:
            h = decoder.norm(encoded.hidden[f"layer.{layer}"][:, :-1])
            here, _, _ = token_loss(decoder.unembed(h), target)
            total, exits = total + weights[layer] * here, exits + here.detach() / len(early)
        return Loss(total, int(units), {"next_token": value.detach(), "accuracy": accuracy, "early_exit": exits})

    def weights(self, depth: int) -> list[float]:
        """The weight of the exit after each block at this step; they sum to 1."""
        config, last = self.config, depth - 1
        scaled = [config.scale * layer * (layer + 1) / 2 for layer in range(last)]
        scaled.append(last + config.scale * (last - 1) * last / 2)
        counted = [weight if layer == last or self._counts(layer, depth) else 0.0 for layer, weight in enumerate(scaled)]
        return [weight / sum(counted) for weight in counted]

    def rates(self, depth: int) -> list[float]:
        """The probability that each block is dropped at this step."""
        time = min(1.0, self.step / max(1, self.config.steps - 1)) if self.config.steps else 1.0
        return [self.config.dropout * math.expm1(time * math.log(2)) * (2 ** (layer / (depth - 1)) - 1) for layer in range(depth)]

    def after_step(self, model: nn.Module) -> None:
        self.step += 1

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Nothing to learn from it."""

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"step"}:
            raise ValueError(
                f"objective state {sorted(state)}: layerskip keeps its step; the checkpoint belongs to another objective"
            )
        self.step = int(state["step"])

    def _counts(self, layer: int, depth: int) -> bool:
        config = self.config
        if config.curriculum == "rotational":
            return layer % config.every == self.step % config.every
        return config.curriculum == "all" or depth - 1 - layer <= self.step * 2 * depth // config.steps

    def _kept(self, decoder: Decoder, rng: Rng) -> Tensor | None:
        """[B,depth] whether a block changes a sample, None where all do."""
        if not decoder.training or not self.config.dropout:
            return None
        if decoder.recompute:
            raise ValueError("objective.dropout: recomputed activations would not drop the same blocks; set run.recompute=false")
        uniform = rng.split("layers").uniform(decoder.depth)
        return uniform >= torch.tensor(self.rates(decoder.depth), dtype=torch.float64, device=uniform.device)


@contextmanager
def _dropping(decoder: Decoder, kept: Tensor | None) -> Iterator[None]:
    """Within it, block l passes on the samples unchanged where `kept` [B,depth] is False in column l."""
    hooks = []
    for block, changed in zip(decoder.blocks, () if kept is None else kept.unbind(1), strict=kept is not None):
        hooks.append(block.register_forward_hook(_Skip(changed)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@final
class _Skip:
    """The hook of one block: its input where a sample skips it."""

    def __init__(self, changed: Tensor) -> None:
        self._changed = changed[:, None, None]

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return torch.where(self._changed, output[0], args[0]), output[1]
