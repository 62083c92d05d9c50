"""Linear recurrences whose key channels decay each by a factor of its own: S_t = diag(a_t) S_{t-1} + k_t v_t', chains and trees.

The decay between two tokens differs from channel to channel, so a chunk holds T^2 D numbers and chunks are short; decays leave as
exponentials of differences along a path, never as quotients. This file knows no mixer.
"""

import torch
from torch import Tensor

from fewstep.nn.recurrent import Links


def gaps(log_a: Tensor, links: Links) -> tuple[Tensor, Tensor]:
    """What is left of a key, and of the carried state, just before a token: weights [B,H,T,T,D] and [B,H,T,D].

    `log_a` [B,T,H,D], at most 0. Entry [b,h,i,j] is the product of a over the tokens strictly between j and i, for strict
    ancestors j of i, else 0; the second product runs over all strict ancestors of i and is 0 where its path is fresh.
    """
    own = torch.eye(log_a.shape[1], dtype=torch.bool, device=log_a.device)
    strict = links.sees & ~own
    before, through = (_sums(mask, log_a).transpose(1, 2) for mask in (strict, links.sees))
    difference = before.unsqueeze(3) - through.unsqueeze(2)
    weights = difference.masked_fill(~strict[:, None, :, :, None], -torch.inf).exp()
    return weights, before.exp() * (~links.fresh)[:, None, :, None]


def overlaps(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """[B,H,T,T] q_i diag(weights_ij) k_j, for q and k [B,H,T,D]."""
    return ((weights * k.unsqueeze(2)) @ q.unsqueeze(-1)).squeeze(-1)


def read(r: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Tensor, carry: Tensor, links: Links) -> Tensor:
    """[B,T,H,E] r_t (S_{t-1} + diag(bonus) k_t v_t'): what queries find before their own token decays anything.

    Args:
        r, k, log_a: [B,T,H,D].
        v: [B,T,H,E].
        bonus: [H,D].
        carry: [B,H,D,E], the state before.
        links: how the tokens hang together.

    Cost: T^2 H D exponentials and T^2 H (2 D + E) + T H D E. Source: Peng et al. 2024, arXiv 2404.05892; the tree form
    replaces the mask of strictly earlier tokens by that of strict ancestors.
    """
    own = (r * bonus * k).sum(-1).transpose(1, 2)
    r, k, v = (x.transpose(1, 2) for x in (r, k, v))
    weights, before = gaps(log_a, links)
    scores = overlaps(r, k, weights) + torch.diag_embed(own)
    return (scores @ v + (r * before) @ carry).transpose(1, 2)


def remaining(log_a: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """What a chain of tokens leaves of its own keys [B,T,H,D] and of the state before it [B,H,D]; only the `real` decay it."""
    log_a = log_a * real[:, :, None, None]
    total = log_a.sum(1)
    return (total.unsqueeze(1) - log_a.cumsum(1)).exp(), total.exp()


def advance(k: Tensor, v: Tensor, log_a: Tensor, carry: Tensor, real: Tensor) -> Tensor:
    """The state [B,H,D,E] after a chain of tokens, of which the `real` [B,T] are there. Cost: T H D E."""
    rest, whole = remaining(log_a, real)
    k = k * rest * real[:, :, None, None]
    return carry * whole.unsqueeze(-1) + k.permute(0, 2, 3, 1) @ v.transpose(1, 2)


def _sums(mask: Tensor, x: Tensor) -> Tensor:
    """[B,T,...] the sums of x over the tokens that `mask` [B,T,T] names."""
    return (mask.to(x.dtype) @ x.flatten(2)).view(x.shape)
