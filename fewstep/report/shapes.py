"""The shapes a drafter's tree may be given, and what each would have kept: one run with a wide tree scores every tree inside it.

A node is known by its path of ranks, (0, 2) being the third child of the first. This file knows which fields of a config give
its trees their shape; it knows no network.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, final

from torch import Tensor

from fewstep.core.draft import Drafter, Handle, Verdict
from fewstep.core.mixer import Tree
from fewstep.core.random import Rng
from fewstep.core.recipe import parse
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.tree import Path, full_tree

_SIZES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)  # nodes of trees that may have any shape
_DEPTHS = (1, 2, 3, 4, 6, 8, 12)


@final
@dataclass(frozen=True, slots=True)
class Shape:
    """A config and the paths of its trees, at most: what is proposed may have fewer."""

    config: DrafterConfig
    paths: frozenset[Path]

    @property
    def nodes(self) -> int:
        return 1 + len(self.paths)

    @property
    def depth(self) -> int:
        return max(map(len, self.paths), default=0)


@final
@dataclass(slots=True)
class Ledger:
    """Of every step and row, the path of ranks that was accepted and the paths that were offered, counted."""

    accepted: Counter[Path] = field(default_factory=Counter)
    offered: Counter[frozenset[Path]] = field(default_factory=Counter)
    steps: int = 0

    def enter(self, parent: Sequence[int], path: Sequence[int]) -> None:
        """One row's tree by its `parent` list, and the nodes accepted, the root first."""
        ranks: dict[int, Path] = {0: ()}
        children: Counter[int] = Counter()
        for node, above in enumerate(parent[1:], 1):
            if above >= 0 and above in ranks:
                ranks[node] = (*ranks[above], children[above])
                children[above] += 1
        self.accepted[ranks[path[-1]]] += 1
        self.offered[frozenset(ranks.values()) - {()}] += 1
        self.steps += 1

    def tokens(self, shape: frozenset[Path]) -> float:
        """Tokens per step of a tree of the paths `shape`, had it been drafted in place of the wider one that was."""
        kept = sum(
            count * sum(path[:length] in shape for length in range(1, len(path) + 1)) for path, count in self.accepted.items()
        )
        return 1 + kept / self.steps

    def sizes(self, shape: frozenset[Path]) -> dict[int, float]:
        """The share of steps in which that tree would have had n nodes, its root included."""
        shares: Counter[int] = Counter()
        for offered, count in self.offered.items():
            shares[1 + len(offered & shape)] += count
        return {nodes: count / self.steps for nodes, count in shares.items()}

    def likeliest(self, nodes: int) -> tuple[Path, ...]:
        """The paths of the tree of at most `nodes` nodes that would have kept the most."""
        reached: Counter[Path] = Counter()
        for path, count in self.accepted.items():
            for length in range(1, len(path) + 1):
                reached[path[:length]] += count
        # a path is reached as often as any that goes on from it, at least: shorter ones first, and the likeliest are a tree
        return tuple(sorted(reached, key=lambda path: (-reached[path], len(path), path))[: nodes - 1])


@final
class Recorder:
    """A drafter whose verdicts go into a ledger."""

    def __init__(self, drafter: Drafter[Any]) -> None:
        self.taps, self.prompt_taps, self.ledger = drafter.taps, drafter.prompt_taps, Ledger()
        self._drafter = drafter

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> Any:
        return self._drafter.init(prompt, hidden, capacity)

    def propose(self, root: Tensor, state: Any, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, Any]:
        return self._drafter.propose(root, state, handle, budget, rng)

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: Any) -> Any:
        for parent, path, keep in zip(tree.parent.tolist(), verdict.path.tolist(), verdict.keep.tolist(), strict=True):
            self.ledger.enter(parent, path[:keep])
        return self._drafter.observe(tree, verdict, hidden, state)


def widest(config: DrafterConfig, levels: int) -> Shape | None:
    """The tree that holds all that are tried, `levels` deep where the config does not say; None if its shape cannot be set."""
    fields = type(config).model_fields
    if "branching" in fields:
        branching = ((4, 3, 2) if levels <= 3 else (3, 2, 1, 1, 1, 1))[:levels]
        return _branched(config, branching)
    if {"depth", "branches"} <= fields.keys():
        return _chains(config, _DEPTHS[-1], 3)
    return None


def inside(wide: Shape, ledger: Ledger, nodes: int) -> Iterator[Shape]:
    """The shapes to choose from, of at most `nodes` nodes: those within `wide`, or the best of each size if any tree will do."""
    fields = type(wide.config).model_fields
    values = wide.config.model_dump()
    if "tree" in fields and values.get("mode") != "drawn":
        trees = dict.fromkeys(ledger.likeliest(size) for size in _SIZES if size <= nodes)
        for tree in trees:
            if tree:
                given = {**values, "tree": sorted(tree, key=len), "branching": ()}
                yield Shape(parse(type(wide.config), given, "drafter"), frozenset(tree))
    elif "branching" in fields:
        for depth in range(1, len(values["branching"]) + 1):
            for branching in product(*(range(1, most + 1) for most in values["branching"][:depth])):
                shape = _branched(wide.config, branching)
                if shape.nodes <= nodes:
                    yield shape
    else:
        for depth, branches in product(_DEPTHS, range(1, 4)):
            shape = _chains(wide.config, depth, branches)
            if shape.nodes <= nodes:
                yield shape


def _branched(config: DrafterConfig, branching: tuple[int, ...]) -> Shape:
    given = {**config.model_dump(), "branching": branching, **({"tree": ()} if "tree" in type(config).model_fields else {})}
    return Shape(parse(type(config), given, "drafter"), frozenset(full_tree(branching)))


def _chains(config: DrafterConfig, depth: int, branches: int) -> Shape:
    given = {**config.model_dump(), "depth": depth, "branches": branches}
    paths = ((branch, *(0,) * below) for branch in range(branches) for below in range(depth))
    return Shape(parse(type(config), given, "drafter"), frozenset(paths))
