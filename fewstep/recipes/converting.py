"""Diffusion trained from a finished autoregressive model: what a run takes from it, and the mask token that it gets.

This file knows no objective: whichever a recipe names goes on from the weights that were found.
"""

from typing import ClassVar, cast, final

import torch
from torch import Tensor

from fewstep.core.recipe import Config, Recipe, parse
from fewstep.hub.load import load
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.models.model import Model
from fewstep.training.data import TargetTokenizerConfig


@final
class ConvertedConfig(Config):
    """The finished decoder `start`, a shipped name, a directory or a hub id, trained on as a decoder with a mask token.

    What is saved is a decoder, which needs no other. Heads are left behind: they served another trunk. `shifted`: a masked token
    goes on to be predicted by the output before it, as the next token was; else by its own, which is to be learnt anew. A start
    that knows masks already keeps to its own way.
    """

    kind: ClassVar[str] = "converted"
    source: ClassVar[str] = "Gong et al. 2024, arXiv 2410.17891 (DiffuLLaMA); Fast-dLLM v2, arXiv 2509.26328"

    start: str = "code-nano"
    shifted: bool = True

    def build(self, device: str = "cpu") -> Model:
        """The model as it begins. Raises ValueError if there is none, or it has no tokenizer."""
        model = load(self.start, device, packed=False)
        if model.tokenizer is None:
            raise ValueError(f"model.start={self.start!r}: has no tokenizer to read text with; add its tokenizer.json")
        return Model(masked(model.network, self.shifted), model.tokenizer, model.recipe, chat=model.chat, settings=model.settings)


def open_start(recipe: Recipe, device: str) -> Model | None:
    """The model that a recipe goes on from; None for a recipe that begins anew. Raises ValueError for another tokenizer."""
    config, tokenizer = recipe["model"], recipe["tokenizer"]
    if not isinstance(config, ConvertedConfig):
        return None
    if not isinstance(tokenizer, TargetTokenizerConfig):
        raise ValueError(f"tokenizer={tokenizer.kind!r}: a converted model speaks the tokens it knows; set tokenizer='target'")
    return config.build(device)


def described(recipe: Recipe, network: Decoder) -> Recipe:
    """`recipe` with the decoder that it comes to as its model, so that what is saved needs no other."""
    return recipe.model_copy(update={"sections": {**recipe.sections, "model": network.config}})


@torch.no_grad()
def masked(network: Decoder, shifted: bool = True) -> Decoder:
    """`network` without heads and with a mask token: its own, or a new last id that begins as the mean of all others."""
    own, weights = network.config, dict(network.state_dict())
    update: dict[str, object] = {"heads": ()}
    if own.mask_token is None:
        update |= {"vocab": own.vocab + 1, "mask_token": own.vocab, "shifted": shifted}
        for name in ("embedding.weight", "head.weight"):
            weights[name] = torch.cat([weights[name], cast(Tensor, weights[name]).mean(0, keepdim=True)])
    made = parse(DecoderConfig, {**dict(own), **update}).build().to(network.embedding.weight)
    made.load_state_dict({name: weights[name] for name in made.state_dict()})
    return made
