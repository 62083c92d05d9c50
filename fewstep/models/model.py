"""A model as users hold it: network, tokenizer and the recipe that made it, in one directory.

A directory holds `recipe.json`, `weights.safetensors` and `tokenizer.json`. This file knows the formats of no other library.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, final

import torch
from torch import Tensor

from fewstep.core.recipe import Config, resolve
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.models.weights import load_into, read_json, shards, state_of, tensors, write
from fewstep.text.tokenizer import Tokenizer

MODELS: Mapping[str, type[Config]] = MappingProxyType({DecoderConfig.kind: DecoderConfig})

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
)


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype of `name`. Raises ValueError for one that weights cannot have."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: not known; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


@final
class Model:
    """`network` with its `tokenizer` (None: token ids only) and `recipe` (plain values by section; {} when unknown)."""

    def __init__(self, network: Decoder, tokenizer: Tokenizer | None, recipe: Mapping[str, Any] | None = None) -> None:
        if tokenizer is not None and tokenizer.vocab > network.vocab:
            raise ValueError(
                f"tokenizer vocab={tokenizer.vocab}: larger than the model's vocab={network.vocab}; use the tokenizer it was trained with"
            )
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.recipe: dict[str, Any] = {**(recipe or {}), "model": network.config.model_dump(mode="json")}

    @property
    def device(self) -> torch.device:
        return self.network.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.embedding.weight.dtype

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """ids [B,T] int64 -> [B,T,V]: the law of the token after each position, unnormalised."""
        return self.network.unembed(self.network(ids.to(self.device)).final)

    @classmethod
    def load(cls, directory: Path | str, device: torch.device | str = "cpu", dtype: str | torch.dtype = "float32") -> "Model":
        """Read a fewstep model directory. Raises ValueError for a missing, damaged or mismatched file."""
        directory = Path(directory)
        recipe = read_json(directory / "recipe.json")
        if "model" not in recipe:
            raise ValueError(f"{directory / 'recipe.json'}: no section 'model'; this is not a model's recipe")
        config = cast(DecoderConfig, resolve(recipe["model"], MODELS, "model"))
        with torch.device("meta"):
            network = config.build()
        network = network.to_empty(device=device).to(dtype_of(dtype))
        if config.tied:
            network.head.weight = network.embedding.weight  # to_empty made two tensors of the one
        load_into(network, dict(tensors(shards(directory))), str(directory))
        path = directory / "tokenizer.json"
        return cls(network, Tokenizer.load(path) if path.is_file() else None, recipe)

    def save(self, directory: Path | str, dtype: str | torch.dtype | None = None) -> None:
        """Write the model directory, its weights as `dtype` (None: as they are)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write(directory / "weights.safetensors", state_of(self.network, None if dtype is None else dtype_of(dtype)))
        (directory / "recipe.json").write_text(json.dumps(self.recipe, indent=2), encoding="utf-8")
        if self.tokenizer is not None:
            self.tokenizer.save(directory)
