"""Verification: which drafted nodes to keep, so that what is emitted has exactly the target's law.

This file knows neither drafters nor models: only a tree, how its nodes came about (`q`), and the target's laws.
"""

import torch
from torch import Tensor

from fewstep.core.draft import Verdict
from fewstep.core.mixer import Tree
from fewstep.core.random import Rng


def verify(tree: Tree, p: Tensor, rng: Rng) -> Verdict:
    """The accepted path from node 0 and the token that follows it.

    `p` is the target's law after each node: [B,N,V], rows summing to 1, or int64 [B,N] when every law is a point mass (then
    `rng` is not asked). The children of the last accepted node are tried in index order against the residual r, p at first:
    a chosen node x is accepted with probability r(x) and otherwise leaves r with x removed; a drawn node is accepted with
    probability min(1, r(x) / q(x)) and otherwise leaves max(0, r - q); both renormalised. When no child is left, `next` is
    drawn from r. Node n uses the row's uniform number n and `next` number 0, so that padding changes nothing.

    Cost: one pass over [B,V] per node tried on the row that tries most.
    Source: Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318; siblings: Miao et al. 2023,
    arXiv 2305.09781, without replacement Jeon et al. 2024, arXiv 2402.14160.
    """
    if not p.is_floating_point():
        return _greedy(tree, p)
    uniform = rng.uniform(tree.size)
    if tree.size == 1:
        return Verdict(torch.zeros_like(tree.tokens), torch.ones_like(tree.tokens[:, 0]), draw(p[:, 0].double(), uniform[:, 0]))
    return _sampled(tree, p.double(), uniform)


def _greedy(tree: Tree, p: Tensor) -> Verdict:
    if tree.size == 1:
        return Verdict(torch.zeros_like(tree.tokens), torch.ones_like(p[:, 0]), p[:, 0])
    # walked by the host, row by row: small transfers and a few comparisons, where tensors take some five operators a level
    paths = []
    for tokens, parent, best in zip(tree.tokens.tolist(), tree.parent.tolist(), p.tolist(), strict=True):
        path = [0]
        for node in range(1, tree.size):  # of several children that agree, the first
            if parent[node] == path[-1] and tokens[node] == best[path[-1]]:
                path.append(node)
        paths.append([*path, *[0] * (tree.size - len(path)), len(path), best[path[-1]]])
    made = torch.tensor(paths, device=p.device)
    return Verdict(made[:, : tree.size], made[:, tree.size], made[:, tree.size + 1])


def _sampled(tree: Tree, p: Tensor, uniform: Tensor) -> Verdict:
    rows = torch.arange(tree.batch, device=p.device)
    index = torch.arange(tree.size, device=p.device)
    path = tree.tokens.new_zeros(tree.batch, tree.size + 1)  # one more: rows that stopped write a zero beyond their end
    keep = torch.ones_like(rows)
    current, tried = torch.zeros_like(rows), torch.zeros_like(rows)
    residual, mass = p[:, 0], p[:, 0].sum(-1)
    while True:
        child = (tree.parent == current.unsqueeze(1)) & (index > tried.unsqueeze(1))
        trying = child.any(1)
        if not bool(trying.any()):
            return Verdict(path[:, : tree.size], keep, draw(residual, uniform[:, 0]))
        tried = torch.where(trying, _first(child), tried)
        token = tree.tokens[rows, tried]
        q = None if tree.q is None else tree.q[rows, tried].double()
        # strict: a token without mass is never accepted; the mass stands in for renormalising the residual
        accept = trying & (uniform[rows, tried] * _scale(mass, q, token) < residual[rows, token])
        reject = trying ^ accept
        path[rows, keep] = torch.where(accept, tried, 0)
        keep = keep + accept
        current = torch.where(accept, tried, current)
        law = p[rows, current]
        if bool(reject.any()):
            rest = _without(residual, mass, q, token)
            # a rejection leaves nothing only by rounding (r = q or r a point mass on x, where acceptance is certain): of
            # probability about 1e-16, so answering it with p shifts the law by no more than that
            rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, law)
            residual = torch.where(reject.unsqueeze(1), rest, residual)
        residual = torch.where(accept.unsqueeze(1), law, residual)
        mass = residual.sum(-1)


def _scale(mass: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
    """[B] what a uniform number is multiplied with before it is compared with r(x): r's mass, times q(x) for a drawn node."""
    if q is None:
        return mass
    q_x = q.gather(1, token.unsqueeze(1)).squeeze(1)
    return mass * torch.where(q.sum(-1) > 0, q_x, 1.0)


def _without(residual: Tensor, mass: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
    """[B,V] the residual after `token` was rejected, not renormalised. A chosen node's q is zero and subtracts nothing."""
    if q is not None:
        residual = (residual - mass.unsqueeze(1) * q).clamp_(min=0)
    return residual.scatter(1, token.unsqueeze(1), 0.0)  # of a drawn node too: it was rejected, so r(x) <= q(x)


def draw(weight: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [...] drawn from the laws proportional to `weight` [...,V] by inverting their cumulative sums at `uniform` [...]."""
    cumulative = weight.cumsum(-1)
    # the second condition: parallel sums may wobble, and a token without mass must never appear
    beyond = (cumulative > uniform.unsqueeze(-1) * cumulative[..., -1:]) & (weight > 0)
    return torch.where(beyond.any(-1), _first(beyond), weight.argmax(-1))


def _first(mask: Tensor) -> Tensor:
    """The index of the first True along the last dimension, 0 where there is none."""
    return mask.to(torch.uint8).argmax(-1)
