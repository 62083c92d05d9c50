"""A network's tensors under the names of others. This file knows what is fused here, tables what others call it."""

from typing import cast

import torch
from torch import Tensor, nn

from fewstep.hub.families import Family
from fewstep.models.decoder import Decoder
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
        for part, piece in zip(parts, pieces(network, module, tensor, len(parts)), strict=True):
            named[f"{part}.{leaf}"] = piece
    return named


def _parts(module: str, family: Family) -> list[str]:
    stack, _, rest = module.partition(".")
    layer, _, inner = rest.partition(".")
    return [part.format(layer=layer) for part in family.tensors[f"{stack}.{inner}" if inner else module]]


def pieces(network: nn.Module, module: str, tensor: Tensor, parts: int) -> list[Tensor]:
    """The rows of a `tensor` of `module` as `parts` views: queries, keys and values by their heads, everything else evenly."""
    if parts == 1:
        return [tensor]  # itself, so that a tied tensor stays recognisable
    shares = [1] * parts
    if module.endswith(".mixer.qkv"):
        mixer = cast(Attention, network.get_submodule(module.removesuffix(".qkv")))
        shares = [mixer.heads, mixer.kv_heads, mixer.kv_heads]
    unit = tensor.shape[0] // sum(shares)
    with torch.no_grad():
        return list(tensor.split([share * unit for share in shares]))
