"""The dense form of each mask, for the parallel form of attention and for tests. This file knows no mixer."""

import torch
from torch import Tensor

from fewstep.core.mixer import Blocks, Causal, Dense, Doubled, Full, Prefix, Window


def allowed(mask: object, count: int, segments: Tensor | None, device: torch.device) -> Tensor:
    """[1 or B,1,T,T] bool: True where a query (row) may see a key (column) of `count` tokens.

    Tokens of different `segments` [B,T] never see each other; padding (-1) sees itself alone, so that no row is empty. Blocks
    and prefixes count from the start of each segment.
    """
    index = torch.arange(count, device=device)
    if segments is None:
        return _dense(mask, index[None])[:, None]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
    own = torch.eye(count, dtype=torch.bool, device=device)
    return ((_dense(mask, places(segments)) & same) | own)[:, None]


def places(segments: Tensor) -> Tensor:
    """[B,T] the place of each token in its segment, from 0; a segment is a run of equal `segments` [B,T]."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def _dense(mask: object, place: Tensor) -> Tensor:
    """[1 or R,T,T] for tokens at the places [R,T] of their sequences."""
    index = torch.arange(place.shape[1], device=place.device)
    query, key = index[:, None], index[None, :]
    match mask:
        case Causal():
            return (key <= query)[None]
        case Window(size):
            return ((key <= query) & (query - key < size))[None]
        case Full():
            return torch.ones_like(key <= query)[None]
        case Blocks(size):
            block = place // size
            return block[:, None, :] <= block[:, :, None]
        case Doubled(size):
            half = len(index) // 2
            block = place % half // size
            block_q, block_k, clean_q, clean_k = block[:, :, None], block[:, None, :], query >= half, key >= half
            own = (block_q == block_k) & (clean_q == clean_k)
            return own | (clean_k & ((block_k < block_q) | (clean_q & (block_k <= block_q))))
        case Prefix(length):
            return (key <= query) | (place < length[:, None])[:, None, :]
        case Dense(dense):
            return dense
    raise ValueError(f"mask={type(mask).__name__}: not a mask; choose one of core.mixer.Mask")
