"""Laws over a finite vocabulary: drawing from them, and making them sharper. This file knows no diffusion."""

import torch
from torch import Tensor


def draw(law: Tensor, uniform: Tensor) -> Tensor:
    """The token [...] whose share of [0, 1) holds `uniform` [...], under weights `law` [...,V], float64, of any positive sum.

    A token of weight 0 is never drawn. Cost: a cumulative sum over the vocabulary.
    """
    cumulative = law.cumsum(-1)
    found = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * cumulative[..., -1:], right=True)
    return found.squeeze(-1).clamp(max=law.shape[-1] - 1)


def sharpened(law: Tensor, temperature: float, top_p: float) -> Tensor:
    """`law` [...,V] raised to 1 / `temperature` (0: the most probable token, ties to the lowest), then cut to its nucleus.

    The nucleus is the fewest most probable tokens whose mass reaches `top_p`. Source: Holtzman et al. 2020, arXiv 1904.09751.
    """
    if temperature == 0:
        return torch.zeros_like(law).scatter_(-1, law.argmax(-1, keepdim=True), 1.0)
    if temperature != 1:
        law = (law / law.amax(-1, keepdim=True)) ** (1 / temperature)
        law = law / law.sum(-1, keepdim=True)
    if top_p < 1:
        ranked, order = law.sort(dim=-1, descending=True, stable=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
        law = torch.zeros_like(law).scatter_(-1, order, ranked)
        law = law / law.sum(-1, keepdim=True)
    return law


def entropy(law: Tensor) -> Tensor:
    """[...] in nats, of laws [...,V]."""
    return torch.special.entr(law).sum(-1)
