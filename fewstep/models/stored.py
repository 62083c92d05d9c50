"""Models without words on disk: a directory with the recipe and the weights. This file knows no model by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fewstep.core.recipe import Config, resolve
from fewstep.models.weights import check, distinct, fill, headers, read_json, shards, write, write_texts


def store(network: nn.Module, config: Config, directory: Path | str) -> None:
    """Write the model directory of a network built from `config`. Raises ValueError when the disk refuses."""
    directory = Path(directory)
    write(directory / "weights.safetensors", distinct(network.state_dict(keep_vars=True)))
    write_texts(directory, {"recipe.json": json.dumps({"model": config.model_dump(mode="json")}, indent=2)})


def restore(directory: Path | str, kinds: Mapping[str, type[Config]], device: torch.device | str) -> nn.Module:
    """Read what `store` or a run wrote, of one of `kinds`. Raises ValueError for a missing, damaged or mismatched file."""
    directory = Path(directory)
    config = resolve(read_json(directory / "recipe.json").get("model"), kinds, "model")
    network, stored = cast(Any, config).build(), headers(shards(directory))
    check(network.state_dict(keep_vars=True), stored, str(directory))
    fill(network.state_dict(keep_vars=True), stored)
    restored: nn.Module = network.to(device).eval()
    return restored
