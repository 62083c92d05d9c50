"""The dense form of each mask, for the parallel form of attention and for tests. This file knows no mixer."""

import torch
from torch import Tensor

from fewstep.core.mixer import Blocks, Causal, Dense, Doubled, Full, Prefix, Window


def allowed(mask: object, count: int, segments: Tensor | None, device: torch.device) -> Tensor:
    """[1 or B,1,T,T] bool: True where a query (row) may see a key (column) of `count` tokens.

    Tokens of different `segments` [B,T] never see each other; padding (-1) sees itself alone, so that no row is empty.
    """
    index = torch.arange(count, device=device)
    dense = _dense(mask, index)[:, None]
    if segments is not None:
        same = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
        dense = (dense & same[:, None]) | torch.eye(count, dtype=torch.bool, device=device)
    return dense


def _dense(mask: object, index: Tensor) -> Tensor:
    query, key = index[:, None], index[None, :]
    match mask:
        case Causal():
            return (key <= query)[None]
        case Window(size):
            return ((key <= query) & (query - key < size))[None]
        case Full():
            return torch.ones_like(key <= query)[None]
        case Blocks(size):
            return (key // size <= query // size)[None]
        case Doubled(size):
            half = len(index) // 2
            clean_q, clean_k = query >= half, key >= half
            block_q, block_k = (query % half) // size, (key % half) // size
            own = (block_q == block_k) & (clean_q == clean_k)
            return (own | (clean_k & ((block_k < block_q) | (clean_q & (block_k <= block_q)))))[None]
        case Prefix(length):
            return (key <= query)[None] | (key[None] < length[:, None, None])
        case Dense(dense):
            return dense
    raise ValueError(f"mask={mask!r}: not a mask; choose one of core.mixer.Mask")
