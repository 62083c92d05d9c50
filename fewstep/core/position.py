"""What a position encoding may do: add to the input, rotate queries and keys, bias the scores, change the values.

Every part is optional: an encoding that has no part of its own inherits the neutral one from `NoPosition`. This file knows
no encoding but the absent one.
"""

from typing import Any, Protocol

from torch import Tensor, nn

Shared = dict[Any, Any]


class Position(Protocol):
    """B rows, T tokens, D width, H heads, Q queries, K keys, E head width. Positions are int64 [B,T] or [B,T,P] (P axes)."""

    embeds: bool  # whether `embed` does anything: a cached call computes positions for it

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,D], before the first layer."""
        ...

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """q [B,H,Q,E] and k [B,G,K,E] turned by their own positions; a key turned once may be cached.

        `shared` is the call's `Context.shared`: tables are made by the first layer and read by the others.
        """
        ...

    def bias(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        """[B,H,Q,K] added to the scaled scores, or None."""
        ...

    def value(self, weights: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        """[B,H,Q,E] added to the output for attention `weights` [B,H,Q,K] (Shaw), or None."""
        ...


class NoPosition(nn.Module):
    """The encoding that does nothing, and the base that gives others their neutral parts."""

    embeds = False

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        return q, k

    def bias(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        return None

    def value(self, weights: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        return None
