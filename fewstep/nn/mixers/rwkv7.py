"""RWKV-7 (Goose): a matrix state a head that replaces what it recalls, with decays and rates of learning per key channel."""

import math
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import group_norm, normalize

from fewstep.core.position import NoPosition
from fewstep.core.recipe import Config
from fewstep.nn import delta
from fewstep.nn.recurrent import Carry, Inputs, Links, Recurrent, even_heads, wide


@final
class Rwkv7Config(Config):
    """The time mixing of RWKV-7. `decay_rank`, `rate_rank`, `gate_rank`: of the low-rank maps to decays, rates and gates."""

    kind: ClassVar[str] = "rwkv7"
    source: ClassVar[str] = "Peng et al. 2025, arXiv 2503.14456"

    decay_rank: int = Field(default=64, ge=1)
    rate_rank: int = Field(default=64, ge=1)
    gate_rank: int = Field(default=128, ge=1)
    eps: float = Field(default=64e-5, gt=0)

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "Rwkv7":
        return Rwkv7(self, width, heads)


@final
class Rwkv7(Recurrent):
    """S_t = diag(w_t) S_{t-1} - (a_t * p_t) (p_t' S_{t-1}) + k_t v_t', y_t = r_t S_t, normed head by head; a bonus and a gate.

    p_t: the key that is looked up, of length 1; a_t: the rate at which what it finds is removed, per channel; w_t: the decay, at
    least exp(-exp(-1/2)). Cost: as `nn.delta.read_moved`; state: E^2 numbers a head and the last activations.
    Differs: values are not mixed with those of the first layer; the channel mixing behind it is the block's MLP; weights begin
    as in the first layer of the authors' code, since a mixer does not know its depth.
    """

    chunk = 16
    encodings: frozenset[str] = frozenset()  # decays order the tokens

    def __init__(self, config: Rwkv7Config, width: int, heads: int) -> None:
        super().__init__()
        share = even_heads(width, heads)
        self.config, self.heads, self.reach = config, heads, 1
        place = torch.arange(width) / width
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2]).unsqueeze(1)
        self.mix = nn.Parameter(1 - place**powers)  # of r, w, k, v, a, g
        self.rkv = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.speed = nn.Parameter(-6.5 + 5 * (torch.arange(width) / max(width - 1, 1)) ** 0.85)
        self.decay_down, self.decay_up = _low_rank(width, config.decay_rank)
        self.rate = nn.Parameter(torch.zeros(width))
        self.rate_down, self.rate_up = _low_rank(width, config.rate_rank)
        self.gate_down, self.gate_up = _low_rank(width, config.gate_rank)
        self.lookup = nn.Parameter(torch.full((width,), 0.85))
        self.rated = nn.Parameter(torch.ones(width))
        self.bonus = nn.Parameter(torch.zeros(heads, share))
        self.norm_gain, self.norm_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width, bias=False)

    @property
    def width(self) -> int:
        return self.out.out_features

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        x = features
        apart = before[:, :, -1] - x
        xr, xw, xk, xv, xa, xg = (x.unsqueeze(2) + apart.unsqueeze(2) * self.mix).unbind(2)
        r, k, v = (wide(layer(each)) for layer, each in zip(self.rkv, (xr, xk, xv), strict=True))
        log_w = -math.exp(-0.5) * wide(self.speed + (xw @ self.decay_down).tanh() @ self.decay_up).sigmoid()
        rate = wide(self.rate + xa @ self.rate_down @ self.rate_up).sigmoid()
        gate = wide((xg @ self.gate_down).sigmoid() @ self.gate_up)
        found = normalize((k * self.lookup).unflatten(-1, (self.heads, -1)), dim=-1)
        k = k * (1 + (rate - 1) * self.rated)
        r, k, v, log_w, rate = (part.unflatten(-1, (self.heads, -1)) for part in (r, k, v, log_w, rate))
        return r, -found, found * rate, k, v, log_w, gate

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        size = self.width // self.heads
        return (wide(torch.zeros(batch, self.heads, size, size, device=device, dtype=dtype)),)

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        r, *moves, gate = inputs
        moved = delta.Moves(*moves)
        y = delta.read_moved(r, moved, carry[0], links)
        flat = group_norm(y.flatten(0, 1).flatten(1), self.heads, eps=self.config.eps).view_as(gate)
        bonus = (r * moved.k * self.bonus).sum(-1, keepdim=True) * moved.v
        return (flat * self.norm_gain + self.norm_bias + bonus.flatten(2)) * gate

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        _, *moves, _ = inputs
        return (delta.advance_moved(delta.Moves(*moves), carry[0], real),)

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        return self.out(y.to(features.dtype))


def _low_rank(width: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """[width,rank] zeros and [rank,width] orthogonal: a map that begins as nothing."""
    up = torch.empty(rank, width)
    nn.init.orthogonal_(up, gain=0.1 * max(1.0, math.sqrt(rank / width)))
    return nn.Parameter(torch.zeros(width, rank)), nn.Parameter(up)
