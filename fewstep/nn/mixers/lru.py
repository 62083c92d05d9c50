"""The linear recurrent unit: one diagonal recurrence of complex states between two dense layers."""

import math
from typing import ClassVar, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, linear

from fewstep.core.position import NoPosition
from fewstep.core.recipe import Config
from fewstep.nn import scan
from fewstep.nn.recurrent import Carry, Inputs, Links, even_heads, wide


@final
class LRUConfig(Config):
    """The linear recurrent unit. `state`: complex states (None: as many as the width). At first the eigenvalues are uniform on
    the ring between the radii `inner` and `outer`, their angles between 0 and `angle`."""

    kind: ClassVar[str] = "lru"
    source: ClassVar[str] = "Orvieto et al. 2023, arXiv 2303.06349"

    state: int | None = Field(default=None, ge=1)
    inner: float = Field(default=0.9, ge=0)
    outer: float = Field(default=0.999, gt=0, lt=1)
    angle: float = Field(default=2 * math.pi, gt=0)

    @model_validator(mode="after")
    def _is_a_ring(self) -> "LRUConfig":
        if self.inner >= self.outer:
            raise ValueError(f"inner={self.inner}: must be below outer={self.outer}; lower it")
        return self

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "LRU":
        return LRU(self, width)


@final
class LRU(scan.Scanned):
    """h_t = lam h_{t-1} + gamma B u_t, y_t = Re(C h_t) + D u_t with |lam| = exp(-exp(nu)) < 1; then GELU and GLU.

    N complex states. Cost: 4 N D multiply-adds a token, and the scan of N; state: N complex numbers. Source: arXiv 2303.06349,
    section 3 and appendix A.
    """

    encodings: frozenset[str] = frozenset()  # states order the tokens

    def __init__(self, config: LRUConfig, width: int) -> None:
        super().__init__()
        states = config.state or width
        square = torch.empty(states).uniform_(max(config.inner**2, 1e-12), config.outer**2)  # uniform by area, and never 0
        self.nu = nn.Parameter((-square.log() / 2).log())
        self.theta = nn.Parameter(torch.empty(states).uniform_(1e-6 * config.angle, config.angle).log())
        self.gamma = nn.Parameter((1 - square).log() / 2)  # what a state gathers is as large as the inputs are, eq. 7
        self.b = nn.Parameter(torch.randn(2, states, width) / math.sqrt(2 * width))  # real and imaginary parts
        self.c = nn.Parameter(torch.randn(2, width, states) / math.sqrt(states))
        self.skip = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, 2 * width)

    @property
    def width(self) -> int:
        return self.out.in_features

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        return (linear(wide(features), (wide(self.b) * wide(self.gamma).exp().unsqueeze(-1)).flatten(0, 1)),)

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        one = wide(torch.empty(0, device=device, dtype=dtype))
        return (torch.zeros(batch, len(self.nu), device=device, dtype=one.dtype.to_complex()),)

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        return self._read(scan.along(*self._steps(inputs), carry[0], links))

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        return (scan.after(*self._steps(inputs), carry[0], real),)

    def sweep(self, inputs: Inputs, place: Tensor) -> Tensor:
        a, b = self._steps(inputs)
        return self._read(scan.chain(torch.where(place.unsqueeze(-1) > 0, a, 0), b, torch.zeros_like(b[:, 0])))

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        y = gelu(y + wide(features) * self.skip)
        return glu(self.out(y.to(features.dtype)), -1)

    def _steps(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        added = torch.complex(*inputs[0].chunk(2, -1))
        lam = torch.polar((-wide(self.nu).exp()).exp(), wide(self.theta).exp())
        return lam.expand_as(added), added

    def _read(self, h: Tensor) -> Tensor:
        real, imaginary = wide(self.c)
        return linear(h.real, real) - linear(h.imag, imaginary)
