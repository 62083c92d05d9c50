"""What a position encoding may do: add to the input, rotate queries and keys, bias the scores, change the values.

Every part is optional: an encoding that has no part of its own inherits the neutral one from `NoPosition`. This file knows
no encoding but the absent one, and of mixers only which parts they honour.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

Shared = dict[Any, Any]

NEEDS: Mapping[str, str] = MappingProxyType(  # what a mixer must have, by the part of an encoding that it honours
    {
        "rotate": "queries and keys that an encoding may turn",
        "bias": "softmax scores that an encoding may add to",
        "value": "softmax weights that an encoding may add values by",
    }
)


class Position(Protocol):
    """B rows, T tokens, D width, H heads, Q queries, K keys, E head width, G key heads. Positions are int64 [B,T] or [B,T,P]
    (P axes); in `bias` and `value` they may have one row for all."""

    kind: str
    parts: frozenset[str]  # of "embed", "rotate", "bias", "value": what this encoding does
    pointwise: bool  # whether `embed` of a token depends on the token and its position alone; else no call can be cached
    length: int | None  # positions end before it; None: anywhere

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """[B,T,D] -> [B,T,D], before the first layer."""
        ...

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """q [B,H,Q,E] and k [B,G,K,E] turned by their own positions; a key turned once may be cached.

        `shared` is the call's `Context.shared`: tables are made by the first layer and read by the others.
        """
        ...

    def bias(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        """[B or 1,H,Q,K] added to the scores q k / sqrt(E), or None. q and k are what `rotate` gave."""
        ...

    def value(self, weights: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        """[B,H,Q,E] added to the output for attention `weights` [B,H,Q,K] (Shaw), or None."""
        ...


class NoPosition(nn.Module):
    """The encoding that does nothing, and the base that gives others their neutral parts."""

    kind = "none"
    parts: frozenset[str] = frozenset()
    pointwise = True
    length: int | None = None

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        return q, k

    def bias(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        return None

    def value(self, weights: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        return None


def fitted(position: NoPosition | None, mixer: str, encodings: frozenset[str]) -> NoPosition:
    """`position` (None: no encoding) for a `mixer` that honours the parts `encodings`, of "rotate", "bias" and "value".

    `embed` stands before the first layer, so every mixer takes it. A mixer that honours nothing orders tokens by itself: it gets
    no encoding and leaves any to the other layers of a hybrid. Raises ValueError, naming what another mixer lacks.
    """
    if position is None or not encodings:
        return NoPosition()
    lacking = [part for part in NEEDS if part in position.parts and part not in encodings]
    if lacking:
        raise ValueError(f"position={position.kind!r}: {mixer} has no {NEEDS[lacking[0]]}; choose another encoding or mixer")
    return position
