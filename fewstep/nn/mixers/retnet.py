"""Retention: linear attention whose past fades by one constant factor a head."""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from fewstep.core.position import NoPosition, Shared, fitted
from fewstep.core.recipe import Config
from fewstep.nn import decay
from fewstep.nn.recurrent import Carry, Inputs, Links, Recurrent, even_heads, wide


@final
class RetNetConfig(Config):
    """Multi-scale retention; head h forgets by 1 - 2^(-5-h) a token. With rotary positions its rotation is that of the paper."""

    kind: ClassVar[str] = "retnet"
    source: ClassVar[str] = "Sun et al. 2023, arXiv 2307.08621"

    eps: float = Field(default=1e-6, gt=0)

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "Retention":
        return Retention(self, width, heads, position)


@final
class Retention(Recurrent):
    """y_i = sum_j g_h^(i-j) (q_i k_j / sqrt(E)) v_j over j <= i, normed head by head, gated by swish. Values are as wide as keys.

    Cost: 4 T E^2 a head; state: E^2 numbers a head. Differs: the norm of a head is RMSNorm without a gain, as in the authors'
    later code; xPos's growth along the sequence is the decay itself.
    """

    encodings = frozenset({"rotate"})

    def __init__(self, config: RetNetConfig, width: int, heads: int, position: NoPosition | None) -> None:
        super().__init__()
        self.config, self.heads, self.position = config, heads, fitted(position, config.kind, self.encodings)
        self.qkvg = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        fading = torch.log1p(-(2.0 ** -(5 + torch.arange(heads, dtype=torch.float64))))
        self.register_buffer("fading", fading, persistent=False)

    @property
    def width(self) -> int:
        return self.out.out_features

    def features(self, x: Tensor) -> Tensor:
        return self.qkvg(x)

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        return wide(features).unflatten(-1, (4, self.heads, -1)).unbind(2)[:3]

    def turned(self, inputs: Inputs, positions: Tensor, shared: Shared) -> Inputs:
        q, k, v = inputs
        q, k = self.position.rotate(q.transpose(1, 2), k.transpose(1, 2), positions, positions, shared)
        return q.transpose(1, 2) * q.shape[-1] ** -0.5, k.transpose(1, 2), v

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        size = self.width // self.heads
        return (wide(torch.zeros(batch, self.heads, size, size, device=device, dtype=dtype)),)

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        q, k, v = inputs
        return decay.read(q, k, v, self._fading(q), carry[0], links)

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        _, k, v = inputs
        return (decay.advance(k, v, self._fading(k), carry[0], real),)

    def swept(self, inputs: Inputs, place: Tensor) -> Tensor | None:
        q, k, v = inputs
        return decay.swept(q, k, v, self._fading(q), place)

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        gate = features.chunk(4, -1)[3]
        y = rms_norm(y, y.shape[-1:], eps=self.config.eps).flatten(2)
        return self.out(silu(gate) * y.to(gate.dtype))

    def _fading(self, x: Tensor) -> Tensor:
        return self.get_buffer("fading").to(x.dtype).expand(*x.shape[:2], -1)
