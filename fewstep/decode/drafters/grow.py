"""Growing a tree of drafted tokens level by level. This file knows no network: it is handed laws and logits."""

from typing import Literal

import torch
from torch import Tensor

from fewstep.core.mixer import Tree
from fewstep.core.random import Rng
from fewstep.decode.verify import draw

Mode = Literal["drawn", "chosen"]


def grow(tree: Tree, nodes: Tensor, law: Tensor, logits: Tensor, branch: int, budget: Tensor, mode: Mode, rng: Rng) -> Tree:
    """`tree` with `branch` children under each of `nodes` [B,K], from the `law` there ([B,K,V], or [B,K] if greedy) and `logits`.

    "drawn" children are sampled, siblings without replacement, and carry their law q; "chosen" ones are the likeliest. Nodes are
    numbered breadth first, and those at or beyond the row's `budget` [B] are padding.
    """
    parent = nodes if branch == 1 else nodes.repeat_interleave(branch, 1)
    size = tree.size + parent.shape[1]
    possible = q = None
    if mode == "drawn" and law.is_floating_point():
        tokens, possible, q = _drawn(law, branch, rng.uniform(size)[:, tree.size :])
        q = torch.cat([q.new_zeros(tree.batch, 1, q.shape[-1]) if tree.q is None else tree.q, q], 1)
    elif branch == 1 and not law.is_floating_point():
        tokens = law
    else:
        tokens, possible = _chosen(law, logits, branch)
    # a node is left out by its place, its parent or for want of a token: never for its own value
    if possible is not None or int(budget.min()) < size or int(tree.parent.min()) < -1:
        valid = tree.valid.gather(1, parent) & (torch.arange(tree.size, size, device=parent.device) < budget.unsqueeze(1))
        parent = torch.where(valid if possible is None else valid & possible, parent, -2)
    return Tree(torch.cat([tree.tokens, tokens], 1), torch.cat([tree.parent, parent], 1), q)


def cut(tree: Tree, size: int) -> Tree:
    """The first `size` nodes of `tree`."""
    if size >= tree.size:
        return tree
    return Tree(tree.tokens[:, :size], tree.parent[:, :size], None if tree.q is None else tree.q[:, :size])


def _drawn(law: Tensor, branch: int, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Children without replacement: tokens [B,K*branch], whether one was left, and their laws q [B,K*branch,V]."""
    batch, count, vocab = law.shape
    tokens, laws = [], []
    for number in uniform.view(batch, count, branch).unbind(2):
        mass = law.sum(-1, keepdim=True)
        law = torch.where(mass > 0, law / mass, 0.0)
        tokens.append(draw(law, number))
        laws.append(law)
        law = law.scatter(-1, tokens[-1].unsqueeze(-1), 0.0)
    q = torch.stack(laws, 2).view(batch, count * branch, vocab)
    return torch.stack(tokens, 2).view(batch, -1), q.sum(-1) > 0, q


def _chosen(law: Tensor, logits: Tensor, branch: int) -> tuple[Tensor, Tensor | None]:
    """The most likely children: tokens [B,K*branch], and whether the law gives them any mass (None: all can be proposed)."""
    if law.is_floating_point():
        best = law.topk(branch)
        return best.indices.flatten(1), (best.values > 0).flatten(1)
    # greedy: the law's token first (a penalty may have moved it), then the next best logits
    best = logits.scatter(-1, law.unsqueeze(-1), torch.inf).topk(branch)
    return best.indices.flatten(1), None
