"""Self-speculation: the target drafts with its own first blocks. This file knows no network but the target."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.core.draft import Handle, Verdict
from fewstep.core.mixer import Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.drafters.grow import Mode, cut, grow
from fewstep.decode.drafters.silent import Nothing


@final
class EarlyExitConfig(DrafterConfig):
    """Draft with the first `layers` blocks of the target (0: a third of them), or with every `stride`-th of those.

    `branching`: the children of each node, level by level. `mode`: "drawn" nodes are sampled from the early exit's law, siblings
    without replacement; "chosen" nodes are its most likely ones. `confidence`: a node whose likeliest next token has, in the
    early exit's softmax, a probability below it gets no children; 0: never. `reuse`: verification takes up the drafted nodes
    where the first blocks left them; with stride 1 only.
    """

    kind: ClassVar[str] = "early_exit"
    source: ClassVar[str] = "Elhoushi et al. 2024, LayerSkip, arXiv 2404.16710; Zhang et al. 2023, arXiv 2309.08168"

    layers: int = Field(default=0, ge=0)
    stride: int = Field(default=1, ge=1)
    branching: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 1, 1, 1), min_length=1)
    mode: Mode = "drawn"
    confidence: float = Field(default=0.0, ge=0, lt=1)
    reuse: bool = False

    @model_validator(mode="after")
    def _whole(self) -> "EarlyExitConfig":
        if self.reuse and self.stride > 1:
            raise ValueError(f"reuse=True: with stride={self.stride} blocks are missing in between; set stride=1 or reuse=false")
        return self

    def build(self, target: Target, load: Load) -> "EarlyExit":
        if self.layers > target.depth:
            raise ValueError(f"drafter.layers={self.layers}: the model has {target.depth}; lower it, a third of them is usual")
        if max(self.branching) > target.vocab:
            raise ValueError(
                f"drafter.branching={self.branching}: more children than the {target.vocab} tokens there are; lower it"
            )
        return EarlyExit(self, range(0, self.layers or max(1, target.depth // 3), self.stride))


@final
class EarlyExit:
    """A tree of fixed shape grown level by level, numbered breadth first and cut at the row's budget.

    A stop leaves drawn nodes drawn: whether a node is there depends on the law it was drawn from, that is on its ancestors, and
    on neither its own value nor its siblings'. (To drop the token whose own probability is low would bias the output.) Norm and
    unembedding are the target's. Cost: one evaluation of `layers` per level. With `reuse` the first blocks run each node once,
    the last level in an evaluation of its own, and verification runs the other blocks on top of their keys, values and outputs:
    that saves arithmetic, where trees or batches are large, and no reading of weights, which is what small calls cost.
    Source: LayerSkip section 4.3; with a stride it is Draft & Verify with every n-th block kept. Differs: Draft & Verify
    searches for the blocks to skip, attention and MLP apart (as there, blocks after a gap read the keys and values that the
    whole network left for committed tokens).
    """

    taps: tuple[str, ...] = ()
    prompt_taps: tuple[str, ...] = ()

    def __init__(self, config: EarlyExitConfig, layers: range) -> None:
        self.config, self.layers = config, layers
        self._kept = (f"layer.{layers[-1]}",) if config.reuse else ()

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> Nothing:
        return Nothing()

    def propose(self, root: Tensor, state: Nothing, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, Nothing]:
        tree = Tree(root.unsqueeze(1), torch.full_like(root, -1).unsqueeze(1))
        widest, count = int(budget.max()), 1  # count: nodes of the last level
        ran: list[Tensor] = []
        for branch in self.config.branching:
            if tree.size >= widest:
                break
            level = Tree(tree.tokens[:, -count:], tree.parent[:, -count:])
            output = handle.extend(level, layers=self.layers, taps=self._kept)
            logits = output.logits
            assert logits is not None
            ran += output.hidden.values()
            nodes = torch.arange(tree.size - count, tree.size, device=root.device).expand(tree.batch, -1)
            grown = grow(tree, nodes, handle.law(logits, tree, nodes), logits, branch, budget, self.config.mode, rng)
            count *= branch
            if self.config.confidence:
                sure = logits.float().softmax(-1).amax(-1) >= self.config.confidence
                grown = _without(grown, ~sure.repeat_interleave(branch, 1))
                if not bool(grown.valid[:, -count:].any()):
                    break
            tree = grown
        tree = cut(tree, widest)
        if ran:
            self._resume(tree, ran, handle)
        return tree, state

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: Nothing) -> Nothing:
        return state

    def _resume(self, tree: Tree, ran: list[Tensor], handle: Handle) -> None:
        """Run the nodes that had no children to be drafted too, and leave the other blocks to verification."""
        done = sum(x.shape[1] for x in ran)
        if done < tree.size:
            first = torch.zeros_like(tree.tokens[:, :1])  # logits are not wanted: of one node they cost little
            leaves = Tree(tree.tokens[:, done:], tree.parent[:, done:])
            ran += handle.extend(leaves, layers=self.layers, taps=self._kept, need=first).hidden.values()
        handle.resume(range(self.layers.stop, handle.target.depth), torch.cat(ran, 1))


def _without(tree: Tree, dropped: Tensor) -> Tree:
    """`tree` with those of its last nodes made padding that `dropped` [B,K] marks."""
    kept = tree.parent.shape[1] - dropped.shape[1]
    last = tree.parent[:, kept:].masked_fill(dropped, -2)
    return replace(tree, parent=torch.cat([tree.parent[:, :kept], last], 1))
