"""Drafting with a checkpoint's own multi-token prediction heads, sequential or parallel.

This file knows the two forms of heads and follows exactly the inputs they were trained on. It knows no model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, cast, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fewstep.core.draft import Drafter, Handle, Verdict
from fewstep.core.mixer import Context, State, Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.config import HeadsDrafterConfig, Load
from fewstep.decode.drafters.grow import Mode, cut, grow
from fewstep.decode.prefill import placement
from fewstep.nn.heads import ParallelHeads, SequentialHeads
from fewstep.nn.mixers.attention import AttentionState
from fewstep.nn.packed import PackedModules, packed_modules


@final
class MultiTokenConfig(HeadsDrafterConfig):
    """Draft with the heads that came with the checkpoint.

    `branching`: the children of each node, level by level; (): a chain as deep as the heads. `mode`: "drawn" nodes are sampled
    from the heads' law, siblings without replacement; "chosen" nodes are its most likely ones. `reads`: how many of the prompt's
    last positions the heads read; None: all, as they were trained. On `code-nano` 64 of 100 to 150 accept 0.4% fewer tokens a
    call than all, and a prompt costs the heads half.
    """

    kind: ClassVar[str] = "mtp"
    source: ClassVar[str] = "Gloeckle et al. 2024, arXiv 2404.19737; DeepSeek-V3, arXiv 2412.19437"
    claims: ClassVar[tuple[str, ...]] = ("mtp",)

    branching: tuple[Annotated[int, Field(ge=1)], ...] = ()
    mode: Mode = "drawn"
    reads: int | None = Field(default=64, ge=1)

    def build(self, target: Target, load: Load) -> "Drafter[HeadsState]":
        heads: Any = self.heads(target, load, SequentialHeads, ParallelHeads)
        branching = self.branching or (1,) * heads.depth
        if len(branching) > heads.depth:
            raise ValueError(
                f"drafter.branching={branching}: {len(branching)} levels, the model has {heads.depth} heads; shorten it"
            )
        if max(branching) > target.vocab:
            raise ValueError(f"drafter.branching={branching}: more children than the {target.vocab} tokens there are; lower it")
        if isinstance(heads, SequentialHeads):
            return SequentialDrafter(heads, target, branching, self.mode, self.reads)
        return ParallelDrafter(heads, target, branching, self.mode, self.reads)


@final
@dataclass(frozen=True, slots=True)
class HeadsState:
    """Each head's cache, and the verified positions it has not seen: the tapped activations `fresh` [B,W,D], of which the last
    `count` [B] of a row are real, and the tokens that follow them but for the root, `tokens` [B,W-1]. `carry`: the last certain
    output of each module but the last, [M,B,1,D] (None before the first proposal, and for parallel heads)."""

    caches: tuple[State, ...]
    fresh: Tensor
    tokens: Tensor
    count: Tensor
    carry: Tensor | None = None

    def fork(self, rows: Tensor) -> "HeadsState":
        carry = None if self.carry is None else self.carry[:, rows]
        caches = tuple(cache.fork(rows) for cache in self.caches)
        return HeadsState(caches, self.fresh[rows], self.tokens[rows], self.count[rows], carry)

    def join(self, other: "HeadsState") -> "HeadsState":
        if (self.carry is None) != (other.carry is None):
            raise ValueError("join: one batch has drafted and the other has not; let both propose once first")
        width = max(self.fresh.shape[1], other.fresh.shape[1])
        fresh = torch.cat([functional.pad(s.fresh, (0, 0, width - s.fresh.shape[1], 0)) for s in (self, other)])
        tokens = torch.cat([functional.pad(s.tokens, (width - s.fresh.shape[1], 0)) for s in (self, other)])
        carry = None
        if self.carry is not None and other.carry is not None:
            carry = torch.cat([self.carry, other.carry], 1)
        caches = tuple(mine.join(theirs) for mine, theirs in zip(self.caches, other.caches, strict=True))
        return HeadsState(caches, fresh, tokens, torch.cat([self.count, other.count]), carry)

    def nbytes(self) -> int:
        carried = 0 if self.carry is None else self.carry.nbytes
        return sum(cache.nbytes() for cache in self.caches) + self.fresh.nbytes + self.tokens.nbytes + self.count.nbytes + carried


class _HeadsDrafter:
    """What both forms share: what is remembered of prompt and verdict."""

    def __init__(
        self,
        heads: SequentialHeads | ParallelHeads,
        target: Target,
        branching: tuple[int, ...],
        mode: Mode,
        reads: int | None = None,
    ) -> None:
        self.taps: tuple[str, ...] = (heads.tap,)
        self.prompt_taps: tuple[str, ...] = self.taps
        self.target, self.branching, self.mode, self.reads = target, branching, mode, reads

    def _begun(self, caches: Iterable[State], prompt: Tree, hidden: Mapping[str, Tensor]) -> HeadsState:
        count = prompt.valid.sum(1)
        fresh, tokens = _aligned(hidden[self.taps[0]], count), _aligned(prompt.tokens, count)
        width = min(self.reads or prompt.size, prompt.size)
        fresh, tokens = fresh[:, prompt.size - width :], tokens[:, prompt.size - width + 1 :]
        return HeadsState(tuple(caches), fresh, tokens, count.clamp(max=width))

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: HeadsState) -> HeadsState:
        path, fresh = verdict.path[:, : max(verdict.keep.tolist())], hidden[self.taps[0]]
        if tree.size > 1:
            path = _aligned(path, verdict.keep)
            fresh = fresh.gather(1, path.unsqueeze(-1).expand(-1, -1, fresh.shape[-1]))
        return replace(state, fresh=fresh, tokens=tree.tokens.gather(1, path[:, 1:]), count=verdict.keep)


@final
class SequentialDrafter(_HeadsDrafter):
    """DeepSeek-V3's modules run as they were trained. Cost per proposal: one evaluation of each module used.

    With L the root's position, module k is certain of its inputs at positions up to L - k, because it also reads the token k
    ahead; beyond them it runs on the drafted tree itself, whose root stands for position L - k: the draft node of depth j is
    position L - k + j. Certain positions and draft nodes are one tree, and each reads module k-1's activation at its parent
    there. The certain ones are committed to the module's cache, the drafted dropped. Differs: a prompt shorter than the modules
    leaves a position of noise in their caches.
    """

    def __init__(
        self, heads: SequentialHeads, target: Target, branching: tuple[int, ...], mode: Mode, reads: int | None = None
    ) -> None:
        super().__init__(heads, target, branching, mode, reads)
        self.heads = heads
        self._packed = packed_modules(heads, len(branching), *target.ends)

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> HeadsState:
        device, dtype = placement(self.target)
        blocks = (self.heads.module(k).block for k in range(1, len(self.branching) + 1))
        caches = (block.init_state(prompt.batch, capacity, device=device, dtype=dtype) for block in blocks)
        return self._begun(caches, prompt, hidden)

    def propose(self, root: Tensor, state: HeadsState, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, HeadsState]:
        if self._packed is not None and state.carry is not None and handle.law.greedy and self._packed.takes(state.fresh):
            handle.charge(len(self.branching))
            return self._at_once(self._packed, root, state, budget)
        tree = Tree(root.unsqueeze(1), torch.full_like(root, -1).unsqueeze(1))
        width, count = state.fresh.shape[1], state.count
        chain, path = _chain(count, width)
        carries, caches = [], []
        reads = None
        h, parent, level = state.fresh, chain, 1  # level: nodes of the deepest level so far
        for k, (branch, cache) in enumerate(zip(self.branching, state.caches, strict=True), 1):
            tokens = torch.cat([state.tokens, tree.tokens], 1)
            if k > 1:
                carries.append(h[:, width - 1 : width])
                parent = _hung(chain, tree)
                reads = (parent + 1).clamp_(min=0)
                if state.carry is None:  # nothing came before the prompt: module k starts k - 1 tokens later
                    count = (count - 1).clamp(min=0)
                    parent[:, :width], path = _chain(count, width)
                    # padding reads nothing of another row's, also where it stands for the root of a prompt this short
                    reads[:, :width] = torch.where(parent[:, :width] > -2, torch.arange(width, device=reads.device), 0)
                before = torch.zeros_like(h[:, :1]) if state.carry is None else state.carry[k - 2]
                h = torch.cat([before, h], 1)
            module = self.heads.module(k)
            h, cache = module.extend(h, self.target.embed(tokens), Context(parent=parent), cache, reads)
            caches.append(cache.commit(path, count))
            logits = self.target.unembed(module.norm(h[:, -level:]))
            nodes = torch.arange(tree.size - level, tree.size, device=root.device).expand(tree.batch, -1)
            tree = grow(tree, nodes, handle.law(logits, tree, nodes), logits, branch, budget, self.mode, rng)
            level *= branch
            handle.charge(1)
        carry = torch.stack(carries) if carries else h.new_empty(0, *h[:, :1].shape)
        return cut(tree, int(budget.max())), replace(state, caches=tuple(caches), carry=carry)

    def _at_once(self, packed: PackedModules, root: Tensor, state: HeadsState, budget: Tensor) -> tuple[Tree, HeadsState]:
        """The same as one call of a kernel, where the most likely tokens are drafted whatever the history."""
        assert state.carry is not None
        tokens = torch.cat([state.tokens, root.unsqueeze(1)], 1)
        slotted = [cast(AttentionState, cache) for cache in state.caches]
        drafted, parent, carry = packed(state.fresh, tokens, state.count, slotted, state.carry, self.branching, budget)
        _, path = _chain(state.count, tokens.shape[1])
        caches = tuple(cache.reserve(None, tokens.shape[1]).commit(path, state.count) for cache in slotted)
        tree = cut(Tree(drafted, parent), int(budget.max()))
        return tree, HeadsState(caches, state.fresh, state.tokens, state.count, carry)


@final
class ParallelDrafter(_HeadsDrafter):
    """Gloeckle's heads: one evaluation of each head's block at the new positions; the levels of the tree are independent."""

    def __init__(
        self, heads: ParallelHeads, target: Target, branching: tuple[int, ...], mode: Mode, reads: int | None = None
    ) -> None:
        super().__init__(heads, target, branching, mode, reads)
        self.heads = heads

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> HeadsState:
        device, dtype = placement(self.target)
        blocks = (self.heads.block(k) for k in range(1, len(self.branching) + 1))
        caches = (block.init_state(prompt.batch, capacity, device=device, dtype=dtype) for block in blocks)
        return self._begun(caches, prompt, hidden)

    def propose(self, root: Tensor, state: HeadsState, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, HeadsState]:
        tree = Tree(root.unsqueeze(1), torch.full_like(root, -1).unsqueeze(1))
        parent, path = _chain(state.count, state.fresh.shape[1])
        caches, level = [], 1
        for k, (branch, cache) in enumerate(zip(self.branching, state.caches, strict=True), 1):
            h, cache = self.heads.block(k).extend(state.fresh, Context(parent=parent), cache)
            caches.append(cache.commit(path, state.count))
            logits = self.target.unembed(self.heads.norms[k - 1](h[:, -1:])).expand(-1, level, -1)
            nodes = torch.arange(tree.size - level, tree.size, device=root.device).expand(tree.batch, -1)
            tree = grow(tree, nodes, handle.law(logits, tree, nodes), logits, branch, budget, self.mode, rng)
            level *= branch
            handle.charge(1)
        return cut(tree, int(budget.max())), replace(state, caches=tuple(caches))


def _aligned(x: Tensor, count: Tensor) -> Tensor:
    """x [B,W] or [B,W,D] with the first `count` [B] entries of each row moved to its end; the others repeat its first."""
    width = x.shape[1]
    if min(count.tolist()) == width:
        return x
    index = (torch.arange(width, device=x.device) - (width - count).unsqueeze(1)).clamp_(min=0)
    return x.gather(1, index if x.ndim == 2 else index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _chain(count: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Parents [B,W] of the last `count` [B] of `width` nodes as a chain, the others padding, and the path [B,W] along it."""
    order = torch.arange(width, device=count.device).expand(len(count), -1)
    if min(count.tolist()) == width:
        return order - 1, order
    start = (width - count).unsqueeze(1)
    parent = torch.where(order > start, order - 1, torch.where(order == start, -1, -2))
    return parent, (order + start).clamp_(max=width - 1)


def _hung(chain: Tensor, tree: Tree) -> Tensor:
    """Parents [B,W+N-1] of a chain of W nodes and below its last one, which stands for the root, the other nodes of `tree`."""
    drafted = tree.parent[:, 1:]
    below = drafted + (chain.shape[1] - 1)
    return torch.cat([chain, below if int(drafted.min()) >= 0 else torch.where(drafted >= 0, below, -2)], 1)
