"""Mamba-2: a selective state space whose decay is one number a head, so that chunks are matrix products (state space duality)."""

import math
from typing import ClassVar, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu, softplus

from fewstep.core.position import NoPosition
from fewstep.core.recipe import Config
from fewstep.nn import decay
from fewstep.nn.recurrent import Carry, Inputs, Links, Recurrent, even_heads, wide
from fewstep.nn.short_conv import ShortConv


@final
class Mamba2Config(Config):
    """The Mamba-2 mixer. The paper's sizes: `state` 64 to 128, heads of 64 channels, `groups` of heads that share B and C.

    `expand`: inner channels per channel of the width. `head_width`: inner channels of a head (None: the model's heads share
    them). `conv`: taps of the short convolution. The first time steps are drawn log-uniformly between `step_min` and `step_max`.
    """

    kind: ClassVar[str] = "mamba2"
    source: ClassVar[str] = "Dao & Gu 2024, arXiv 2405.21060"
    claims: ClassVar[tuple[str, ...]] = ("recall", "recurrent-speculation")

    expand: int = Field(default=2, ge=1)
    state: int = Field(default=64, ge=1)
    head_width: int | None = Field(default=None, ge=1)
    groups: int = Field(default=1, ge=1)
    conv: int = Field(default=4, ge=1)
    step_min: float = Field(default=1e-3, gt=0)
    step_max: float = Field(default=0.1, gt=0)
    eps: float = Field(default=1e-5, gt=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> "Mamba2Config":
        if self.step_min > self.step_max:
            raise ValueError(f"step_min={self.step_min}: must be at most step_max={self.step_max}; lower it")
        return self

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "Mamba2":
        inner = self.expand * width
        if inner % (self.head_width or heads):
            raise ValueError(f"head_width={self.head_width}: must divide expand x width = {inner}; choose a divisor")
        heads = inner // self.head_width if self.head_width else heads
        if heads % self.groups:
            raise ValueError(f"groups={self.groups}: must divide the {heads} heads; choose a divisor")
        return Mamba2(self, width, heads)


@final
class Mamba2(Recurrent):
    """S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t', y_t = C_t S_t + D x_t, behind a short convolution of x, B and C; a gated norm.

    E expand x width inner channels, N `state`. Cost: 4 T N a channel and the projections; state: E N numbers and the last
    `conv` - 1 inputs. Differs: behind it stands the block's MLP, where the paper stacks mixers alone.
    """

    encodings: frozenset[str] = frozenset()  # decays order the tokens

    def __init__(self, config: Mamba2Config, width: int, heads: int) -> None:
        super().__init__()
        self.config, self.heads, self.reach = config, heads, config.conv - 1
        self.inner, self.shared = config.expand * width, config.groups * config.state
        channels = self.inner + 2 * self.shared
        self.shows = slice(self.inner, self.inner + channels)
        self.into = nn.Linear(width, self.inner + channels + heads, bias=False)  # gate; x, B, C; time steps
        self.conv = ShortConv(channels, config.conv, bias=True)
        low, high = math.log(config.step_min), math.log(config.step_max)
        step = torch.empty(heads).uniform_(low, high).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        self.a_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.gain = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, width, bias=False)

    @property
    def width(self) -> int:
        return self.out.out_features

    def features(self, x: Tensor) -> Tensor:
        return self.into(x)

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        _, mixed, steps = features.split([self.inner, self.inner + 2 * self.shared, self.heads], -1)
        x, b, c = wide(silu(self.conv(mixed, before))).split([self.inner, self.shared, self.shared], -1)
        b, c = (part.unflatten(-1, (self.config.groups, -1)) for part in (b, c))
        x, step = x.unflatten(-1, (self.heads, -1)), softplus(wide(steps) + self.step_bias)
        return x, x * step.unsqueeze(-1), b, c, step * -wide(self.a_log).exp()

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        size = self.inner // self.heads
        return (wide(torch.zeros(batch, self.heads, self.config.state, size, device=device, dtype=dtype)),)

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        x, v, b, c, log_a = inputs
        return self._past(decay.read(self._each(c), self._each(b), v, log_a, carry[0], links), x)

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        _, v, b, _, log_a = inputs
        return (decay.advance(self._each(b), v, log_a, carry[0], real),)

    def swept(self, inputs: Inputs, place: Tensor) -> Tensor | None:
        x, v, b, c, log_a = inputs
        y = decay.swept(self._each(c), self._each(b), v, log_a, place)
        return None if y is None else self._past(y, x)

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        y = y.flatten(2) * silu(wide(features[..., : self.inner]))
        y = y.unflatten(-1, (self.config.groups, -1))
        y = rms_norm(y, y.shape[-1:], eps=self.config.eps).flatten(2)
        return self.out((y * self.gain).to(features.dtype))

    def _past(self, y: Tensor, x: Tensor) -> Tensor:
        """y [B,T,H,E] and what x [B,T,H,E] adds past the state."""
        return torch.addcmul(y, x, self.skip.unsqueeze(-1))

    def _each(self, x: Tensor) -> Tensor:
        """[B,T,G,N] -> [B,T,H,N]: what the heads of a group share, for each of them."""
        return x.unsqueeze(3).expand(-1, -1, -1, self.heads // self.config.groups, -1).flatten(2, 3)
