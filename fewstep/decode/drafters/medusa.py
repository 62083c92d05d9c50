"""Drafting with Medusa and Hydra heads: trees of fixed shape from the activation at the last token that is certain.

This file knows these heads and which token each node of a tree is; it knows no model.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.core.draft import Drafter, Handle, Verdict
from fewstep.core.mixer import Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.config import HeadsDrafterConfig, Load
from fewstep.decode.drafters.grow import Mode, cut, grow
from fewstep.decode.drafters.tree import Path, RankTree, best_tree, full_tree
from fewstep.decode.prefill import placement
from fewstep.nn.medusa import FreeHeads, HydraHeads, MedusaHeads

Rank = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class _Config(HeadsDrafterConfig):
    """`tree`: the nodes as paths of ranks, (0, 2) being the third likeliest token after the likeliest; or `branching`: the
    children of each node, level by level. With neither, the best tree of `nodes` nodes for the accuracies that came with the
    heads (a chain where none were measured).

    `mode`: "chosen" nodes are the heads' likeliest tokens; "drawn" ones are sampled from their law, siblings without replacement,
    in the shape of `branching` (a chain if there is none).
    """

    tree: tuple[tuple[Rank, ...], ...] = ()
    branching: tuple[Count, ...] = ()
    nodes: int = Field(default=16, ge=2)
    mode: Mode = "chosen"

    @model_validator(mode="after")
    def _one_shape(self) -> "_Config":
        if self.tree and (self.branching or self.mode == "drawn"):
            other = "branching" if self.branching else "mode='drawn'"
            raise ValueError(f"tree={self.tree}: its nodes are ranks, which {other} does not go with; give one of the two")
        return self

    def shape(self, heads: FreeHeads, vocab: int) -> tuple[Path, ...]:
        """The paths of the tree. Raises ValueError for more levels than heads, or more children than tokens."""
        chain = (1,) * heads.depth
        if self.tree or self.branching or self.mode == "drawn":
            paths = self.tree or full_tree(self.branching or chain)
        else:
            paths = best_tree(heads.config.accuracies, self.nodes) or full_tree(chain)
        field = f"drafter.{'tree' if self.tree else 'branching'}"
        if (levels := max(map(len, paths))) > heads.depth:
            raise ValueError(f"{field}: {levels} levels, the model has {heads.depth} heads; shorten it")
        if (rank := max(map(max, paths))) >= vocab:
            raise ValueError(f"{field}: rank {rank}, of {vocab} tokens; lower it")
        return paths


@final
class MedusaConfig(_Config):
    """Draft with Medusa heads, which do not see one another's tokens: the same candidates follow every node of a level."""

    kind: ClassVar[str] = "medusa"
    source: ClassVar[str] = "Cai et al. 2024, arXiv 2401.10774"
    claims: ClassVar[tuple[str, ...]] = ("spec-bench",)

    def build(self, target: Target, load: Load) -> "Drafter[LastActivation]":
        heads = self.heads(target, load, MedusaHeads)
        return MedusaDrafter(heads, target, self.shape(heads, target.vocab), self.mode)


@final
class HydraConfig(_Config):
    """Draft with Hydra heads, which read the tokens drafted so far."""

    kind: ClassVar[str] = "hydra"
    source: ClassVar[str] = "Ankner et al. 2024, arXiv 2402.05109"
    claims: ClassVar[tuple[str, ...]] = ("spec-bench",)

    def build(self, target: Target, load: Load) -> "Drafter[LastActivation]":
        heads = self.heads(target, load, HydraHeads)
        return HydraDrafter(heads, target, self.shape(heads, target.vocab), self.mode)


@final
@dataclass(frozen=True, slots=True)
class LastActivation:
    """The target's activation [B,D] at the last token before the root."""

    hidden: Tensor

    def fork(self, rows: Tensor) -> "LastActivation":
        return LastActivation(self.hidden[rows])

    def join(self, other: "LastActivation") -> "LastActivation":
        return LastActivation(torch.cat([self.hidden, other.hidden]))

    def nbytes(self) -> int:
        return self.hidden.nbytes


class _TreeDrafter:
    """What both share: the activation they remember, and the tree as tensors.

    Chosen nodes are ranked by the heads' plain logits: no temperature changes their order, a penalty only costs acceptance.
    """

    taps: tuple[str, ...] = (FreeHeads.tap,)
    prompt_taps: tuple[str, ...] = taps

    def __init__(self, target: Target, paths: tuple[Path, ...], mode: Mode) -> None:
        self.target, self.mode, self.tree = target, mode, RankTree(paths)
        self._device, _ = placement(target)
        self._parent = self._tensor(self.tree.parents)

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> LastActivation:
        return LastActivation(_row(hidden[self.taps[0]], prompt.valid.sum(1) - 1))

    def propose(
        self, root: Tensor, state: LastActivation, handle: Handle, budget: Tensor, rng: Rng
    ) -> tuple[Tree, LastActivation]:
        sizes = budget.tolist()
        size = min(self.tree.size, max(sizes))
        if size == 1:
            return Tree(root.unsqueeze(1), torch.full_like(root, -1).unsqueeze(1)), state
        if self.mode == "drawn":
            return cut(self._drawn(root, state.hidden, handle, budget, rng), size), state
        tokens = self._chosen(root, state.hidden, handle)[:, :size]
        parent = self._parent[:size].expand(len(sizes), -1)
        if min(sizes) < size:
            parent = torch.where(torch.arange(size, device=self._device) < budget.unsqueeze(1), parent, -2)
        return Tree(tokens, parent), state

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: LastActivation) -> LastActivation:
        last = verdict.path.gather(1, verdict.keep.unsqueeze(1) - 1).squeeze(1)
        return LastActivation(_row(hidden[self.taps[0]], last))

    @abstractmethod
    def _chosen(self, root: Tensor, hidden: Tensor, handle: Handle) -> Tensor:
        """The token [B,N] of every node."""

    @abstractmethod
    def _drawn(self, root: Tensor, hidden: Tensor, handle: Handle, budget: Tensor, rng: Rng) -> Tree:
        """The full tree of the same branching, its nodes drawn."""

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self._device)


@final
class MedusaDrafter(_TreeDrafter):
    """Cost per proposal: one pass of all heads used, whatever the tree; no cache."""

    def __init__(self, heads: MedusaHeads, target: Target, paths: tuple[Path, ...], mode: Mode) -> None:
        super().__init__(target, paths, mode)
        self.heads = heads
        tree, self._ranks = self.tree, max(self.tree.widest)
        # of each node, its place behind the root among the ranked tokens of all depths
        places = [1 + (depth - 1) * self._ranks + rank for depth, rank in zip(tree.depths, tree.ranks, strict=True)]
        self._place = self._tensor([0, *places[1:]])

    def _chosen(self, root: Tensor, hidden: Tensor, handle: Handle) -> Tensor:
        ranked = self._logits(hidden, handle).topk(self._ranks).indices
        return torch.cat([root.unsqueeze(1), ranked.flatten(1)], 1)[:, self._place]

    def _drawn(self, root: Tensor, hidden: Tensor, handle: Handle, budget: Tensor, rng: Rng) -> Tree:
        tree, level = Tree(root.unsqueeze(1), torch.full_like(root, -1).unsqueeze(1)), 1
        for logits, branch in zip(self._logits(hidden, handle).split(1, 1), self.tree.widest, strict=True):
            nodes = torch.arange(tree.size - level, tree.size, device=self._device).expand(tree.batch, -1)
            logits = logits.expand(-1, level, -1)
            tree = grow(tree, nodes, handle.law(logits, tree, nodes), logits, branch, budget, self.mode, rng)
            level *= branch
        return tree

    def _logits(self, hidden: Tensor, handle: Handle) -> Tensor:
        """[B,depth,V] of the heads that the tree is deep enough for."""
        handle.charge(1)
        return self.heads.logits(hidden, self.tree.depth, self.target.unembed)


@final
class HydraDrafter(_TreeDrafter):
    """Cost per proposal: one head per level of the tree, evaluated at the nodes that have children; no cache."""

    def __init__(self, heads: HydraHeads, target: Target, paths: tuple[Path, ...], mode: Mode) -> None:
        super().__init__(target, paths, mode)
        self.heads = heads
        self._levels = [self._level(depth) for depth in range(1, self.tree.depth + 1)]
        by_level = [node for depth in range(self.tree.depth + 1) for node in self.tree.level(depth)]
        self._order = self._tensor([by_level.index(node) for node in range(self.tree.size)])

    def _level(self, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """The nodes above that have children; of each child, which of those is its parent, and its place among theirs."""
        nodes, above = self.tree.level(depth), self.tree.level(depth - 1)
        parents = [self.tree.parents[node] for node in nodes]
        inner = [node for node in above if node in parents]
        owners = [inner.index(parent) for parent in parents]
        places = [owner * self.tree.widest[depth - 1] + self.tree.ranks[node] for owner, node in zip(owners, nodes, strict=True)]
        return self._tensor([above.index(node) for node in inner]), self._tensor(owners), self._tensor(places)

    def _chosen(self, root: Tensor, hidden: Tensor, handle: Handle) -> Tensor:
        tokens = [root.unsqueeze(1)]
        inputs = hidden.unsqueeze(1)
        for k, (inner, owners, places) in enumerate(self._levels, 1):
            inputs = torch.cat([inputs, self.target.embed(tokens[-1])], -1)[:, inner]
            ranked = self._logits(k, inputs, handle).topk(self.tree.widest[k - 1]).indices
            tokens.append(ranked.flatten(1)[:, places])
            inputs = inputs[:, owners]
        return torch.cat(tokens, 1)[:, self._order]

    def _drawn(self, root: Tensor, hidden: Tensor, handle: Handle, budget: Tensor, rng: Rng) -> Tree:
        tree, level = Tree(root.unsqueeze(1), torch.full_like(root, -1).unsqueeze(1)), 1
        inputs = hidden.unsqueeze(1)
        for k, branch in enumerate(self.tree.widest, 1):
            inputs = torch.cat([inputs, self.target.embed(tree.tokens[:, -level:])], -1)
            logits = self._logits(k, inputs, handle)
            nodes = torch.arange(tree.size - level, tree.size, device=self._device).expand(tree.batch, -1)
            tree = grow(tree, nodes, handle.law(logits, tree, nodes), logits, branch, budget, self.mode, rng)
            inputs = inputs.repeat_interleave(branch, 1)
            level *= branch
        return tree

    def _logits(self, k: int, inputs: Tensor, handle: Handle) -> Tensor:
        handle.charge(1)
        return self.heads.unembed(k, self.heads.activation(k, inputs), self.target.unembed)


def _row(hidden: Tensor, place: Tensor) -> Tensor:
    """hidden [B,N,D] at `place` [B] -> [B,D]."""
    return hidden[torch.arange(len(place), device=place.device), place]
