"""A network's tensors under a family's names. This file knows what is fused here; what a family calls it stands in its table."""

from typing import cast

import torch
from torch import Tensor

from fewstep.hub.families import Family
from fewstep.models.decoder import Decoder
from fewstep.nn.blocks import Block
from fewstep.nn.mixers.attention import Attention

HEADS = "extra."
"""The prefix of the heads beside the trunk, which no family has a name for."""


def family_names(network: Decoder, family: Family) -> dict[str, Tensor]:
    """Every tensor of `network` by the name `family` stores it under; the parts of a fused one are views of its rows.

    Writing through a view fills the network, reading it saves it. Tied tensors are one tensor with two names; heads keep theirs.
    Cost: none, for views share the memory.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if name.startswith(HEADS):
            named[name] = tensor
            continue
        module, _, leaf = name.rpartition(".")
        parts = _parts(module, family)
        for part, piece in zip(parts, _split(tensor, _shares(network, module, len(parts))), strict=True):
            named[f"{part}.{leaf}"] = piece
    return named


def _parts(module: str, family: Family) -> list[str]:
    stack, _, rest = module.partition(".")
    layer, _, inner = rest.partition(".")
    return [part.format(layer=layer) for part in family.tensors[f"{stack}.{inner}" if inner else module]]


def _shares(network: Decoder, module: str, parts: int) -> list[int]:
    """How the rows of a fused tensor divide: queries, keys and values by their heads, everything else evenly."""
    if parts == 1 or not module.endswith(".mixer.qkv"):
        return [1] * parts
    block = cast(Block, network.blocks[int(module.split(".")[1])])
    mixer = cast(Attention, block.mixer)
    return [mixer.heads, mixer.kv_heads, mixer.kv_heads]


def _split(tensor: Tensor, shares: list[int]) -> list[Tensor]:
    if len(shares) == 1:
        return [tensor]  # itself, so that a tied tensor stays recognisable
    unit = tensor.shape[0] // sum(shares)
    with torch.no_grad():
        return list(tensor.split([share * unit for share in shares]))
