"""Positions that a convolution implies: at the edge of a text it reads zeros, and so knows where the edge is."""

from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from fewstep.core.position import NoPosition
from fewstep.nn.position.encoding import EncodingConfig, one_axis

_NOWHERE = -(1 << 40)  # the position of what is beyond the ends


@final
class ConvolutionConfig(EncodingConfig):
    """A zero-padded depthwise convolution over the input, added to it: over a token and the `reach` before it ("causal"), or
    `reach` on both sides ("both", for models that look both ways)."""

    kind: ClassVar[str] = "convolution"
    source: ClassVar[str] = "Islam et al. 2020, arXiv 2001.08248; Chu et al. 2021, arXiv 2102.10882 (as an encoding)"

    reach: int = Field(default=3, ge=1)
    side: Literal["causal", "both"] = "causal"

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "Convolution":
        return Convolution(self, width or heads * head_width)


@final
class Convolution(NoPosition):
    """x_t + sum_s w_s * x_(t-s), with zeros where a text does not reach. Cost: one multiply-add a tap and channel.

    It needs whole texts: a cached call is handed new tokens alone and branches of a tree beside one another, so `pointwise` is
    False and models refuse such a call. To decode, put a mixer with a short convolution, which keeps its history, under the
    attention. Differs: once before the first layer, where arXiv 2102.10882 has it after the first encoder.
    """

    kind = "convolution"
    parts = frozenset({"embed"})
    pointwise = False

    def __init__(self, config: ConvolutionConfig, width: int) -> None:
        super().__init__()
        self.offsets = range(-config.reach if config.side == "both" else 0, config.reach + 1)
        # flat: as a matrix it would be orthogonalised by some optimizers
        self.taps = nn.Parameter(torch.randn(len(self.offsets) * width) * (len(self.offsets) * 4) ** -0.5)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        count, before, after = x.shape[1], max(self.offsets), -min(self.offsets)
        one_axis(positions, self.kind)
        near, places = pad(x, (0, 0, before, after)), pad(positions, (before, after), value=_NOWHERE)
        y = x
        for tap, offset in zip(self.taps.view(len(self.offsets), -1), self.offsets, strict=True):
            part = slice(before - offset, before - offset + count)
            together = places[:, part] == positions - offset  # positions start anew with each text, and padding has its own
            y = y + tap * near[:, part].where(together.unsqueeze(-1), 0)
        return y
