"""Hugging Face model directories: config.json, sharded safetensors, tokenizer files.

Nothing in them is run: no pickle is read and code that `auto_map` names is ignored. This file knows no family: families are data.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewstep.core.recipe import parse
from fewstep.hub.families import family_of, read_config
from fewstep.hub.names import family_names
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model, assemble, beside
from fewstep.models.weights import headers, read_json, shards

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
# Heads have a key and a file that others pass over, in a folder of its own, for some readers take every file they find.
HEADS_KEY, HEADS_FILE = "fewstep_heads", "fewstep/heads.safetensors"


def read_hf(directory: Path, name: str, device: torch.device | str = "cpu", dtype: str | torch.dtype = "float32") -> Model:
    """The model in a Hugging Face `directory`, called `name`. Its recipe keeps config.json, so that `save_hf` loses nothing.

    Cost: the memory of the model and the pages of one shard. Raises ValueError for an unknown architecture, a config, tokenizer
    or weights that do not fit together, a damaged or missing file; nothing is half loaded.
    """
    values = read_json(directory / CONFIG)
    heads = values.pop(HEADS_KEY, [])
    try:
        family = family_of(values)
        config = read_config(family, values)
        if heads:
            config = parse(DecoderConfig, {**dict(config), "heads": heads})
        recipe = {"name": name, "origin": {"config": values}, **_generation(directory, values)}
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from None
    tokenizer, chat, settings = beside(directory, config.vocab)
    files = [*shards(directory, (WEIGHTS,)), *([directory / HEADS_FILE] if heads else [])]
    stored = {key: header for key, header in headers(files).items() if not key.endswith(family.computed)}
    named = partial(family_names, family=family)
    network = assemble(config, stored, str(directory), device=device, dtype=dtype, named=named)
    return Model(network, tokenizer, recipe, chat=chat, settings=settings)


def _generation(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's section of that name: the ids that end a text, which may be several; {} where only the tokenizer says."""
    file = directory / GENERATION
    for values in (read_json(file) if file.is_file() else {}, config):
        match values.get("eos_token_id"):
            case int(token):
                return {"generation": {"eos_ids": [token]}}
            case [*tokens] if tokens and all(isinstance(token, int) for token in tokens):
                return {"generation": {"eos_ids": tokens}}
            case None:
                continue
            case other:
                raise ValueError(f"eos_token_id={other!r}: expected a token id or a list of them")
    return {}
