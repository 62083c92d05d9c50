"""A decoder small enough for loops and enumeration, with EAGLE's networks of both kinds."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.core.recipe import parse
from fewstep.models.decoder import Decoder, DecoderConfig

WIDTH, HEAD_WIDTH, QUERY_HEADS = 16, 8, 2


def eagle_model(seed: int, vocab: int = 11, draft_vocab: int | None = 7, **fields: Any) -> Decoder:
    """A random decoder in float64; no weight of its heads is neutral, and `draft_vocab` of its tokens, any, can be drafted."""
    values: dict[str, Any] = {
        "vocab": vocab,
        "width": WIDTH,
        "depth": 2,
        "query_heads": QUERY_HEADS,
        "hidden": 24,
        "mixers": [{"kind": "attention", "kv_heads": 1}],
        "heads": [{"kind": "eagle"}, {"kind": "eagle3", "layers": [0, 1, 2], "draft_vocab": draft_vocab}],
        "init_std": 0.3,
        **fields,
    }
    torch.manual_seed(seed)
    model = parse(DecoderConfig, values).build().double().eval()
    heads: Any = model.heads["eagle3"]
    heads.restrict(torch.randint(0, 99, (vocab,)), model.head.weight)
    with torch.no_grad():
        for parameter in model.extra.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def no_load(path: str) -> Any:
    raise AssertionError("heads need no second model")
