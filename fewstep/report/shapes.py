"""The shapes a drafter's trees may be given. This file knows which fields of a config say so; it knows no network.

A node is known by its path of ranks, (0, 2) being the third child of the first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import final

from fewstep.core.recipe import parse
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.tree import Path, full_tree

_SIZES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # nodes of trees that may have any shape
_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 15)
_BRANCHES = 3
_SHALLOW, _DEEP = (4, 3, 2), (3, 2, 1, 1, 1, 1)  # the widest trees that are tried, by the levels there may be
_GROWN = ((2, 4), (2, 8), (3, 8), (5, 8), (5, 15))  # depth and nodes of trees that follow the confidence
_WINDOWS = ((1, 3), (1, 5), (2, 4), (2, 6))  # lookahead's window and n-gram

Likeliest = Callable[[int], Sequence[Path]]  # the nodes to keep in a tree of so many, its root included, parents first


@final
@dataclass(frozen=True, slots=True)
class Shape:
    """A config, and what is left of a tree drafted by it: at most `nodes` nodes, root included, at most `depth` deep, of them
    those of `paths` (None: the first ones drafted)."""

    config: DrafterConfig
    nodes: int
    depth: int
    paths: frozenset[Path] | None = None

    def kept(self, offered: Sequence[Path]) -> frozenset[Path]:
        """Of the nodes of a wider tree, in their order, those that a drafter of this shape would have drafted."""
        if self.paths is not None:
            return self.paths.intersection(offered)
        return frozenset([path for path in offered if len(path) <= self.depth][: self.nodes - 1])


def widest(config: DrafterConfig, levels: int, nodes: int) -> list[Shape]:
    """The shapes to run, each of which holds many to choose from (`inside`), or is one of its own.

    `levels`: how deep the drafter can go. `nodes`: the most that a tree may have, root included.
    """
    fields, values = type(config).model_fields.keys(), config.model_dump()
    if {"topk", "depth", "nodes"} <= fields and not values.get("branching"):
        grown = [_given(config, depth=depth, nodes=count) for depth, count in _GROWN if count < nodes]
        return [*(Shape(one, one.model_dump()["nodes"] + 1, one.model_dump()["depth"]) for one in grown)] or [
            _whole(config, nodes)
        ]
    if "branching" in fields:
        return [_branched(config, (_SHALLOW if levels <= len(_SHALLOW) else _DEEP)[:levels])]
    if {"depth", "branches"} <= fields:
        return [_chains(config, min(_DEPTHS[-1], nodes - 1), _BRANCHES)]
    if {"depth", "nodes"} <= fields:
        return [Shape(_given(config, depth=nodes - 1, nodes=nodes - 1), nodes, nodes - 1)]
    if {"window", "ngram"} <= fields:
        return [_whole(_given(config, window=window, ngram=ngram), nodes) for window, ngram in _WINDOWS]
    return [_whole(config, nodes)]


def inside(wide: Shape, nodes: int, likeliest: Likeliest) -> Iterator[Shape]:
    """The shapes of at most `nodes` nodes that a run of `wide` tells about; `likeliest`: what that run found."""
    fields, values = type(wide.config).model_fields.keys(), wide.config.model_dump()
    if "tree" in fields and values["mode"] != "drawn":
        for tree in dict.fromkeys(tuple(likeliest(size)) for size in _SIZES if size <= nodes):
            if tree:
                given = _given(wide.config, tree=tuple(sorted(tree, key=len)), branching=())
                yield Shape(given, 1 + len(tree), max(map(len, tree)), frozenset(tree))
    elif values.get("branching"):
        yield from _branchings(wide, nodes)
    elif {"depth", "branches"} <= fields:
        shapes = (_chains(wide.config, depth, branches) for depth, branches in product(_DEPTHS, range(1, _BRANCHES + 1)))
        yield from (shape for shape in shapes if shape.nodes <= nodes)
    elif {"depth", "nodes"} <= fields and "topk" not in fields:
        for depth in _DEPTHS:
            if depth < nodes:
                yield Shape(_given(wide.config, depth=depth, nodes=depth), 1 + depth, depth)
    else:
        yield wide


def anchors(wide: Shape, nodes: int) -> list[Shape]:
    """The few shapes whose drafting is timed to tell the price of all `inside`: the shortest, the longest, and the widest."""
    if wide.config.model_dump().get("branching"):
        full = sorted(_branchings(wide, nodes), key=lambda shape: (shape.depth, shape.nodes))
        longest = [shape for shape in full if shape.depth == full[-1].depth]
        some = [full[0], longest[0], longest[-1]]
    else:
        some = sorted(inside(wide, nodes, lambda size: ()), key=lambda shape: (shape.depth, shape.nodes))
        some = [some[0], some[-1], max(some, key=lambda shape: shape.nodes)]
    return list(dict.fromkeys(some))


def _branchings(wide: Shape, nodes: int) -> Iterator[Shape]:
    most = wide.config.model_dump()["branching"]
    for depth in range(1, len(most) + 1):
        for branching in product(*(range(1, count + 1) for count in most[:depth])):
            if sum(prod(branching[:level]) for level in range(depth + 1)) <= nodes:
                yield _branched(wide.config, branching)


def _branched(config: DrafterConfig, branching: tuple[int, ...]) -> Shape:
    paths = full_tree(branching)
    cleared = {"tree": ()} if "tree" in type(config).model_fields else {}
    return Shape(_given(config, branching=branching, **cleared), 1 + len(paths), len(branching), frozenset(paths))


def _chains(config: DrafterConfig, depth: int, branches: int) -> Shape:
    paths = frozenset((branch, *(0,) * below) for branch in range(branches) for below in range(depth))
    return Shape(_given(config, depth=depth, branches=branches), 1 + len(paths), depth, paths)


def _whole(config: DrafterConfig, nodes: int) -> Shape:
    return Shape(config, nodes, nodes - 1)


def _given(config: DrafterConfig, **fields: object) -> DrafterConfig:
    return parse(type(config), {**config.model_dump(), **fields}, "drafter")
