"""Block verification: a drafted chain judged as a whole, which keeps at least as many tokens as judging it token by token.

This file knows neither drafters nor models: only a chain, how its nodes came about (`q`), and the target's laws.
"""

import torch
from torch import Tensor

from fewstep.core.draft import Verdict
from fewstep.core.mixer import Tree
from fewstep.core.random import Rng
from fewstep.decode.verify import draw, verify


def verify_block(tree: Tree, p: Tensor, rng: Rng) -> Verdict:
    """The accepted beginning of a chain and the token that follows it; arguments and verdict are those of `verify`.

    Node i is kept if it or a later node passes: node n with the row's uniform number n and the probability that `passing` gives
    it, `next` drawn with number 0. A chosen node is one drawn from a point mass. A row may have padding at its end; where it
    ends may depend on the tokens before that place, as a drafter's stop does. Greedy verdicts are those of `verify`.
    Raises ValueError for a tree that is no chain. Cost: three passes over [B,N,V].
    Source: Sun et al. 2024, arXiv 2403.10444, algorithm 2: what is emitted has the target's law, and no other verification of
    the same chain that has keeps more tokens in expectation.
    """
    order = torch.arange(tree.size, device=tree.tokens.device)
    valid = tree.parent == order - 1
    if not bool((valid | (tree.parent == -2)).all()) or bool((valid[:, 1:] & ~valid[:, :-1]).any()):
        raise ValueError(
            "tree.parent: branches; block verification takes chains with padding at their end: draft a chain, or judge trees "
            "with verification='token'"
        )
    if not p.is_floating_point() or tree.size == 1:
        return verify(tree, p, rng)
    pass_at, rest = passing(tree, p.double())
    uniform = rng.uniform(tree.size)
    passed = (uniform < pass_at) & valid
    passed[:, 0] = True
    last = torch.where(passed, order, 0).amax(1)
    law = rest[torch.arange(tree.batch, device=order.device), last]
    return Verdict(order.expand_as(tree.tokens), last + 1, draw(law, uniform[:, 0]))


def passing(tree: Tree, p: Tensor) -> tuple[Tensor, Tensor]:
    """The probability [B,N] that a node of a chain passes, and the law [B,N,V], not normalised, of `next` if it is the last to.

    With w_i = min(1, w_{i-1} p(x_i) / q(x_i)), w_0 = 1, and r_i = max(0, w_i p - q) over the tokens that may follow node i, the
    law is r_i and the probability |r_i| / (|r_i| + 1 - w_i); after the last node they are p and w_i.
    """
    valid = tree.valid
    q = torch.zeros_like(p) if tree.q is None else tree.q.double()
    token = tree.tokens.unsqueeze(-1)
    q = torch.where(q.sum(-1, keepdim=True) > 0, q, torch.zeros_like(q).scatter_(-1, token, 1.0))[:, 1:]
    chosen = token[:, 1:]
    ratio = (p[:, :-1].gather(-1, chosen) / q.gather(-1, chosen)).squeeze(-1)
    # min(1, .) along the chain keeps the distance of the sum of log ratios to its highest point so far
    walk = torch.cat([torch.zeros_like(ratio[:, :1]), ratio.log().cumsum(1)], 1)
    weight = (walk - walk.cummax(1).values).exp()
    ahead = (weight[:, :-1, None] * p[:, :-1] - q).clamp_(min=0)
    goes_on = torch.cat([valid[:, 1:], torch.zeros_like(valid[:, :1])], 1)
    rest = torch.where(goes_on.unsqueeze(-1), torch.cat([ahead, p[:, -1:]], 1), p)
    mass = rest.sum(-1)
    # w = 1 and nothing left: p and q agree there, a later node passes with certainty and this is never the last
    share = mass / (mass + (1 - weight)).clamp(min=torch.finfo(mass.dtype).tiny)
    return torch.where(goes_on, share, weight), rest
