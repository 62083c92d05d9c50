"""RWKV-4: attention without queries, a weighted mean per channel whose weights fade at a constant rate."""

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from fewstep.core.position import NoPosition
from fewstep.core.recipe import Config
from fewstep.nn.kernels import wkv, wkv_after, wkv_empty, wkv_fresh, wkv_tree
from fewstep.nn.kernels.wkv import Sums
from fewstep.nn.recurrent import Carry, Inputs, Links, even_heads, wide
from fewstep.nn.scan import Scanned


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
class Rwkv4(Scanned):
    """y_t = sigmoid(r_t) (sum_{i<t} e^{k_i - (t-1-i) w} v_i + e^{u + k_t} v_t) / (the same without v), channel by channel.

    r, k and v are read off a mean of the token and the one before it. The sums are kept relative to their largest term, whose
    logarithm is part of the state. Cost: the projections, and two exponentials and about twenty operations a channel and token;
    state: 3 numbers a channel and the last activations. Differs: the channel mixing behind it is the block's MLP; weights begin
    as in the first layer of the authors' code, since a mixer does not know its depth.
    """

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
        return wkv_empty(batch, self.width, wide(torch.empty(0, device=device, dtype=dtype)))

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        r, k, v = inputs
        start = _sums(carry)
        if not links.chain:
            return r * wkv_tree(k, v, self._fading(), wide(self.bonus), start, links.sees, links.fresh)
        start = wkv_fresh(start, links.fresh[:, :1])  # whole rows are fresh, or none of their tokens is
        return r * wkv(k, v, self._fading(), wide(self.bonus), start)[0]

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        _, k, v = inputs
        return wkv_after(k, v, self._fading(), _sums(carry), real)

    def sweep(self, inputs: Inputs, place: Tensor) -> Tensor:
        r, k, v = inputs
        return r * wkv(k, v, self._fading(), wide(self.bonus), wkv_empty(k.shape[0], self.width, k), place == 0)[0]

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        return self.out(y.to(features.dtype))

    def _fading(self) -> Tensor:
        return wide(self.speed).exp()


def _sums(carry: Carry) -> Sums:
    above, below, most = carry
    return above, below, most
