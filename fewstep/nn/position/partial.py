"""Rotary positions in other layouts: adjacent pairs, and a part of the channels. This file knows whole-head rotation by name."""

from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.position import NoPosition, Shared
from fewstep.core.recipe import choice
from fewstep.nn.position.encoding import EncodingConfig
from fewstep.nn.position.rope import Rope, RopeConfig
from fewstep.nn.position.stretched import NtkConfig, YarnConfig


def _rotary() -> dict[str, Any]:
    return {config.kind: config for config in (RopeConfig, NtkConfig, YarnConfig)}


@final
class PartialRopeConfig(EncodingConfig):
    """Rotary positions on the first `share` of a head's channels, in pairs (2i, 2i+1) or (i, i + n/2).

    Adjacent and whole is RoFormer, adjacent and partial GPT-J, half-split and partial GPT-NeoX. `rope` gives the frequencies of
    the channels that turn.
    """

    kind: ClassVar[str] = "rope_partial"
    source: ClassVar[str] = "Su et al. 2021, arXiv 2104.09864 (adjacent); Black et al. 2022, arXiv 2204.06745 (a part)"

    layout: Literal["adjacent", "half"] = "adjacent"
    share: float = Field(default=0.5, gt=0, le=1)
    rope: choice(_rotary, "rope") = RopeConfig()  # type: ignore[valid-type]

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "PartialRope":
        turned = round(head_width * self.share)
        if turned < 2 or turned % 2:
            raise ValueError(f"share={self.share}: turns {turned} of head_width={head_width} channels; make it an even number")
        return PartialRope(self, turned)


@final
class PartialRope(NoPosition):
    """Rotates the first `turned` channels; the others pass. Cost: as `Rope`, on these."""

    parts = frozenset({"rotate"})

    def __init__(self, config: PartialRopeConfig, turned: int) -> None:
        super().__init__()
        self.kind, self.turned, self.adjacent = config.kind, turned, config.layout == "adjacent"
        inner: Rope = config.rope.build(head_width=turned)
        self.rope = inner

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        q_in, k_in = (self._paired(x[..., : self.turned]) for x in (q, k))
        q_out, k_out = self.rope.rotate(q_in, k_in, q_pos, k_pos, shared)
        return self._whole(q_out, q), self._whole(k_out, k)

    def _paired(self, x: Tensor) -> Tensor:
        """The channels that turn, as half-split pairs."""
        return torch.cat([x[..., 0::2], x[..., 1::2]], -1) if self.adjacent else x

    def _whole(self, x: Tensor, before: Tensor) -> Tensor:
        """Turned channels back in their own order, and those that pass."""
        if self.adjacent:
            x = torch.stack(x.chunk(2, -1), -1).flatten(-2)
        return torch.cat([x, before[..., self.turned :]], -1)
