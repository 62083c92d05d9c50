"""What a drafter would have had accepted at every place of a text: one run with a wide tree scores every tree inside it.

Steps of decoding begin where the step before ended, so how many tokens a tree keeps per step depends on the tree: a long copy is
one step of a long chain and many of a short one. Therefore the wide tree is drafted at *every* place, and each shape then walks
over the places as its own steps would have. This file knows trees and verdicts; it knows no drafter.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor

from fewstep.core.draft import Drafter, Verdict, Verify
from fewstep.core.event import Event
from fewstep.core.mixer import Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.tree import Path
from fewstep.decode.generate import requests
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.prefill import placement
from fewstep.decode.stream import Settings, Step
from fewstep.decode.verify import verify
from fewstep.report.shapes import Shape
from fewstep.report.turns import in_turn


@final
@dataclass(frozen=True, slots=True)
class Place:
    """The nodes `offered` at one place of a text, in their order and without the root, and the path that was `accepted`."""

    offered: tuple[Path, ...]
    accepted: Path


@final
@dataclass(frozen=True, slots=True)
class Pace:
    """How a shape advances: `tokens` per step, the share of steps whose trees had n nodes, `sizes[n]`, from `steps` steps."""

    tokens: float
    sizes: dict[int, float]
    steps: int

    def together(self, rows: int) -> dict[int, float]:
        """The sizes of the largest tree of `rows` rows, which all have to be as wide as."""
        below, shares = 0.0, {}
        for nodes in sorted(self.sizes):
            upto = below + self.sizes[nodes]
            shares[nodes] = upto**rows - below**rows
            below = upto
        return shares


@final
@dataclass(slots=True)
class Ledger:
    """Texts, each a list of places one token apart, of at most `length` tokens after the one that comes with the prompt: the last
    step of a text emits no more than it has left."""

    texts: list[list[Place]] = field(default_factory=list)
    length: int = 1 << 62

    @property
    def places(self) -> int:
        return sum(map(len, self.texts))

    def pace(self, shape: Shape) -> Pace:
        """What the steps of a drafter of `shape` come to on these texts. Cost: one look per step and accepted node."""
        tokens = steps = 0
        sizes: Counter[int] = Counter()
        known: dict[tuple[Path, ...], frozenset[Path]] = {}
        for text in self.texts:
            at = 0
            while at < len(text):
                place = text[at]
                kept = known.get(place.offered)
                if kept is None:
                    kept = known[place.offered] = shape.kept(place.offered)
                emitted = 1 + sum(place.accepted[:length] in kept for length in range(1, len(place.accepted) + 1))
                emitted = min(emitted, self.length - at)
                sizes[1 + len(kept)] += 1
                tokens, steps, at = tokens + emitted, steps + 1, at + emitted
        return Pace(tokens / steps, {nodes: count / steps for nodes, count in sizes.items()}, steps)

    def likeliest(self, nodes: int) -> tuple[Path, ...]:
        """The paths of the tree of at most `nodes` nodes, root included, that keeps the most where steps may begin anywhere."""
        reached: Counter[Path] = Counter()
        for place in (place for text in self.texts for place in text):
            for length in range(1, len(place.accepted) + 1):
                reached[place.accepted[:length]] += 1
        # a path is reached as often as any that goes on from it, at least: shorter ones first, and the likeliest are a tree
        return tuple(sorted(reached, key=lambda path: (-reached[path], len(path), path))[: nodes - 1])


@final
class Watched:
    """A verification that writes down what it accepts of every tree and keeps one token of it, which has the law that it had.

    The first call of a stream is about its prompt, and nothing to write down.
    """

    def __init__(self, judge: Verify, text: list[Place]) -> None:
        self._judge, self._text, self._begun = judge, text, False

    def __call__(self, tree: Tree, p: Tensor, rng: Rng) -> Verdict:
        verdict = self._judge(tree, p, rng)
        if not self._begun:
            self._begun = True
            return verdict
        ((path, keep),) = zip(verdict.path.tolist(), verdict.keep.tolist(), strict=True)
        self._text.append(place(tree.parent[0].tolist(), path[:keep]))
        if keep == 1:
            return verdict
        return Verdict(verdict.path, torch.ones_like(verdict.keep), tree.tokens[:, path[1]])


def place(parent: Sequence[int], path: Sequence[int]) -> Place:
    """A tree by its `parent` list and the nodes accepted, the root first, in ranks."""
    ranks: dict[int, Path] = {0: ()}
    children: Counter[int] = Counter()
    for node, above in enumerate(parent[1:], 1):
        if above in ranks:
            ranks[node] = (*ranks[above], children[above])
            children[above] += 1
    return Place(tuple(ranks.values())[1:], ranks[path[-1]])


def accepted(
    target: Target,
    drafter: Drafter[Any],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    nodes: int,
    *,
    sampling: SamplingConfig = SamplingConfig(),
    seconds: float = float("inf"),
) -> Ledger:
    """Continue each of `prompts` by a token and `tokens` more, with trees of up to `nodes` nodes drafted at every one of these.

    The prompts take turns, token by token, and stop after `seconds`. Cost: a call with a whole tree per token.
    """
    ledger = Ledger([[] for _ in prompts], tokens)

    def stream(number: int) -> Iterator[Event[Step]]:
        prompt = prompts[number]
        # a tree is never larger than the tokens still wanted, so more are asked for than are taken
        limit = min(tokens + nodes, (target.max_positions or 1 << 62) - len(prompt))
        settings = Settings(limit, budget=nodes, verify=Watched(verify, ledger.texts[number]))
        return islice(requests(target, drafter, [prompt], settings, sampling=sampling, seed=number), 1 + tokens)

    for _ in in_turn([stream(number) for number in range(len(prompts))], placement(target)[0], seconds):
        pass
    return Ledger([text for text in ledger.texts if text], tokens)
