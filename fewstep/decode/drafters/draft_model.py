"""Speculation with a second, smaller model of the same vocabulary. This file knows models through `Target` only."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fewstep.core.draft import Handle, Verdict
from fewstep.core.mixer import State, Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.drafters.grow import Mode, cut, grow
from fewstep.decode.prefill import placement, prefill


@final
class DraftModelConfig(DrafterConfig):
    """Draft with the model in the directory `path`.

    `branching`: the children of each node, level by level; (1, 1, 1) is a chain of three, (3, 1) three chains of two. `mode`:
    "drawn" nodes are sampled from the draft model's law, siblings without replacement; "chosen" nodes are its most likely ones.
    """

    kind: ClassVar[str] = "draft_model"
    source: ClassVar[str] = "Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318"
    claims: ClassVar[tuple[str, ...]] = ("speculative-sampling", "spec-bench")

    path: str = ""
    branching: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 1, 1, 1), min_length=1)
    mode: Mode = "drawn"

    def build(self, target: Target, load: Load) -> "DraftModel":
        if not self.path:
            raise ValueError("drafter.path='': empty; give the directory of a smaller model with the same tokenizer")
        return DraftModel(self, load(self.path), target)


@final
@dataclass(frozen=True, slots=True)
class DraftState:
    """The draft model's state and the committed tokens that it has not seen yet: the first `count[b]` of `tail` [B,W]."""

    model: State
    tail: Tensor
    count: Tensor

    def fork(self, rows: Tensor) -> "DraftState":
        return DraftState(self.model.fork(rows), self.tail[rows], self.count[rows])

    def join(self, other: "DraftState") -> "DraftState":
        width = max(self.tail.shape[1], other.tail.shape[1])
        tails = [functional.pad(tail, (0, width - tail.shape[1])) for tail in (self.tail, other.tail)]
        return DraftState(self.model.join(other.model), torch.cat(tails), torch.cat([self.count, other.count]))

    def nbytes(self) -> int:
        return self.model.nbytes() + self.tail.nbytes + self.count.nbytes


@final
class DraftModel:
    """A tree of fixed shape grown level by level, numbered breadth first and cut at the row's budget.

    Cost: one draft evaluation per level; the first of them also feeds the tokens accepted in the step before.
    Differs: every drafted node is rolled back after the proposal and the accepted ones are fed again with the next root, which
    costs no evaluation and lets any state, recurrent ones too, follow any tree.
    """

    taps: tuple[str, ...] = ()
    prompt_taps: tuple[str, ...] = ()

    def __init__(self, config: DraftModelConfig, model: Target, target: Target) -> None:
        """Raises ValueError if the two models do not share a vocabulary size."""
        if model.vocab != target.vocab:
            raise ValueError(
                f"drafter.path={config.path!r}: a vocabulary of {model.vocab} tokens, the target's has {target.vocab}; "
                "use a draft model with the target's tokenizer"
            )
        if max(config.branching) > model.vocab:
            raise ValueError(
                f"drafter.branching={config.branching}: more children than the {model.vocab} tokens there are; lower it"
            )
        self.config, self.model = config, model
        # what fits a target with no longer a context fits the draft model too, to the last token
        own, theirs = model.max_positions, target.max_positions
        self._limit = own if own is not None and (theirs is None or own < theirs) else None

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> DraftState:
        if self._limit is not None and capacity > self._limit:
            raise ValueError(
                f"drafter.path={self.config.path!r}: a context of {self._limit} tokens, {capacity} are needed (drafted ones "
                "included); lower max_new_tokens or use a draft model with a longer context"
            )
        device, dtype = placement(self.model)
        empty = self.model.init_state(prompt.batch, capacity, device=device, dtype=dtype)
        state = prefill(self.model, prompt, empty).state
        return DraftState(state, prompt.tokens[:, :0], torch.zeros_like(prompt.tokens[:, 0]))

    def propose(self, root: Tensor, state: DraftState, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, DraftState]:
        logits, model = self._catch_up(root, state)
        handle.charge(1)
        tree = Tree(root.unsqueeze(1), torch.full_like(root, -1).unsqueeze(1))
        widest = int(budget.max())
        count = 1  # nodes of the last level
        for branch in self.config.branching:
            if tree.size > 1:
                level = Tree(tree.tokens[:, -count:], torch.where(tree.valid, tree.parent - 1, -2)[:, -count:])
                output = self.model.extend(level, model)
                assert output.logits is not None
                logits, model = output.logits, output.state
                handle.charge(1)
            nodes = torch.arange(tree.size - count, tree.size, device=root.device).expand(tree.batch, -1)
            tree = grow(tree, nodes, handle.law(logits, tree, nodes), logits, branch, budget, self.config.mode, rng)
            count *= branch
            if tree.size >= widest:
                break
        return cut(tree, widest), replace(
            state, model=model.rollback(), tail=state.tail[:, :0], count=torch.zeros_like(state.count)
        )

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: DraftState) -> DraftState:
        accepted = verdict.keep - 1  # the root was fed when it was proposed from
        tail = tree.tokens.gather(1, verdict.path[:, 1 : 1 + int(accepted.max())])
        return replace(state, tail=tail, count=accepted)

    def _catch_up(self, root: Tensor, state: DraftState) -> tuple[Tensor, State]:
        """The draft logits [B,1,V] after the root, with the tail and the root committed."""
        tokens = functional.pad(state.tail, (0, 1)).scatter(1, state.count.unsqueeze(1), root.unsqueeze(1))
        output = self.model.extend(Tree.chain(tokens, state.count + 1), state.model, need=state.count.unsqueeze(1))
        assert output.logits is not None
        order = torch.arange(tokens.shape[1], device=root.device).expand_as(tokens)
        return output.logits, output.state.commit(order, state.count + 1)
