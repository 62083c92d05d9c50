"""Drafters, laws and verdicts: the three parties of speculative decoding. This file knows none of them by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar, final

from torch import Tensor

from fewstep.core.mixer import Tree
from fewstep.core.model import Output, Target
from fewstep.core.random import Rng, Rows


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier kept: the first `keep[b]` >= 1 nodes of `path` [B,N] (node 0 first), then the token `next` [B].

    Entries of `path` beyond `keep` are unspecified but valid indices.
    """

    path: Tensor
    keep: Tensor
    next: Tensor


# the tree, the target's laws after its nodes, the row's random numbers -> what is kept: as `decode.verify.verify` describes
Verify = Callable[[Tree, Tensor, Rng], Verdict]


class Law(Rows, Protocol):
    """The sampling transform of each row: temperature, top-k, top-p, min-p, penalties, later grammars.

    `greedy`: every law is the point mass on the largest logit, whatever the history.
    """

    @property
    def greedy(self) -> bool: ...

    def __call__(self, logits: Tensor, tree: Tree, nodes: Tensor | None = None) -> Tensor:
        """The law after each node of `tree`: [B,K,V] float64, or int64 [B,K] when every law is a point mass (greedy).

        `logits` [B,K,V] were computed at `nodes` [B,K] of `tree` (None: at every node, in order); the history along each path
        counts. Draft and target logits go through the same law.
        """
        ...

    def commit(self, tree: Tree, verdict: Verdict) -> Self:
        """The law after the kept nodes of `tree` joined the history (`verdict.next` joins when it is a node itself)."""
        ...


class Handle(Protocol):
    """What the loop lends to a drafter that borrows the target or its law for one proposal."""

    target: Target
    law: Law

    def extend(
        self, tree: Tree, *, layers: range | None = None, taps: tuple[str, ...] = (), need: Tensor | None = None
    ) -> Output:
        """The target on draft nodes, from its committed state; the loop drops these nodes after the proposal."""
        ...

    def resume(self, layers: range, inputs: Tensor) -> None:
        """Let verification run `layers` alone: the blocks before them ran every node of the tree to be proposed, in its order.

        `inputs` [B,N,D]: what those blocks gave. The tokens, and with row-wise arithmetic every bit, are those of a whole call.
        """
        ...

    def charge(self, calls: int) -> None:
        """Report that each row evaluated a draft network `calls` times; `Cost.draft_calls` counts them."""
        ...


S = TypeVar("S", bound=Rows)


class Drafter(Protocol[S]):
    """Proposes a tree of continuations; exactness never depends on what it proposes, only on the tree telling the truth.

    `taps` are the target activations it wants at every verified node, `prompt_taps` those at every node of the prompt: most
    drafters want the same of both ("logits" of a whole prompt are large). Its state `S` is kept per row.
    """

    taps: tuple[str, ...]
    prompt_taps: tuple[str, ...]

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> S:
        """The state after the prompt: a ragged chain (padding -2) with the tapped activations [B,T,...] at its nodes.

        `capacity`: the tokens a row may come to hold, with room for two trees: the one verified last and the one being drafted.
        """
        ...

    def propose(self, root: Tensor, state: S, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, S]:
        """A tree whose node 0 is `root` [B] (the last emitted token), of at most `budget` [B] >= 1 nodes a row, root included."""
        ...

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: S) -> S:
        """The state after the verdict on `tree`, with the tapped activations at every node of `tree`."""
        ...
