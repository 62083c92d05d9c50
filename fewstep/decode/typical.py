"""Typical acceptance: a lossy verification that also keeps drafted tokens the target merely finds likely enough.

What is emitted does not have the target's law: use `verify` for that. This file knows neither drafters nor models.
"""

import torch
from torch import Tensor

from fewstep.core.draft import Verdict
from fewstep.core.mixer import Tree
from fewstep.core.random import Rng
from fewstep.decode.verify import draw, verify


def verify_typical(tree: Tree, p: Tensor, rng: Rng, epsilon: float = 0.09, delta: float = 0.3) -> Verdict:
    """The longest path whose every token x satisfies p(x) > min(epsilon, delta exp(-H(p))), and a token drawn after it.

    `p` [B,N,V]: the target's law after each node, H its entropy in nats; int64 [B,N], when every law is a point mass, is verified
    as `verify` does, for then both agree. Of several longest paths the likeliest is kept. `epsilon`, `delta` in (0, 1]: the
    smaller they are, the more is kept. It does not matter whether nodes were chosen or drawn. `next` is drawn from p with the
    row's uniform number 0. Raises ValueError for thresholds out of range.

    Cost: one entropy per node. Source: Medusa, arXiv 2401.10774, section 2.3.1; its code's defaults epsilon 0.09, delta 0.3.
    Differs: `next` is drawn from p itself, where the original truncates p by the same threshold.
    """
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value}: outside (0, 1]; the paper's code takes epsilon=0.09, delta=0.3")
    if not p.is_floating_point() or tree.size == 1:
        return verify(tree, p, rng)
    p = p.double()
    rows = torch.arange(tree.batch, device=p.device)
    parent = tree.parent.clamp(min=0)
    chance = p[rows.unsqueeze(1), parent, tree.tokens]
    threshold = (delta * (-torch.special.entr(p).sum(-1)).exp()).clamp(max=epsilon).gather(1, parent)
    liked = (chance > threshold) & tree.valid
    picked = [_longest(*row) for row in zip(liked.tolist(), chance.tolist(), tree.parent.tolist(), strict=True)]
    path = tree.tokens.new_tensor([row + [0] * (tree.size - len(row)) for row in picked])
    keep = tree.tokens.new_tensor([len(row) for row in picked])
    last = path[rows, keep - 1]
    return Verdict(path, keep, draw(p[rows, last], rng.uniform(tree.size)[:, 0]))


def _longest(liked: list[bool], chance: list[float], parent: list[int]) -> list[int]:
    """The path from node 0 over liked nodes only that is longest, of several the likeliest."""
    best = {0: (1, 1.0)}  # of each node that can be reached: the length and the probability of its path
    for node in range(1, len(parent)):
        if liked[node] and parent[node] in best:
            length, mass = best[parent[node]]
            best[node] = (length + 1, mass * chance[node])
    path = [max(best, key=lambda node: best[node])]
    while path[0]:
        path.insert(0, parent[path[0]])
    return path
