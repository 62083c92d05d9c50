"""Sinusoidal absolute positions, and the sinusoids that relative encodings read as well."""

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.core.position import NoPosition
from fewstep.nn.position.encoding import EncodingConfig, one_axis, wide


@final
class SinusoidalConfig(EncodingConfig):
    """Fixed sinusoids of wavelengths from 2 pi to 10000 x 2 pi, added to the input."""

    kind: ClassVar[str] = "sinusoidal"
    source: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762, section 3.5"

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "Sinusoidal":
        return Sinusoidal(width or heads * head_width)


@final
class Sinusoidal(NoPosition):
    """x + p, p_2i = sin(pos / 10000^(2i/D)), p_2i+1 the cosine. Cost: D sinusoids a token.

    Differs: x is taken as it is, where the paper multiplies embeddings by sqrt(D).
    """

    kind = "sinusoidal"
    parts = frozenset({"embed"})

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        sin, cos = sinusoids(one_axis(positions, self.kind).to(wide(x)), self.width)
        return x + torch.stack([sin, cos], -1).flatten(-2)[..., : self.width].to(x.dtype)


def sinusoids(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """sin and cos [..., ceil(width / 2)] of `values` [...] over 10000^(2i / width)."""
    exponent = torch.arange(0, width, 2, device=values.device, dtype=torch.int64).to(values.dtype) / width
    angles = values.unsqueeze(-1) * (exponent * -math.log(10000.0)).exp()
    return angles.sin(), angles.cos()
