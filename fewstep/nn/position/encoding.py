"""What the configs of all position encodings share, and the distances that relative ones are made of. Knows no encoding."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from fewstep.core.position import NoPosition
from fewstep.core.recipe import Config


class EncodingConfig(Config, ABC):
    """A position encoding. `shared`: all layers of a model use one module; else each layer has parameters of its own."""

    shared: ClassVar[bool] = True

    @abstractmethod
    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> NoPosition:
        """The module for a model of `width` (None: heads x head_width) with query `heads` of `head_width`.

        Raises ValueError for sizes that the encoding cannot take.
        """


def one_axis(positions: Tensor, kind: str) -> Tensor:
    """`positions` if they are [B,T]. Raises ValueError for several axes."""
    if positions.ndim != 2:
        raise ValueError(f"positions: {tuple(positions.shape)} has several axes; {kind} takes [rows, tokens], rope_2d takes two")
    return positions


def wide(x: Tensor) -> torch.dtype:
    """The dtype that angles, distances and the like are computed in for activations x: float32, or x's if it is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def back(q_pos: Tensor, k_pos: Tensor, kind: str) -> Tensor:
    """[B or 1,Q,K] int64: how far before each query each key lies, i - j; negative for keys behind it."""
    return one_axis(q_pos, kind)[:, :, None] - one_axis(k_pos, kind)[:, None, :]


def span(distance: Tensor) -> tuple[Tensor, Tensor]:
    """Every distance [R] between the least and the greatest of `distance` [...], and their indices in it [...].

    What depends on the distance alone is computed R times, not once a pair.
    """
    low, high = (int(end) for end in distance.aminmax())
    return torch.arange(low, high + 1, device=distance.device), distance - low


def by_distance(table: Tensor, index: Tensor) -> Tensor:
    """[R,H] numbers by distance at `index` [B,Q,K]: [B,H,Q,K]."""
    return embedding(index, table).permute(0, 3, 1, 2)


def pick(scores: Tensor, index: Tensor) -> Tensor:
    """`scores` [B,H,Q,R] at `index` [B or 1,Q,K]: [B,H,Q,K]."""
    return scores.gather(3, index.unsqueeze(1).expand(*scores.shape[:2], -1, -1))


def per_head(k: Tensor, heads: int) -> Tensor:
    """Keys [B,G,K,E] as each of `heads` query heads sees them [B,H,K,E]."""
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)


@final
class Kept:
    """What was made of a module's weights, kept through calls in inference mode as long as the weights stay what they are.

    Any other call forgets it: those of a training run, whose fused optimizers change weights without counting a version.
    """

    def __init__(self) -> None:
        self._known: tuple[Any, Any, tuple[Tensor, ...]] | None = None

    def __call__(self, module: nn.Module, key: object, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` gives, or what it gave before for the same weights and an equal `key`."""
        parameters = list(module.parameters())
        if not torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in parameters):  # no versions
            self._known = None
            return make()
        weights = [(parameter, parameter.data_ptr(), parameter._version) for parameter in parameters]
        if self._known is None or self._known[0] != key or not _same(self._known[1], weights):
            self._known = key, weights, make()
        return self._known[2]


def _same(weights: Sequence[tuple[Tensor, int, int]], others: Sequence[tuple[Tensor, int, int]]) -> bool:
    return len(weights) == len(others) and all(
        mine[0] is theirs[0] and mine[1:] == theirs[1:] for mine, theirs in zip(weights, others, strict=True)
    )
