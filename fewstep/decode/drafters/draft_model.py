"""Speculation with a second, smaller model of the same vocabulary. This file knows models through `Target` only."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fewstep.core.draft import Handle, Verdict
from fewstep.core.mixer import State, Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.prefill import placement, prefill
from fewstep.decode.verify import draw


class DraftModelConfig(DrafterConfig):
    """Draft with the model in the directory `path`.

    `branching`: the children of each node, level by level; (1, 1, 1) is a chain of three, (3, 1) three chains of two. `mode`:
    "drawn" nodes are sampled from the draft model's law, siblings without replacement; "chosen" nodes are its most likely ones.
    """

    kind: ClassVar[str] = "draft_model"
    source: ClassVar[str] = "Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318"
    claims: ClassVar[tuple[str, ...]] = ("speculative-sampling",)

    path: str = ""
    branching: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 1, 1, 1), min_length=1)
    mode: Literal["drawn", "chosen"] = "drawn"

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

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> DraftState:
        limit = self.model.max_positions
        if limit is not None and capacity > limit:
            raise ValueError(
                f"drafter.path={self.config.path!r}: a context of {limit} tokens, {capacity} are needed; "
                "lower max_new_tokens or use a draft model with a longer context"
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
            tree = self._grown(tree, nodes, handle.law(logits, tree, nodes), logits, branch, budget, rng)
            count *= branch
            if tree.size >= widest:
                break
        cut = Tree(tree.tokens[:, :widest], tree.parent[:, :widest], None if tree.q is None else tree.q[:, :widest])
        return cut, replace(state, model=model.rollback(), tail=state.tail[:, :0], count=torch.zeros_like(state.count))

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

    def _grown(self, tree: Tree, nodes: Tensor, law: Tensor, logits: Tensor, branch: int, budget: Tensor, rng: Rng) -> Tree:
        """`tree` with `branch` children under each of `nodes` [B,K]."""
        parent = nodes.repeat_interleave(branch, 1)
        index = tree.size + torch.arange(parent.shape[1], device=parent.device)
        q = None
        if self.config.mode == "drawn" and law.is_floating_point():
            tokens, possible, q = _drawn(law, branch, rng.uniform(int(index[-1]) + 1)[:, index])
            q = torch.cat([q.new_zeros(tree.batch, 1, q.shape[-1]) if tree.q is None else tree.q, q], 1)
        else:
            tokens, possible = _chosen(law, logits, branch)
        # a node is left out by its place, its parent or for want of a token: never for its own value
        valid = possible & tree.valid.gather(1, parent) & (index < budget.unsqueeze(1))
        return Tree(torch.cat([tree.tokens, tokens], 1), torch.cat([tree.parent, torch.where(valid, parent, -2)], 1), q)


def _drawn(law: Tensor, branch: int, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Children without replacement: tokens [B,K*branch], whether one was left, and their laws q [B,K*branch,V]."""
    batch, count, vocab = law.shape
    tokens, laws = [], []
    for number in uniform.view(batch, count, branch).unbind(2):
        mass = law.sum(-1, keepdim=True)
        law = torch.where(mass > 0, law / mass, 0.0)
        tokens.append(draw(law, number))
        laws.append(law)
        law = law.scatter(-1, tokens[-1].unsqueeze(-1), 0.0)
    q = torch.stack(laws, 2).view(batch, count * branch, vocab)
    return torch.stack(tokens, 2).view(batch, -1), q.sum(-1) > 0, q


def _chosen(law: Tensor, logits: Tensor, branch: int) -> tuple[Tensor, Tensor]:
    """The most likely children: tokens [B,K*branch], and whether the law gives them any mass."""
    if law.is_floating_point():
        best = law.topk(branch)
        return best.indices.flatten(1), (best.values > 0).flatten(1)
    # greedy: the law's token first (a penalty may have moved it), then the next best logits
    best = logits.scatter(-1, law.unsqueeze(-1), torch.inf).topk(branch)
    return best.indices.flatten(1), torch.ones_like(best.indices, dtype=torch.bool).flatten(1)
