"""Linear attention: a kernel of positive features in place of the exponential, so that the past is one matrix a head."""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import elu

from fewstep.core.position import NoPosition, Shared, fitted
from fewstep.core.recipe import Config
from fewstep.nn import decay
from fewstep.nn.recurrent import Carry, Inputs, Links, Recurrent, even_heads, wide


@final
class LinearConfig(Config):
    """Linear attention with the features elu(x) + 1; `eps` keeps the denominator off zero."""

    kind: ClassVar[str] = "linear"
    source: ClassVar[str] = "Katharopoulos et al. 2020, arXiv 2006.16236"
    claims: ClassVar[tuple[str, ...]] = ("linear-cost", "recurrent-speculation")

    eps: float = Field(default=1e-6, gt=0)

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "LinearAttention":
        return LinearAttention(self, width, heads, position)


@final
class LinearAttention(Recurrent):
    """y_i = sum_j f(q_i) f(k_j) v_j / sum_j f(q_i) f(k_j) over j <= i. Cost: 4 T E^2 a head; state: E (E + 1) numbers a head.

    With rotary positions the numerator's features are turned and the denominator's are not, so that it stays positive (Su et al.
    2021, arXiv 2104.09864, eq. 19).
    """

    encodings = frozenset({"rotate"})

    def __init__(self, config: LinearConfig, width: int, heads: int, position: NoPosition | None) -> None:
        super().__init__()
        self.config, self.heads, self.position = config, heads, fitted(position, config.kind, self.encodings)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    @property
    def width(self) -> int:
        return self.out.out_features

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        q, k, v = wide(self.qkv(features)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return elu(q) + 1, elu(k) + 1, v

    def turned(self, inputs: Inputs, positions: Tensor, shared: Shared) -> Inputs:
        q, k, _ = inputs
        turned = self.position.rotate(q.transpose(1, 2), k.transpose(1, 2), positions, positions, shared)
        return *inputs, *(x.transpose(1, 2) for x in turned)

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        size = self.width // self.heads
        return tuple(wide(torch.zeros(batch, self.heads, size, last, device=device, dtype=dtype)) for last in (size, 1))

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        q, k, v, q_turned, k_turned = inputs
        total = decay.read(q, k, torch.ones_like(v[..., :1]), None, carry[1], links)
        return decay.read(q_turned, k_turned, v, None, carry[0], links) / (total + self.config.eps)

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        _, k, v, _, k_turned = inputs
        ones = torch.ones_like(v[..., :1])
        return decay.advance(k_turned, v, None, carry[0], real), decay.advance(k, ones, None, carry[1], real)

    def swept(self, inputs: Inputs, place: Tensor) -> Tensor | None:
        q, k, v, q_turned, k_turned = inputs
        total = decay.swept(q, k, torch.ones_like(v[..., :1]), None, place)
        y = decay.swept(q_turned, k_turned, v, None, place)
        return None if y is None or total is None else y / (total + self.config.eps)

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        return self.out(y.flatten(2).to(features.dtype))
