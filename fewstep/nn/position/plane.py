"""Rotary positions on a plane: image tokens have a row and a column. This file knows no image."""

import math
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.position import NoPosition, Shared
from fewstep.nn.position.encoding import EncodingConfig, wide
from fewstep.nn.position.rope import powers, tables, turn


class PlaneConfig(EncodingConfig):
    """Rotary positions [B,T,2]. Positions [B,T] are places in raster order on a grid of `columns`."""

    base: float = Field(default=100.0, gt=1)
    columns: int = Field(default=16, ge=1)


@final
class AxialRopeConfig(PlaneConfig):
    """Axial 2-D rotary positions: half of a head's pairs turn with the row, half with the column."""

    kind: ClassVar[str] = "rope_2d"
    source: ClassVar[str] = "Heo et al. 2024, arXiv 2403.13298, axial"

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "AxialRope":
        if head_width % 4:
            raise ValueError(f"head_width={head_width}: each of two axes turns pairs of channels; choose a multiple of 4")
        return AxialRope(self, head_width)


@final
class MixedRopeConfig(PlaneConfig):
    """Mixed 2-D rotary positions: the frequencies of every pair along both axes are learned, so diagonals are seen too."""

    kind: ClassVar[str] = "rope_mixed"
    source: ClassVar[str] = "Heo et al. 2024, arXiv 2403.13298, mixed"
    shared: ClassVar[bool] = False

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "MixedRope":
        if head_width % 2:
            raise ValueError(f"head_width={head_width}: rope turns pairs of channels; choose an even width")
        return MixedRope(self, head_width)


@final
class AxialRope(NoPosition):
    """Pairs (i, i + E/2): of the E/2, the first half turns by row x frequency, the second by column x the same frequencies.

    Source: arXiv 2403.13298. Differs: the pairs of an axis lie together, where the paper alternates them.
    """

    parts = frozenset({"rotate"})

    def __init__(self, config: AxialRopeConfig, head_width: int) -> None:
        super().__init__()
        self.kind, self.config, self.head_width = config.kind, config, head_width

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        return turn(q, *self._table(q_pos, q)), turn(k, *self._table(k_pos, k))

    def _table(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        places = on_plane(positions, self.config.columns, self.kind).to(wide(x))
        frequencies = powers(self.config.base, self.head_width // 2, x.device, wide(x))
        return tables((places.unsqueeze(-1) * frequencies).flatten(2).unsqueeze(1), x.dtype)


@final
class MixedRope(NoPosition):
    """Pairs (i, i + E/2) turn by row x f_i + column x g_i, f and g learned by each layer.

    Source: arXiv 2403.13298. Differs: the heads of a layer share their frequencies, so that grouped queries have one key.
    They start as rotated axial ones, in directions spread over the circle. In bfloat16 they have 8 bits, and far places blur.
    """

    parts = frozenset({"rotate"})

    def __init__(self, config: MixedRopeConfig, head_width: int) -> None:
        super().__init__()
        self.kind, self.config = config.kind, config
        size = powers(config.base, head_width, torch.get_default_device(), torch.float32)
        direction = torch.rand(head_width // 2) * 2 * math.pi
        # one vector: as a matrix it would be orthogonalised by some optimizers
        self.frequencies = nn.Parameter(torch.cat([size * direction.cos(), size * direction.sin()]))

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        return turn(q, *self._table(q_pos, q)), turn(k, *self._table(k_pos, k))

    def _table(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        places = on_plane(positions, self.config.columns, self.kind).to(wide(x))
        return tables((places @ self.frequencies.to(wide(x)).view(2, -1)).unsqueeze(1), x.dtype)


def on_plane(positions: Tensor, columns: int, kind: str) -> Tensor:
    """[B,T,2] rows and columns: `positions` themselves, or what their places [B,T] in raster order are on that grid."""
    if positions.ndim == 2:
        return torch.stack([positions // columns, positions % columns], -1)
    if positions.shape[-1] != 2:
        raise ValueError(
            f"positions: {positions.shape[-1]} axes in {tuple(positions.shape)}; {kind} takes two, or places in order"
        )
    return positions
