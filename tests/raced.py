"""A model small enough to race in a test: random weights, byte-level tokens, sequential heads, a recipe with data of its own."""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model
from fewstep.nn.heads import SequentialHeadsConfig
from fewstep.report.prompts import Prompt
from fewstep.training.data.bpe import BPEConfig


def source(name: str, lines: int) -> str:
    """Text whose lines differ from file to file, so that no two files count as near-duplicates."""
    return "".join(f"def {name}_{i}(x_{name}):\n    return x_{name} * {i * i}\n" for i in range(lines))


def files(directory: Path, count: int = 12, lines: int = 120) -> Path:
    """A folder of text files to train on and hold out from."""
    directory.mkdir()
    for i in range(count):
        name = "abcdefghijklmnop"[i] * (i + 2)
        (directory / f"{name}.txt").write_text(source(name, lines), encoding="utf-8")
    return directory


def small_model(data: Path | None = None, heads: bool = True) -> Model:
    """Random weights from torch's generator, drawn wide enough that the most likely token changes from place to place."""
    tokenizer = BPEConfig(vocab=300).build([source("train", 40)])
    own = (SequentialHeadsConfig(depth=3),) if heads else ()
    config = DecoderConfig(vocab=300, width=32, depth=2, query_heads=2, hidden=48, heads=own, init_std=0.3, max_positions=512)
    recipe = {} if data is None else {"data": {"kind": "text", "paths": [str(data)], "held_out": 0.2}}
    return Model(config.build(), tokenizer, recipe)


def near_draft(model: Model) -> Model:
    """A draft model that often agrees with `model`: the same trunk, its weights disturbed."""
    draft = small_model(heads=False)
    own = draft.network.state_dict()
    draft.network.load_state_dict({name: value for name, value in model.network.state_dict().items() if name in own})
    with torch.no_grad():
        for parameter in draft.network.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0.0
    return draft


def prompts(count: int = 3) -> list[Prompt]:
    return [Prompt(f"file_{i}.py:1", source(f"p{i}", 2), "") for i in range(count)]
