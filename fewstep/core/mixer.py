"""What a sequence mixer is: token trees, masks, the context of a call, the state kept between calls.

A chunk of tokens is a tree with one branch, so one `extend` serves prefill, plain decoding and tree verification. This file
knows no mixer and no model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, final

import torch
from torch import Tensor

from fewstep.core.random import Rows


@final
@dataclass(frozen=True, slots=True)
class Tree:
    """A tree of tokens per row, in topological order.

    `tokens` [B,N] int64. `parent` [B,N] int64: the index of each node's parent among all nodes pending since the last commit
    (over several extends the indices go on counting), -1 for a node whose parent is the last committed token, -2 for padding
    (attended by nothing, never accepted). `q` [B,N,V]: the law node n was drawn from after removing its earlier siblings; an
    all-zero row marks a chosen node; None: every node was chosen. A node counts as drawn only if `q` is its law given its
    ancestors and earlier siblings alone and its inclusion does not depend on its own value or its descendants.
    """

    tokens: Tensor
    parent: Tensor
    q: Tensor | None = None

    @classmethod
    def chain(cls, tokens: Tensor, lengths: Tensor | None = None, start: int = 0) -> "Tree":
        """A single branch [B,N] that follows pending node `start - 1`; nodes at or beyond `lengths` [B] are padding."""
        batch, count = tokens.shape
        index = torch.arange(count, device=tokens.device)
        parent = (index + (start - 1)).expand(batch, count)
        if lengths is not None:
            parent = torch.where(index < lengths[:, None], parent, -2)
        return cls(tokens, parent)

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def size(self) -> int:
        return self.tokens.shape[1]

    @property
    def valid(self) -> Tensor:
        """[B,N] bool: True where a node is not padding."""
        return self.parent > -2


def ancestors(parent: Tensor) -> Tensor:
    """[B,N,N] bool: entry [b,i,j] is True iff node j is node i or one of its ancestors. Padding rows hold only themselves.

    `parent` [B,N] must count all pending nodes (index = node). Cost: O(depth) gathers of [B,N,N], one pass for chains.
    """
    batch, count = parent.shape
    starts = _starts(parent)
    if starts is not None:
        order = torch.arange(count, device=parent.device)
        return (order <= order[:, None]) & (order >= starts[:, :, None])
    reach = torch.eye(count, dtype=torch.bool, device=parent.device).repeat(batch, 1, 1)
    current = parent
    while bool((current >= 0).any()):
        step = torch.zeros_like(reach).scatter_(2, current.clamp(min=0).unsqueeze(-1), (current >= 0).unsqueeze(-1))
        reach |= step
        current = torch.where(current >= 0, parent.gather(1, current.clamp(min=0)), current)
    return reach


def depths(parent: Tensor) -> Tensor:
    """[B,N] int64: 0 for a node with no pending parent, else its parent's depth + 1; 0 for padding."""
    starts = _starts(parent)
    if starts is not None:
        return torch.arange(parent.shape[1], device=parent.device) - starts
    depth = torch.zeros_like(parent)
    current = parent
    while bool((current >= 0).any()):
        depth += current >= 0
        current = torch.where(current >= 0, parent.gather(1, current.clamp(min=0)), current)
    return depth


def _starts(parent: Tensor) -> Tensor | None:
    """[B,N] where the chain of each node begins, if every node follows the one before it or none (prompts, whatever their
    padding): their relations need no walk up the tree. None for other trees."""
    order = torch.arange(parent.shape[1], device=parent.device)
    follows = parent == order - 1
    if not bool((follows | (parent < 0)).all()):
        return None
    return torch.where(parent < 0, order, 0).cummax(1).values


@final
@dataclass(frozen=True, slots=True)
class Causal:
    """Each token sees itself and everything before it (on its own branch)."""


@final
@dataclass(frozen=True, slots=True)
class Window:
    """Causal, and at most `size` tokens back, itself included."""

    size: int


@final
@dataclass(frozen=True, slots=True)
class Full:
    """Every token sees every token of its sequence."""


@final
@dataclass(frozen=True, slots=True)
class Blocks:
    """Block diffusion: full inside a block of `size`, causal between blocks."""

    size: int


@final
@dataclass(frozen=True, slots=True)
class Doubled:
    """Block diffusion's training mask over [x_t ; x_0]: x_t sees its own block and earlier clean blocks, x_0 is block-causal."""

    size: int


@final
@dataclass(frozen=True, slots=True)
class Prefix:
    """Full inside the first `length` [B] tokens of a sequence, causal after them."""

    length: Tensor


@final
@dataclass(frozen=True, slots=True)
class Dense:
    """Any mask: `allowed` [B,T,S] bool, True where query t may see key s."""

    allowed: Tensor


Mask = Causal | Window | Full | Blocks | Doubled | Prefix | Dense


@final
@dataclass(frozen=True, slots=True)
class Context:
    """Everything about a call but the activations.

    `positions` [B,T] or [B,T,P] (several axes) int64; None, in a cached call: each token's index in its sequence, as the state
    counts them. `parent` [B,T]: as in `Tree`, None for a chain without padding.
    `segments` [B,T]: which packed sequence a token belongs to, -1 = padding; None: one sequence per row. `cond` [B,C] or
    [B,T,C]: time, class, block noise. `shared`: values one layer computed that later layers of the same call may read,
    written once per key by whoever needs it first; a mixer documents its keys.
    """

    positions: Tensor | None = None
    parent: Tensor | None = None
    segments: Tensor | None = None
    mask: Mask = Causal()
    cond: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict)


Aux = Mapping[str, Tensor]  # losses and counts of a layer, by name: returned, never stored


class State(Rows, Protocol):
    """What a mixer keeps between calls. Linear: extend, commit, rollback and join consume it; only fork copies.

    States join only when neither has pending nodes (ValueError otherwise).
    """

    def commit(self, path: Tensor, keep: Tensor) -> Self:
        """Keep the first `keep[b]` pending nodes of `path` [B,N] (in that order) as committed tokens, drop the rest."""
        ...

    def rollback(self) -> Self:
        """Drop all pending nodes."""
        ...


class Mixer(Protocol):
    """A map from [B,T,D] to [B,T,D] that lets tokens see one another, in a parallel form and, if causal, a stepwise one."""

    modes: frozenset[str]  # of "causal", "bidirectional"
    masks: frozenset[type]  # of the Mask classes
    encodings: frozenset[str]  # of "rotate", "bias", "value": the parts of a position encoding it honours; none: it reads none

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """An empty state for at most `capacity` tokens a row, pending ones included."""
        ...

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Aux]:
        """The parallel form over whole sequences."""
        ...

    def extend(self, x: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
        """T >= 1 new pending nodes, a chain or a tree; out of place when grad is on.

        Raises ValueError over capacity, before any write.
        """
        ...
