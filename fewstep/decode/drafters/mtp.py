"""Drafting with a checkpoint's own multi-token prediction heads, sequential or parallel.

This file knows the two forms of heads and follows exactly the inputs they were trained on. It knows no model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, cast, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fewstep.core.draft import Drafter, Handle, Verdict
from fewstep.core.mixer import Context, State, Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.drafters.grow import Mode, cut, grow
from fewstep.decode.prefill import placement
from fewstep.nn.heads import ParallelHeads, SequentialHeads
from fewstep.nn.mixers.attention import AttentionState


@final
class MultiTokenConfig(DrafterConfig):
    """Draft with the heads that came with the checkpoint.

    `branching`: the children of each node, level by level; (): a chain as deep as the heads. `mode`: "drawn" nodes are sampled
    from the heads' law, siblings without replacement; "chosen" nodes are its most likely ones.
    """

    kind: ClassVar[str] = "mtp"
    source: ClassVar[str] = "Gloeckle et al. 2024, arXiv 2404.19737; DeepSeek-V3, arXiv 2412.19437"
    claims: ClassVar[tuple[str, ...]] = ("mtp",)

    branching: tuple[Annotated[int, Field(ge=1)], ...] = ()
    mode: Mode = "drawn"

    def build(self, target: Target, load: Load) -> "Drafter[HeadsState]":
        heads = target.heads.get("mtp")
        if not isinstance(heads, SequentialHeads | ParallelHeads):
            raise ValueError(
                "drafter='mtp': the model has no multi-token heads; train some (fewstep train) or use drafter='ngram'"
            )
        branching = self.branching or (1,) * heads.depth
        if len(branching) > heads.depth:
            raise ValueError(
                f"drafter.branching={branching}: {len(branching)} levels, the model has {heads.depth} heads; shorten it"
            )
        if max(branching) > target.vocab:
            raise ValueError(f"drafter.branching={branching}: more children than the {target.vocab} tokens there are; lower it")
        if isinstance(heads, SequentialHeads):
            return SequentialDrafter(heads, target, branching, self.mode)
        return ParallelDrafter(heads, target, branching, self.mode)


@final
@dataclass(frozen=True, slots=True)
class HeadsState:
    """Each head's cache, and the verified positions it has not seen: tapped activations `fresh` [B,W,D], the tokens that follow
    them `tokens` [B,W], of which `count` [B] are real. `carry` [B,depth-1,D]: the last certain output of each module but the
    last (None before the first proposal, and for parallel heads)."""

    caches: tuple[State, ...]
    fresh: Tensor
    tokens: Tensor
    count: Tensor
    carry: Tensor | None = None

    def fork(self, rows: Tensor) -> "HeadsState":
        carry = None if self.carry is None else self.carry[rows]
        caches = tuple(cache.fork(rows) for cache in self.caches)
        return HeadsState(caches, self.fresh[rows], self.tokens[rows], self.count[rows], carry)

    def join(self, other: "HeadsState") -> "HeadsState":
        if (self.carry is None) != (other.carry is None):
            raise ValueError("join: one batch has drafted and the other has not; let both propose once first")
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        fresh = torch.cat([functional.pad(s.fresh, (0, 0, 0, width - s.fresh.shape[1])) for s in (self, other)])
        tokens = torch.cat([functional.pad(s.tokens, (0, width - s.tokens.shape[1])) for s in (self, other)])
        carry = None if self.carry is None or other.carry is None else torch.cat([self.carry, other.carry])
        caches = tuple(mine.join(theirs) for mine, theirs in zip(self.caches, other.caches, strict=True))
        return HeadsState(caches, fresh, tokens, torch.cat([self.count, other.count]), carry)

    def nbytes(self) -> int:
        carried = 0 if self.carry is None else self.carry.nbytes
        return sum(cache.nbytes() for cache in self.caches) + self.fresh.nbytes + self.tokens.nbytes + self.count.nbytes + carried


class _HeadsDrafter:
    """What both forms share: what is remembered of prompt and verdict."""

    def __init__(self, heads: SequentialHeads | ParallelHeads, target: Target, branching: tuple[int, ...], mode: Mode) -> None:
        self.taps: tuple[str, ...] = (heads.tap,)
        self.target, self.branching, self.mode = target, branching, mode

    def _fresh(self, caches: tuple[State, ...], prompt: Tree, hidden: Mapping[str, Tensor]) -> HeadsState:
        count = prompt.valid.sum(1)
        return HeadsState(caches, hidden[self.taps[0]], functional.pad(prompt.tokens[:, 1:], (0, 1)), count)

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: HeadsState) -> HeadsState:
        path = verdict.path[:, : int(verdict.keep.max())]
        fresh = hidden[self.taps[0]].gather(1, path.unsqueeze(-1).expand(-1, -1, self.target.width))
        tokens = functional.pad(tree.tokens.gather(1, path[:, 1:]), (0, 1))
        return replace(state, fresh=fresh, tokens=tokens, count=verdict.keep)

    def _rooted(self, root: Tensor, state: HeadsState) -> tuple[Tree, Tensor]:
        """The tree of `root` alone, and the fresh tokens [B,W] with the root as their last."""
        tree = Tree(root.unsqueeze(1), torch.full_like(root, -1).unsqueeze(1))
        return tree, state.tokens.scatter(1, state.count.unsqueeze(1) - 1, root.unsqueeze(1))


@final
class SequentialDrafter(_HeadsDrafter):
    """DeepSeek-V3's modules run as they were trained. Cost per proposal: one evaluation of each module used.

    With L the root's position, module k is certain of its inputs at positions up to L - k, because it also reads the token k
    ahead; beyond them it runs on the drafted tree itself, whose root stands for position L - k: the draft node of depth j is
    position L - k + j, and reads module k-1's activation at the node's parent. Certain positions are committed to the module's
    cache, drafted ones dropped. Differs: a prompt shorter than the modules leaves a position of noise in their caches.
    """

    def __init__(self, heads: SequentialHeads, target: Target, branching: tuple[int, ...], mode: Mode) -> None:
        super().__init__(heads, target, branching, mode)
        self.heads = heads

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> HeadsState:
        device, dtype = placement(self.target)
        caches = (
            self.heads.module(k + 1).block.init_state(prompt.batch, capacity, device=device, dtype=dtype)
            for k in range(len(self.branching))
        )
        return self._fresh(tuple(caches), prompt, hidden)

    def propose(self, root: Tensor, state: HeadsState, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, HeadsState]:
        tree, tokens = self._rooted(root, state)
        certain, count, drafted = state.fresh, state.count, state.fresh[:, :0]
        caches, carries, level = [], [], 1  # level: nodes of the deepest level so far
        for k, (branch, cache) in enumerate(zip(self.branching, state.caches, strict=True), 1):
            if k > 1:
                last = _at(certain, count)
                if state.carry is None:  # nothing came before the prompt: module k starts k - 1 tokens later
                    certain, tokens, count = certain[:, :-1], tokens[:, 1:], (count - 1).clamp(min=0)
                else:
                    certain = torch.cat([state.carry[:, k - 2, None], certain[:, :-1]], 1)
                # the activation each draft node reads is at its parent; the root's is the last certain one
                above = torch.cat([last.unsqueeze(1), drafted], 1)
                drafted = above.gather(1, tree.parent[:, 1:].clamp(min=0).unsqueeze(-1).expand(-1, -1, above.shape[-1]))
                carries.append(last)
            certain, drafted, cache = self._run(k, certain, tokens, count, drafted, tree, cache)
            caches.append(cache)
            frontier = torch.cat([_at(certain, count).unsqueeze(1), drafted], 1)[:, -level:]
            logits = self.target.unembed(self.heads.module(k).norm(frontier))
            nodes = torch.arange(tree.size - level, tree.size, device=root.device).expand(tree.batch, -1)
            tree = grow(tree, nodes, handle.law(logits, tree, nodes), logits, branch, budget, self.mode, rng)
            level *= branch
            handle.charge(1)
        carry = torch.stack(carries, 1) if carries else None
        return cut(tree, int(budget.max())), replace(state, caches=tuple(caches), carry=carry)

    def _run(
        self, k: int, certain: Tensor, tokens: Tensor, count: Tensor, drafted: Tensor, tree: Tree, cache: State
    ) -> tuple[Tensor, Tensor, State]:
        """Module k at certain positions [B,W,D] and the draft nodes [B,N-1,D]: both outputs, the cache grown by the former."""
        width = certain.shape[1]
        order = torch.arange(width, device=count.device)
        chain = torch.where(order < count.unsqueeze(1), order - 1, -2)
        parent = tree.parent[:, 1:]
        parent = torch.where(parent > 0, parent + (width - 1), torch.where(parent == 0, count.unsqueeze(1) - 1, parent))
        parent = torch.cat([chain, parent], 1)
        embedded = self.target.embed(torch.cat([tokens, tree.tokens[:, 1:]], 1))
        slots = cast(AttentionState, cache).slots.extend(parent, parent.shape[1])
        ctx = Context(slots.index, parent=parent)
        h, cache = self.heads.module(k).extend(torch.cat([certain, drafted], 1), embedded, ctx, cache)
        return h[:, :width], h[:, width:], cache.commit(order.expand_as(chain), count)


@final
class ParallelDrafter(_HeadsDrafter):
    """Gloeckle's heads: one evaluation of each head's block at the new positions; the levels of the tree are independent."""

    def __init__(self, heads: ParallelHeads, target: Target, branching: tuple[int, ...], mode: Mode) -> None:
        super().__init__(heads, target, branching, mode)
        self.heads = heads

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> HeadsState:
        device, dtype = placement(self.target)
        caches = (
            self.heads.block(k + 1).init_state(prompt.batch, capacity, device=device, dtype=dtype)
            for k in range(len(self.branching))
        )
        return self._fresh(tuple(caches), prompt, hidden)

    def propose(self, root: Tensor, state: HeadsState, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, HeadsState]:
        tree, _ = self._rooted(root, state)
        order = torch.arange(state.fresh.shape[1], device=root.device).expand_as(state.tokens)
        parent = torch.where(order < state.count.unsqueeze(1), order - 1, -2)
        caches, level = [], 1
        for k, (branch, cache) in enumerate(zip(self.branching, state.caches, strict=True), 1):
            slots = cast(AttentionState, cache).slots.extend(parent, parent.shape[1])
            h, cache = self.heads.block(k).extend(state.fresh, Context(slots.index, parent=parent), cache)
            caches.append(cache.commit(order, state.count))
            logits = self.target.unembed(self.heads.norms[k - 1](_at(h, state.count))).unsqueeze(1).expand(-1, level, -1)
            nodes = torch.arange(tree.size - level, tree.size, device=root.device).expand(tree.batch, -1)
            tree = grow(tree, nodes, handle.law(logits, tree, nodes), logits, branch, budget, self.mode, rng)
            level *= branch
            handle.charge(1)
        return cut(tree, int(budget.max())), replace(state, caches=tuple(caches))


def _at(x: Tensor, count: Tensor) -> Tensor:
    """x [B,W,D] at the last real position, `count` [B] - 1: [B,D]; zeros where there is none."""
    padded = functional.pad(x, (0, 0, 1, 0))  # a row with nothing reads the padding, whatever shares its batch
    return padded.gather(1, count[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)
