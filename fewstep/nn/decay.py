"""Linear recurrences whose state decays by one factor a head: S_t = a_t S_{t-1} + k_t v_t', y_t = q_t S_t, over chains and trees.

Decays enter as logarithms and leave as exponentials of differences along a path, never as quotients. This file knows no mixer.
"""

import torch
from torch import Tensor

from fewstep.nn.recurrent import Links


def read(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, carry: Tensor, links: Links) -> Tensor:
    """[B,T,H,E] what the queries find.

    Args:
        q, k: [B,T,H,D].
        v: [B,T,H,E].
        log_a: [B,T,H], at most 0; None: nothing decays.
        carry: [B,H,D,E], the state before.
        links: how the tokens hang together.

    Cost: T^2 H (D + E) + T H D E. Source: Katharopoulos et al. 2020, arXiv 2006.16236; chunks: Sun et al. 2023, arXiv 2307.08621;
    the tree form replaces the causal mask by that of ancestors and lets the decay run along the path.
    """
    sees = links.sees.unsqueeze(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT
    before = q * (~links.fresh)[:, None, :, None]
    if log_a is None:
        scores = scores * sees
    else:
        total = along(log_a, links).transpose(1, 2).unsqueeze(-1)
        scores = scores * (total - total.mT).masked_fill(~sees, -torch.inf).exp()
        before = before * total.exp()
    return (scores @ v + before @ carry).transpose(1, 2)


def along(x: Tensor, links: Links) -> Tensor:
    """[B,T,...] the sums of x [B,T,...] over each token and its ancestors."""
    return (links.sees.to(x.dtype) @ x.flatten(2)).view(x.shape)


def advance(k: Tensor, v: Tensor, log_a: Tensor | None, carry: Tensor, real: Tensor) -> Tensor:
    """The state [B,H,D,E] after a chain of tokens, of which the `real` [B,T] are there. Cost: T H D E."""
    k = k * real[:, :, None, None]
    if log_a is not None:
        log_a = log_a * real.unsqueeze(-1)
        rest = log_a.sum(1, keepdim=True) - log_a.cumsum(1)
        k, carry = k * rest.exp().unsqueeze(-1), carry * log_a.sum(1)[:, :, None, None].exp()
    return carry + k.permute(0, 2, 3, 1) @ v.transpose(1, 2)
