"""Delta rules: what a key already recalls is taken back before its value is written, over chains and trees.

Gated: S_t = a_t (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t'. With what is really written, u_t = b_t (v_t - a_t S_{t-1}' k_t), this
is S_t = a_t S_{t-1} + k_t u_t': linear attention with one decay a head. The u of T tokens are the solution of one triangular
system, since a token's ancestors come before it, in a chain as in a tree. Generalised (`Moves`): what is looked up, what is put
in its place, and the decay of each key channel are the token's own. This file knows no mixer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.nn import decay, vector_decay
from fewstep.nn.recurrent import Links


class Writes(NamedTuple):
    """What tokens write: `k` [B,T,H,D] of length at most 1, `v` [B,T,H,E], `log_a` [B,T,H] at most 0, `b` [B,T,H] from 0 to 1."""

    k: Tensor
    v: Tensor
    log_a: Tensor
    b: Tensor


def read(q: Tensor, writes: Writes, carry: Tensor, links: Links) -> Tensor:
    """[B,T,H,E] what the queries [B,T,H,D] find in the state after their own token, `carry` [B,H,D,E] being the state before.

    Cost: T^2 H (2 D + E) + 2 T H D E and a triangular solve of T^2 H E / 2. Source: Yang et al. 2024, arXiv 2412.06464 (its
    chunks; the UT transform of arXiv 2406.06484); the tree form replaces the mask of strictly earlier tokens by that of strict
    ancestors.
    """
    return decay.read(q, writes.k, written(writes, carry, links), writes.log_a, carry, links)


def advance(writes: Writes, carry: Tensor, real: Tensor) -> Tensor:
    """The state [B,H,D,E] after a chain of tokens, of which the `real` [B,T] are there."""
    k, v, log_a, b = writes
    writes = Writes(k, v, log_a * real.unsqueeze(-1), b * real.unsqueeze(-1))
    return decay.advance(k, written(writes, carry, _chain(real)), writes.log_a, carry, real)


def written(writes: Writes, carry: Tensor, links: Links) -> Tensor:
    """[B,T,H,E] the values u, what the past of each token recalls for its key being subtracted."""
    k, v = writes.k.transpose(1, 2), writes.v.transpose(1, 2)
    b = writes.b.transpose(1, 2).unsqueeze(-1)
    total = decay.along(writes.log_a, links).transpose(1, 2).unsqueeze(-1)
    strict = links.sees & ~torch.eye(k.shape[2], dtype=torch.bool, device=k.device)
    overlap = (k @ k.mT) * (total - total.mT).masked_fill(~strict.unsqueeze(1), -torch.inf).exp()
    recalled = (k * total.exp() * (~links.fresh)[:, None, :, None]) @ carry
    u = torch.linalg.solve_triangular(b * overlap, b * (v - recalled), upper=False, unitriangular=True)
    return u.transpose(1, 2)


class Moves(NamedTuple):
    """What tokens do to a state whose key channels decay each on its own, all [B,T,H,D] but `v` [B,T,H,E].

    S_t = diag(exp(log_a_t)) S_{t-1} + b_t (c_t' S_{t-1}) + k_t v_t'.
    """

    c: Tensor
    b: Tensor
    k: Tensor
    v: Tensor
    log_a: Tensor


def read_moved(r: Tensor, moves: Moves, carry: Tensor, links: Links) -> Tensor:
    """[B,T,H,E] what the queries r [B,T,H,D] find in the state after their own token, `carry` [B,H,D,E] being the state before.

    Cost: T^2 H D exponentials, T^2 H (8 D + 3 E) + 2 T H D E and a triangular solve. Source: Peng et al. 2025, arXiv 2503.14456;
    the tree form as in `read`.
    """
    r, b, k, v, log_a = (x.transpose(1, 2) for x in (r, *moves[1:]))
    weights, before = vector_decay.gaps(moves.log_a, links)
    u = _found(moves, weights, before, carry)
    after = r * log_a.exp()  # the token's own decay, which ends before its own write
    own = torch.stack([(r * b).sum(-1), (r * k).sum(-1)])
    of_found, of_written = (
        vector_decay.overlaps(after, each, weights) + torch.diag_embed(self) for each, self in zip((b, k), own, strict=True)
    )
    return (of_found @ u + of_written @ v + (after * before) @ carry).transpose(1, 2)


def advance_moved(moves: Moves, carry: Tensor, real: Tensor) -> Tensor:
    """The state [B,H,D,E] after a chain of tokens, of which the `real` [B,T] are there."""
    mask = real[:, :, None, None]
    c, b, k, v, log_a = moves
    moves = Moves(c * mask, b * mask, k * mask, v, log_a * mask)
    weights, before = vector_decay.gaps(moves.log_a, _chain(real))
    u = _found(moves, weights, before, carry)
    rest, whole = vector_decay.remaining(log_a, real)
    b, k = ((x * rest).permute(0, 2, 3, 1) for x in (moves.b, moves.k))
    return carry * whole.unsqueeze(-1) + b @ u + k @ v.transpose(1, 2)


def _found(moves: Moves, weights: Tensor, before: Tensor, carry: Tensor) -> Tensor:
    """[B,H,T,E] c_t' S_{t-1}, what the past of each token holds under its c: the solution of a triangular system."""
    c, b, k, v, _ = (x.transpose(1, 2) for x in moves)
    known = vector_decay.overlaps(c, k, weights) @ v + (c * before) @ carry
    return torch.linalg.solve_triangular(-vector_decay.overlaps(c, b, weights), known, upper=False, unitriangular=True)


def _chain(real: Tensor) -> Links:
    """The links of tokens one after another, as many as `real` [B,T] has."""
    order = torch.arange(real.shape[1], device=real.device)
    sees = (order <= order[:, None]).expand(len(real), -1, -1)
    return Links((order - 1).expand_as(real), sees, torch.zeros_like(real), True)
