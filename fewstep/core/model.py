"""What the token loops need of a language model. This file knows no model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, final

import torch
from torch import Tensor, nn

from fewstep.core.mixer import Aux, Mask, State, Tree


@final
@dataclass(frozen=True, slots=True)
class Output:
    """One evaluation: `logits` [B,K,V] at the nodes asked for (None: none were), tapped activations by name, the new state."""

    logits: Tensor | None
    hidden: Mapping[str, Tensor]
    state: State
    aux: Aux = field(default_factory=dict)


class Target(Protocol):
    """A language model as the decoding loop and the drafters see it.

    `heads` holds the extra networks that came with the checkpoint, by drafter name ("mtp", later "medusa", "eagle3", ...).
    Tap names: "embed", "layer.i" (the residual after block i), "hidden" (before the last norm), "final", "logits".
    """

    vocab: int
    width: int
    depth: int
    max_positions: int | None

    @property
    def heads(self) -> Mapping[str, nn.Module]: ...

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        """The modules behind `embed` and `unembed`, which drafters share."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """[B,N] -> [B,N,D]."""
        ...

    def unembed(self, h: Tensor, ids: Tensor | None = None) -> Tensor:
        """[..., D] after the last norm -> logits [..., V], or [..., len(ids)] for a reduced draft vocabulary."""
        ...

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """An empty state for at most `capacity` tokens a row, pending ones included."""
        ...

    def extend(
        self,
        tree: Tree,
        state: State,
        *,
        taps: tuple[str, ...] = (),
        need: Tensor | None = None,
        mask: Mask | None = None,
        positions: Tensor | None = None,
        inputs: Tensor | None = None,
        layers: range | None = None,
    ) -> Output:
        """Run `tree` as pending nodes after `state`.

        `need` [B,K] int64: the nodes (indices into `tree`) whose logits are wanted; None: all. `inputs` [B,N,D] replaces the
        embedded tokens; `layers` runs only those blocks (early exit), and such nodes can only be rolled back. With both, and
        blocks before `layers`, the call resumes: those blocks gave `inputs` for the same nodes just before the last rollback and
        have kept what they computed, so that the nodes can be committed. Raises ValueError over capacity or `max_positions`, or
        for a state that cannot resume.
        """
        ...
