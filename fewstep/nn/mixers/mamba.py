"""Mamba: a state space whose step, input and output matrices are functions of the token, so that it chooses what to keep."""

import math
from typing import ClassVar, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear, silu, softplus

from fewstep.core.position import NoPosition
from fewstep.core.recipe import Config
from fewstep.nn.kernels import selective_scan, selective_tree
from fewstep.nn.recurrent import Carry, Inputs, Links, even_heads, wide
from fewstep.nn.scan import Scanned, parents
from fewstep.nn.short_conv import ShortConv


@final
class MambaConfig(Config):
    """The Mamba mixer. `expand`: inner channels per channel of the width; `state`: states of each; `conv`: taps of the short
    convolution; `rank` of what the time steps are made of (None: a sixteenth of the width).

    The first time steps are drawn log-uniformly between `step_min` and `step_max`.
    """

    kind: ClassVar[str] = "mamba"
    source: ClassVar[str] = "Gu & Dao 2023, arXiv 2312.00752"
    claims: ClassVar[tuple[str, ...]] = ("selective-copying", "induction-heads")

    expand: int = Field(default=2, ge=1)
    state: int = Field(default=16, ge=1)
    conv: int = Field(default=4, ge=1)
    rank: int | None = Field(default=None, ge=1)
    step_min: float = Field(default=1e-3, gt=0)
    step_max: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> "MambaConfig":
        if self.step_min > self.step_max:
            raise ValueError(f"step_min={self.step_min}: must be at most step_max={self.step_max}; lower it")
        return self

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "Mamba":
        return Mamba(self, width)


@final
class Mamba(Scanned):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t, gated by swish, behind a short convolution.

    E expand x width inner channels, N `state`. Cost: the projections and about ten operations for each of T E N elements; state:
    E N numbers and the last `conv` - 1 features. Differs: B is discretised by Euler's rule, as in the authors' code, where the
    paper writes zero-order hold (eq. 4); behind it stands the block's MLP, where the paper stacks mixers alone.
    """

    encodings: frozenset[str] = frozenset()  # states order the tokens

    def __init__(self, config: MambaConfig, width: int) -> None:
        super().__init__()
        inner, rank = config.expand * width, config.rank or math.ceil(width / 16)
        self.config, self.inner, self.rank = config, inner, rank
        self.reach, self.shown = config.conv - 1, inner
        self.into = nn.Linear(width, 2 * inner, bias=False)  # what is mixed, then the gate
        self.conv = ShortConv(inner, config.conv, bias=True)
        self.select = nn.Linear(inner, rank + 2 * config.state, bias=False)  # time steps, B, C
        self.step = nn.Parameter(torch.empty(inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        step = torch.empty(inner).uniform_(math.log(config.step_min), math.log(config.step_max)).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        self.a_log = nn.Parameter(torch.arange(1.0, config.state + 1).log().repeat(inner, 1))  # S4D-Real
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width, bias=False)

    @property
    def width(self) -> int:
        return self.out.out_features

    def features(self, x: Tensor) -> Tensor:
        return self.into(x)

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        u = silu(self.conv(features[..., : self.inner], before[..., : self.inner]))
        step, b, c = self.select(u).split([self.rank, self.config.state, self.config.state], -1)
        return wide(u), softplus(wide(linear(step, self.step)) + wide(self.step_bias)), wide(b), wide(c)

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        return (wide(torch.zeros(batch, self.config.state, self.inner, device=device, dtype=dtype)),)

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        u, step, b, c = inputs
        if links.chain:  # whole rows are fresh, or none of their tokens is
            start = torch.where(links.fresh[:, :1, None], 0, carry[0])
            y, _ = selective_scan(u, step, self._a(), b, c, start)
        else:
            y = selective_tree(u, step, self._a(), b, c, carry[0], parents(links))
        return y + u * self.skip

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        *changing, c = inputs
        u, step, b = (torch.where(real.unsqueeze(-1), x, 0) for x in changing)  # a step of no time changes nothing
        return (selective_scan(u, step, self._a(), b, c, carry[0])[1],)

    def sweep(self, inputs: Inputs, place: Tensor) -> Tensor:
        u, step, b, c = inputs
        (start,) = self.begin(u.shape[0], u.device, u.dtype)
        y, _ = selective_scan(u, step, self._a(), b, c, start, place == 0)
        return y + u * self.skip

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        return self.out((y * silu(wide(features[..., self.inner :]))).to(features.dtype))

    def _a(self) -> Tensor:
        return -wide(self.a_log).exp().mT.contiguous()
