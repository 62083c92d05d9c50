"""RWKV-4: attention without queries, a weighted mean per channel whose weights fade at a constant rate."""

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from fewstep.core.position import NoPosition
from fewstep.core.recipe import Config
from fewstep.nn.recurrent import Carry, Inputs, Links, Recurrent, even_heads, wide

_NOTHING = -1e30  # the logarithm of an empty sum, finite so that differences of two are


@final
class Rwkv4Config(Config):
    """The time mixing of RWKV-4; channels stand alone, so heads mean nothing to it."""

    kind: ClassVar[str] = "rwkv4"
    source: ClassVar[str] = "Peng et al. 2023, arXiv 2305.13048"

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "Rwkv4":
        return Rwkv4(self, width)


@final
class Rwkv4(Recurrent):
    """y_t = sigmoid(r_t) (sum_{i<t} e^{k_i - (t-1-i) w} v_i + e^{u + k_t} v_t) / (the same without v), channel by channel.

    r, k and v are read off a mean of the token and the one before it. The sums are kept relative to their largest term, whose
    logarithm is part of the state. Cost: T exponentials a channel and token in chunks of T; state: 3 numbers a channel and the
    last activations. Differs: the channel mixing behind it is the block's MLP; weights begin as in the first layer of the
    authors' code, since a mixer does not know its depth.
    """

    chunk = 16
    encodings: frozenset[str] = frozenset()  # decays order the tokens

    def __init__(self, config: Rwkv4Config, width: int) -> None:
        super().__init__()
        self.config, self.reach = config, 1
        place = torch.arange(width) / max(width - 1, 1)
        self.mix = nn.Parameter((torch.arange(width) / width) ** torch.tensor([[0.5], [1.0], [1.0]]))  # of r, k, v
        self.speed = nn.Parameter(-5 + 8 * place**0.7)  # its exponential is w
        self.bonus = nn.Parameter(math.log(0.3) + 0.5 * ((torch.arange(width) + 1) % 3 - 1))
        self.rkv = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)

    @property
    def width(self) -> int:
        return self.out.out_features

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        apart = features - before[:, :, -1]
        r, k, v = (wide(layer(before[:, :, -1] + apart * mix)) for layer, mix in zip(self.rkv, self.mix, strict=True))
        return r.sigmoid(), k, v

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        empty = wide(torch.zeros(batch, self.width, device=device, dtype=dtype))
        return empty, empty, torch.full_like(empty, _NOTHING)

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        r, k, v = inputs
        above, below, most = (x.unsqueeze(1) for x in carry)
        own = torch.eye(k.shape[1], dtype=torch.bool, device=k.device)
        strict = links.sees & ~own
        depth = strict.sum(-1)
        between = (depth.unsqueeze(2) - depth.unsqueeze(1) - 1).unsqueeze(-1)
        logs = (k.unsqueeze(1) - between * self._fading()).masked_fill(~strict.unsqueeze(-1), -torch.inf)
        logs = torch.where(own.unsqueeze(-1), (self.bonus + k).unsqueeze(1), logs)
        carried = (most - depth.unsqueeze(-1) * self._fading()).masked_fill(links.fresh.unsqueeze(-1), _NOTHING)
        top = torch.maximum(logs.amax(2), carried).detach()  # cancels, so no gradient is lost
        weights, carried = (logs - top.unsqueeze(2)).exp(), (carried - top).exp()
        return r * ((weights * v.unsqueeze(1)).sum(2) + carried * above) / (weights.sum(2) + carried * below)

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        _, k, v = inputs
        above, below, most = carry
        behind = real.sum(1, keepdim=True) - real.cumsum(1)
        logs = (k - behind.unsqueeze(-1) * self._fading()).masked_fill(~real.unsqueeze(-1), -torch.inf)
        carried = most - real.sum(1, keepdim=True) * self._fading()
        top = torch.maximum(logs.amax(1), carried).detach()
        weights, carried = (logs - top.unsqueeze(1)).exp(), (carried - top).exp()
        return (weights * v).sum(1) + carried * above, weights.sum(1) + carried * below, top

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        return self.out(y.to(features.dtype))

    def _fading(self) -> Tensor:
        return wide(self.speed).exp()
