"""Gated DeltaNet: a matrix state that fades by one factor a head and corrects what it recalls instead of adding to it."""

import math
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu, softplus

from fewstep.core.position import NoPosition
from fewstep.core.recipe import Config
from fewstep.nn import delta
from fewstep.nn.recurrent import Carry, Inputs, Links, Recurrent, even_heads, wide
from fewstep.nn.short_conv import ShortConv


@final
class GatedDeltaNetConfig(Config):
    """The gated delta rule. `key_width` and `value_width` of a head (None: width / heads; the paper: 3/4 and 3/2 of that).

    `conv`: taps of the short convolution over queries, keys and values.
    """

    kind: ClassVar[str] = "gated_deltanet"
    source: ClassVar[str] = "Yang et al. 2024, arXiv 2412.06464"
    claims: ClassVar[tuple[str, ...]] = ("recall",)

    key_width: int | None = Field(default=None, ge=1)
    value_width: int | None = Field(default=None, ge=1)
    conv: int = Field(default=4, ge=1)
    eps: float = Field(default=1e-6, gt=0)

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "GatedDeltaNet":
        return GatedDeltaNet(self, width, heads)


@final
class GatedDeltaNet(Recurrent):
    """S_t = a_t (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t', y_t = S_t' q_t / sqrt(D), q and k of length 1, then a gated norm.

    a_t = exp(-exp(A) softplus(W_a x_t + dt)), b_t = sigmoid(W_b x_t). Cost: as `nn.delta` and the projections; state: D E numbers
    a head and the last `conv` - 1 inputs. Differs: q and k are as many as the heads of v.
    """

    encodings: frozenset[str] = frozenset()  # decays order the tokens

    def __init__(self, config: GatedDeltaNetConfig, width: int, heads: int) -> None:
        super().__init__()
        share = even_heads(width, heads)
        self.config, self.heads, self.reach = config, heads, config.conv - 1
        self.key_width, self.value_width = config.key_width or share, config.value_width or share
        self.keys, self.values = heads * self.key_width, heads * self.value_width
        self.into = nn.Linear(width, 2 * self.keys + 2 * self.values, bias=False)  # q, k, v; gate
        self.rates = nn.Linear(width, 2 * heads, bias=False)  # b; a
        self.conv = ShortConv(2 * self.keys + self.values, config.conv, bias=False)
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        self.a_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.gain = nn.Parameter(torch.ones(self.value_width))
        self.out = nn.Linear(self.values, width, bias=False)

    @property
    def width(self) -> int:
        return self.out.out_features

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([self.into(x), self.rates(x)], -1)

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        mixed = slice(2 * self.keys + self.values)
        q, k, v = wide(silu(self.conv(features[..., mixed], before[..., mixed]))).split([self.keys, self.keys, self.values], -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
        b, steps = wide(features[..., -2 * self.heads :]).chunk(2, -1)
        log_a = -wide(self.a_log).exp() * softplus(steps + self.step_bias)
        return _unit(q) * self.key_width**-0.5, _unit(k), v, log_a, b.sigmoid()

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        return (wide(torch.zeros(batch, self.heads, self.key_width, self.value_width, device=device, dtype=dtype)),)

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        q, *writes = inputs
        return delta.read(q, delta.Writes(*writes), carry[0], links)

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        _, *writes = inputs
        return (delta.advance(delta.Writes(*writes), carry[0], real),)

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        gate = features[..., 2 * self.keys + self.values : -2 * self.heads]
        y = rms_norm(y, y.shape[-1:], eps=self.config.eps) * self.gain
        return self.out(y.flatten(2).to(gate.dtype) * silu(gate))


def _unit(x: Tensor) -> Tensor:
    """x with its last dimension scaled to length 1; zeros stay zeros."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
