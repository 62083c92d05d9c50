"""Trees of a fixed shape, made of ranks: which of a head's likeliest tokens each node is. This file knows no network.

A path such as (0, 2) is the node two levels below the root that follows the likeliest token of depth 1 and is itself the third
likeliest of depth 2: the format of Medusa's choices.
"""

import heapq
from collections.abc import Sequence
from itertools import product
from math import prod
from typing import final

Path = tuple[int, ...]


def best_tree(accuracies: Sequence[Sequence[float]], nodes: int) -> tuple[Path, ...]:
    """The paths of the tree of at most `nodes` nodes, its root included, that keeps the most tokens per call in expectation.

    `accuracies[d][r]` in [0, 1]: how likely the token of rank r at depth d is the target's if all before it were. A node is
    accepted with the product along its path, which is never above its parent's, so that the likeliest nodes are a tree; they
    come in that order, and the first n are the best tree of n + 1. Nodes without a chance are left out.
    Cost: O(nodes x ranks) products. Source: Medusa, arXiv 2401.10774, section 2.3.3 and appendix C; the same as Sequoia's tree,
    arXiv 2402.12374, for acceptance that depends on the rank alone.
    """
    chosen: list[Path] = []
    waiting: list[tuple[float, Path]] = [(-share, (rank,)) for rank, share in enumerate(accuracies[0] if accuracies else ())]
    heapq.heapify(waiting)
    while waiting and len(chosen) < nodes - 1:
        chance, path = heapq.heappop(waiting)
        if not chance:
            break
        chosen.append(path)
        if len(path) < len(accuracies):
            for rank, share in enumerate(accuracies[len(path)]):
                heapq.heappush(waiting, (chance * share, (*path, rank)))
    return tuple(chosen)


def expected_tokens(accuracies: Sequence[Sequence[float]], paths: Sequence[Path]) -> float:
    """Tokens per call of a tree whose nodes are accepted as `best_tree` supposes."""
    return 1.0 + sum(prod(accuracies[depth][rank] for depth, rank in enumerate(path)) for path in paths)


def full_tree(branching: Sequence[int]) -> tuple[Path, ...]:
    """The paths of a tree whose nodes of level d have `branching[d]` children, breadth first; all ones are a chain."""
    levels = [product(*map(range, branching[:depth])) for depth in range(1, len(branching) + 1)]
    return tuple(path for level in levels for path in level)


@final
class RankTree:
    """A tree of rank paths as a drafter uses it. Node 0 is the root, node n > 0 the n-th path, in the order given.

    `parents`, `ranks`, `depths`: of each node, 0 for the root but for its parent -1; `depth`: the deepest; `widest[d]`: the ranks
    looked at for depth d + 1. Raises ValueError for a path that is there twice or
    whose beginning is no path.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        place: dict[Path, int] = {(): 0}
        for path in paths if _parents_first(paths) else sorted(paths, key=len):
            if path in place or not path:
                raise ValueError(f"drafter.tree: the path {path} is there twice, or empty; keep each node once")
            if path[:-1] not in place:
                raise ValueError(f"drafter.tree: the path {path} hangs from {path[:-1]}, which is no node; add it")
            place[path] = len(place)
        nodes = list(place)
        self.size, self.depth = len(nodes), max(map(len, nodes))
        self.parents = [-1, *(place[path[:-1]] for path in nodes[1:])]
        self.ranks = [0, *(path[-1] for path in nodes[1:])]
        self.depths = [len(path) for path in nodes]
        self.widest = [1 + max(path[depth] for path in nodes if len(path) == depth + 1) for depth in range(self.depth)]

    def level(self, depth: int) -> list[int]:
        """The nodes of one depth, 0 for the root's."""
        return [node for node, own in enumerate(self.depths) if own == depth]


def _parents_first(paths: Sequence[Path]) -> bool:
    seen: set[Path] = {()}
    for path in paths:
        if path[:-1] not in seen:
            return False
        seen.add(path)
    return True
