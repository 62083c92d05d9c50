"""Drafting with EAGLE's networks: chains, trees of a fixed shape (EAGLE-1) and trees that follow the confidence (EAGLE-2).

The network of EAGLE-3 grows any of them. This file knows how trees grow and what the networks are fed; it knows no model.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fewstep.core.draft import Drafter, Handle, Law, Verdict
from fewstep.core.mixer import Context, State, Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.config import HeadsDrafterConfig, Load
from fewstep.decode.drafters.grow import Mode, cut, grow
from fewstep.decode.prefill import placement
from fewstep.nn.eagle import Eagle3Heads, EagleHeads, EagleNetwork, spread

Branching = tuple[Annotated[int, Field(ge=1)], ...]

_CHUNK = 512  # prompt positions per evaluation, as in prefill


@final
class EagleConfig(HeadsDrafterConfig):
    """Draft a tree of fixed shape: `branching` children of each node, level by level; ones are a chain.

    `mode`: "drawn" nodes are sampled from the network's law, siblings without replacement; "chosen" nodes are its likeliest.
    """

    kind: ClassVar[str] = "eagle"
    source: ClassVar[str] = "Li et al. 2024, EAGLE, arXiv 2401.15077"
    claims: ClassVar[tuple[str, ...]] = ("spec-bench",)

    branching: Branching = Field(default=(1, 1, 1, 1), min_length=1)
    mode: Mode = "drawn"

    def build(self, target: Target, load: Load) -> "Drafter[EagleState]":
        return StaticDrafter(self.heads(target, load, EagleHeads), target, self.branching, self.mode)


@final
class Eagle2Config(HeadsDrafterConfig):
    """Draft the `nodes` likeliest of the tree that grows by expanding the `topk` likeliest nodes of each of `depth` levels.

    The heads are those of "eagle".
    """

    kind: ClassVar[str] = "eagle2"
    source: ClassVar[str] = "Li et al. 2024, EAGLE-2, arXiv 2406.16858"
    claims: ClassVar[tuple[str, ...]] = ("spec-bench",)

    topk: int = Field(default=4, ge=1)
    depth: int = Field(default=5, ge=1)
    nodes: int = Field(default=15, ge=1)

    def build(self, target: Target, load: Load) -> "Drafter[EagleState]":
        heads = EagleConfig(path=self.path).heads(target, load, EagleHeads)
        return DynamicDrafter(heads, target, self.topk, self.depth, self.nodes)


@final
class Eagle3Config(HeadsDrafterConfig):
    """Draft with EAGLE-3's network: `branching` and `mode` as for "eagle", or, with branching (), a tree as for "eagle2"."""

    kind: ClassVar[str] = "eagle3"
    source: ClassVar[str] = "Li et al. 2025, EAGLE-3, arXiv 2503.01840"
    claims: ClassVar[tuple[str, ...]] = ("spec-bench",)

    branching: Branching = ()
    mode: Mode = "drawn"
    topk: int = Field(default=4, ge=1)
    depth: int = Field(default=5, ge=1)
    nodes: int = Field(default=15, ge=1)

    def build(self, target: Target, load: Load) -> "Drafter[EagleState]":
        heads = self.heads(target, load, Eagle3Heads)
        if self.branching:
            return StaticDrafter(heads, target, self.branching, self.mode)
        return DynamicDrafter(heads, target, self.topk, self.depth, self.nodes)


@final
@dataclass(frozen=True, slots=True)
class EagleState:
    """The network's cache of the positions whose features are the target's, and the verified ones it has not seen yet.

    Of these, features `fresh` [B,W,F] side by side and the tokens that follow them, `tokens` [B,W-1] (the last one's is the next
    root); the last `count` [B] >= 1 of each row are real.
    """

    cache: State
    fresh: Tensor
    tokens: Tensor
    count: Tensor

    def fork(self, rows: Tensor) -> "EagleState":
        return EagleState(self.cache.fork(rows), self.fresh[rows], self.tokens[rows], self.count[rows])

    def join(self, other: "EagleState") -> "EagleState":
        width = max(self.fresh.shape[1], other.fresh.shape[1])
        fresh = torch.cat([functional.pad(s.fresh, (0, 0, width - s.fresh.shape[1], 0)) for s in (self, other)])
        tokens = torch.cat([functional.pad(s.tokens, (width - 1 - s.tokens.shape[1], 0)) for s in (self, other)])
        return EagleState(self.cache.join(other.cache), fresh, tokens, torch.cat([self.count, other.count]))

    def nbytes(self) -> int:
        return self.cache.nbytes() + self.fresh.nbytes + self.tokens.nbytes + self.count.nbytes


class _EagleDrafter:
    """What all share: verified positions enter the cache with the target's features, drafted ones leave it after the proposal.

    Every evaluation takes the new nodes of one level alone; they read the network's own outputs at their parents. `reach`: the
    nodes that one proposal evaluates, at most.
    """

    def __init__(self, heads: EagleNetwork, target: Target, reach: int) -> None:
        """Raises ValueError for heads that read what the target does not have, or draft tokens that it does not know."""
        known = {"embed", "hidden", "final", *(f"layer.{i}" for i in range(target.depth))}
        if lacking := [tap for tap in heads.taps if tap not in known]:
            own = f"layer.0 .. layer.{target.depth - 1}"
            raise ValueError(f"heads: they read {lacking[0]}, the target has {own}; give heads that were trained for it")
        self._ids = heads.ids
        if self._ids is not None and not 0 <= int(self._ids.min()) <= int(self._ids.max()) < target.vocab:
            raise ValueError(
                f"heads.d2t: leads outside of the target's {target.vocab} tokens; give heads that were trained for it"
            )
        self.taps = self.prompt_taps = heads.taps
        self.heads, self.target = heads, target
        self._reach = reach

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> EagleState:
        device, dtype = placement(self.target)
        cache = self.heads.init_state(prompt.batch, capacity + self._reach, device=device, dtype=dtype)
        features, following, count = self._features(hidden), prompt.tokens[:, 1:], prompt.valid.sum(1)
        for start in range(0, following.shape[1], _CHUNK):  # all but the last position: the token after it is the first root
            tokens = following[:, start : start + _CHUNK]
            here = (count - 1 - start).clamp(0, tokens.shape[1])
            chain, read = Tree.chain(tokens, here), self.heads.fuse(features[:, start : start + tokens.shape[1]])
            _, cache = self.heads.extend(read, self.target.embed(tokens), Context(parent=chain.parent), cache)
            cache = cache.commit(torch.arange(chain.size, device=tokens.device).expand_as(tokens), here)
        last = (count - 1)[:, None, None].expand(-1, 1, features.shape[-1])
        return EagleState(cache, features.gather(1, last), following[:, :0], torch.ones_like(count))

    def propose(self, root: Tensor, state: EagleState, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, EagleState]:
        h, cache = self._catch_up(root, state)
        handle.charge(1)
        tree, cache = self._grow(root, h, cache, handle, budget, rng)
        return tree, replace(state, cache=cache.rollback())

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: EagleState) -> EagleState:
        counts = verdict.keep.tolist()
        path, fresh = verdict.path[:, : max(counts)], self._features(hidden)
        if min(counts) < path.shape[1]:  # the last of each row to the last column
            order = torch.arange(path.shape[1], device=path.device) - path.shape[1] + verdict.keep.unsqueeze(1)
            path = path.gather(1, order.clamp(min=0))
        fresh = fresh.gather(1, path.unsqueeze(-1).expand(-1, -1, fresh.shape[-1]))
        return replace(state, fresh=fresh, tokens=tree.tokens.gather(1, path[:, 1:]), count=verdict.keep)

    def _allow(self, field: str, children: int) -> None:
        """Raises ValueError if the network knows fewer tokens than a node is to have `children`; `field` says who asked."""
        tokens = self.target.vocab if self._ids is None else len(self._ids)
        if children > tokens:
            raise ValueError(f"drafter.{field}: more children than the {tokens} tokens that can be drafted; lower it")

    @abstractmethod
    def _grow(self, root: Tensor, h: Tensor, cache: State, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, State]:
        """The tree from the output `h` [B,1,D] at the root's position, and the cache with what was evaluated pending."""

    def _features(self, hidden: Mapping[str, Tensor]) -> Tensor:
        return hidden[self.taps[0]] if len(self.taps) == 1 else torch.cat([hidden[tap] for tap in self.taps], -1)

    def _catch_up(self, root: Tensor, state: EagleState) -> tuple[Tensor, State]:
        """The output [B,1,D] of the position that reads the root's embedding, with all certain positions committed."""
        tokens = torch.cat([state.tokens, root.unsqueeze(1)], 1)
        width, parent = tokens.shape[1], None
        path = order = torch.arange(width, device=root.device).expand_as(tokens)
        if tokens.shape[0] > 1:  # a single row has no padding
            first = width - state.count.unsqueeze(1)
            parent = torch.where(order > first, order - 1, torch.where(order == first, -1, -2))
            path = (order + first).clamp(max=width - 1)
        read, embedded = self.heads.fuse(state.fresh), self.target.embed(tokens)
        h, cache = self.heads.extend(read, embedded, Context(parent=parent), state.cache)
        return h[:, -1:], cache.commit(path, state.count)

    def _logits(self, h: Tensor) -> Tensor:
        """[B,K,D] -> [B,K,V]."""
        return spread(self.heads.logits(h, self.target.unembed), self._ids, self.target.vocab)

    def _deeper(self, read: Tensor, level: Tree, cache: State, handle: Handle) -> tuple[Tensor, State]:
        """The outputs of the nodes `level`, whose parents count tree nodes, and which `read` [B,K,D] at those parents."""
        parent = (level.parent - 1).clamp_(min=-2)  # the root is not pending: its position is certain
        handle.charge(1)
        return self.heads.extend(read, self.target.embed(level.tokens), Context(parent=parent), cache)


@final
class StaticDrafter(_EagleDrafter):
    """A tree of one shape, numbered breadth first and cut at the row's budget. Cost: one evaluation per level."""

    def __init__(self, heads: EagleNetwork, target: Target, branching: Sequence[int], mode: Mode) -> None:
        sizes = [1]
        for branch in branching:
            sizes.append(sizes[-1] * branch)
        super().__init__(heads, target, sum(sizes[1:-1]))
        self._allow(f"branching={tuple(branching)}", max(branching))
        self.branching, self.mode = tuple(branching), mode

    def _grow(self, root: Tensor, h: Tensor, cache: State, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, State]:
        tree = Tree(root.unsqueeze(1), torch.full_like(root, -1).unsqueeze(1))
        widest, level = int(budget.max()), 1  # level: nodes of the deepest level
        for depth, branch in enumerate(self.branching):
            if depth:
                read = h if level == h.shape[1] else h.repeat_interleave(level // h.shape[1], 1)
                h, cache = self._deeper(read, Tree(tree.tokens[:, -level:], tree.parent[:, -level:]), cache, handle)
            nodes = torch.arange(tree.size - level, tree.size, device=root.device).expand(tree.batch, -1)
            logits = self._logits(h)
            tree = grow(tree, nodes, handle.law(logits, tree, nodes), logits, branch, budget, self.mode, rng)
            level *= branch
            if tree.size >= widest:
                break
        return cut(tree, widest), cache


@final
class DynamicDrafter(_EagleDrafter):
    """EAGLE-2's tree: its nodes are chosen, since which of them stay depends on their own probability.

    The confidence of a node is the product of the draft's probabilities on its path. Each level expands its `topk` most confident
    nodes into `topk` children each; of all that was found, the `nodes` most confident stay (fewer where the budget is smaller).
    A node is never more confident than its parent, so what stays is a tree. Cost: one evaluation of up to topk nodes per level.
    Differs: the probabilities are of the row's own law, so that no node is proposed that it cannot emit.
    """

    def __init__(self, heads: EagleNetwork, target: Target, topk: int, depth: int, nodes: int) -> None:
        super().__init__(heads, target, topk * (depth - 1))
        self._allow(f"topk={topk}", topk)
        self.topk, self.depth, self.nodes = topk, depth, nodes

    def _grow(self, root: Tensor, h: Tensor, cache: State, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, State]:
        budgets = budget.tolist()
        rows = [_Candidates(token) for token in root.tolist()]
        tree = Tree(root.unsqueeze(1), torch.full_like(root, -1).unsqueeze(1))  # of the nodes expanded
        level, deepest = 1, min(self.depth, max(budgets) - 1)
        for depth in range(1, deepest + 1):
            confidences, found = self._ranked(h, tree, handle.law)
            for row, probabilities, tokens in zip(rows, confidences.tolist(), found.tolist(), strict=True):
                row.add(probabilities, tokens)
            if depth == deepest:
                break
            start, level = tree.size - level, self.topk
            for row in rows:
                row.expand(level)
            tree = _tree([row.expanded for row in rows], root.device)
            new = Tree(tree.tokens[:, -level:], tree.parent[:, -level:])
            read = h.gather(1, (new.parent - start).unsqueeze(-1).expand(-1, -1, h.shape[-1]))
            h, cache = self._deeper(read, new, cache, handle)
        kept = [row.best(min(self.nodes, most - 1)) for row, most in zip(rows, budgets, strict=True)]
        return _tree(kept, root.device), cache

    def _ranked(self, h: Tensor, tree: Tree, law: Law) -> tuple[Tensor, Tensor]:
        """How likely the likeliest tokens are after the last nodes of `tree`, of outputs `h` [B,K,D], and which they are."""
        if law.greedy:  # the network's own law, which has nothing to do with the history, is all there is to rank by
            best = self.heads.logits(h, self.target.unembed).softmax(-1, dtype=torch.float32).topk(self.topk)
            return best.values, best.indices if self._ids is None else self._ids[best.indices]
        nodes = torch.arange(tree.size - h.shape[1], tree.size, device=h.device).expand(tree.batch, -1)
        logits = self._logits(h)
        after = law(logits, tree, nodes)
        if after.is_floating_point():
            best = after.topk(self.topk)
        else:  # the law's token, which a penalty may have moved, ranks with the best
            logits = logits.scatter(-1, after.unsqueeze(-1), logits.amax(-1, keepdim=True))
            best = logits.softmax(-1, dtype=torch.float32).topk(self.topk)
        return best.values, best.indices


Nodes = tuple[list[int], list[int]]  # tokens, and parents among them


@final
class _Candidates:
    """What one row found. Plain numbers: for a few candidates every tensor operator would cost more than all of this.

    Candidate 0 is the root. `_less[n]`: the confidence of candidate n, negated, so that sorting puts the most confident first and
    of equals the first found, hence parents before children.
    """

    def __init__(self, root: int) -> None:
        self.expanded: Nodes = ([root], [-1])  # the nodes evaluated
        self._candidate = [0]  # which candidate each of them is
        self._less, self._tokens, self._above = [-1.0], [root], [-1]  # `_above`: the parent among those evaluated
        self._last = range(1)  # the candidates found last

    def add(self, probabilities: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]) -> None:
        """The children of the nodes expanded last."""
        start = len(self._tokens)
        for node, (values, children) in enumerate(zip(probabilities, tokens, strict=True), len(self._candidate) - len(tokens)):
            above = self._less[self._candidate[node]]
            self._less += [above * min(p, 1.0) for p in values]  # never above the parent's, whatever the rounding
            self._tokens += children
            self._above += [node] * len(children)
        self._last = range(start, len(self._tokens))

    def expand(self, count: int) -> None:
        """Mark the `count` most confident of those found last."""
        new = sorted(self._last, key=self._less.__getitem__)[:count]
        self._candidate += new
        self.expanded[0].extend([self._tokens[n] for n in new])
        self.expanded[1].extend([self._above[n] for n in new])

    def best(self, count: int) -> Nodes:
        """The root and the `count` most confident candidates that the draft finds possible."""
        kept = sorted(range(1, len(self._tokens)), key=self._less.__getitem__)[:count]
        order = [0, *sorted(n for n in kept if self._less[n] < 0)]
        place = {n: i for i, n in enumerate(order)}
        parents = [place[self._candidate[self._above[n]]] for n in order[1:]]
        return [self._tokens[n] for n in order], [-1, *parents]


def _tree(rows: Sequence[Nodes], device: torch.device) -> Tree:
    """A tree of these nodes per row, the shorter ones padded; all are chosen."""
    width = max(len(tokens) for tokens, _ in rows)
    tokens = [tokens + [0] * (width - len(tokens)) for tokens, _ in rows]
    parents = [parents + [-2] * (width - len(parents)) for _, parents in rows]
    return Tree(torch.tensor(tokens, device=device), torch.tensor(parents, device=device))
