"""Continuations of one text merged by their common beginnings, as a tree of chosen nodes. This file knows no drafter."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from fewstep.core.mixer import Tree


@final
class Trie:
    """Nodes numbered as they come, node 0 the root; the weight of a node is that of all continuations through it."""

    def __init__(self, root: int) -> None:
        self.tokens, self.parent, self.weight = [root], [-1], [0]
        self._child: dict[tuple[int, int], int] = {}

    def insert(self, tokens: Sequence[int], weight: int = 1, size: int | None = None) -> int:
        """Add a continuation, or as much of it as fits in `size` nodes, root included; the node of its last token that did."""
        node = 0
        for token in tokens:
            child = self._child.get((node, token))
            if child is None:
                if size is not None and len(self.tokens) >= size:
                    break
                child = self._child[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parent.append(node)
                self.weight.append(0)
            self.weight[child] += weight
            node = child
        return node

    def best(self, size: int) -> "Trie":
        """The `size` heaviest nodes, root included, heaviest first; of equal weights the older, so that no parent is missing."""
        order = sorted(range(1, len(self.tokens)), key=lambda node: -self.weight[node])[: size - 1]
        place = {0: 0, **{node: i for i, node in enumerate(order, 1)}}
        kept = Trie(self.tokens[0])
        kept.tokens += [self.tokens[node] for node in order]
        kept.parent += [place[self.parent[node]] for node in order]
        kept.weight += [self.weight[node] for node in order]
        kept._child = {(parent, token): i for i, (parent, token) in enumerate(zip(kept.parent, kept.tokens, strict=True)) if i}
        return kept


def planted(tries: Sequence[Trie], device: torch.device) -> Tree:
    """The tree whose rows are `tries`, with padding where a row has fewer nodes than the widest."""
    width = max(len(trie.tokens) for trie in tries)
    return Tree(_filled([trie.tokens for trie in tries], width, 0, device), _filled([t.parent for t in tries], width, -2, device))


def _filled(rows: Sequence[list[int]], width: int, padding: int, device: torch.device) -> Tensor:
    return torch.tensor([row + [padding] * (width - len(row)) for row in rows], dtype=torch.int64, device=device)
