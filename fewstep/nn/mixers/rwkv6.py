"""RWKV-6 (Finch): a matrix state a head whose key channels fade each at a rate that the token chooses."""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import group_norm, silu

from fewstep.core.position import NoPosition
from fewstep.core.recipe import Config
from fewstep.nn import vector_decay
from fewstep.nn.recurrent import Carry, Inputs, Links, Recurrent, even_heads, wide


@final
class Rwkv6Config(Config):
    """The time mixing of RWKV-6. `shift_rank`, `decay_rank`: of the low-rank maps that choose a token's shifts and decays."""

    kind: ClassVar[str] = "rwkv6"
    source: ClassVar[str] = "Peng et al. 2024, arXiv 2404.05892"

    shift_rank: int = Field(default=32, ge=1)
    decay_rank: int = Field(default=64, ge=1)
    eps: float = Field(default=64e-5, gt=0)

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "Rwkv6":
        return Rwkv6(self, width, heads)


@final
class Rwkv6(Recurrent):
    """S_t = diag(a_t) S_{t-1} + k_t v_t', y_t = r_t (S_{t-1} + diag(u) k_t v_t'), normed head by head, gated by silu(g_t).

    r, k, v, g and a = exp(-exp(d)) are each read off a mean of the token and the one before it, whose shares the token chooses.
    Cost: as `nn.vector_decay`; state: E^2 numbers a head and the last activations. Differs: the channel mixing behind it is the
    block's MLP; weights begin as in the first layer of the authors' code, since a mixer does not know its depth.
    """

    chunk = 16
    encodings: frozenset[str] = frozenset()  # decays order the tokens

    def __init__(self, config: Rwkv6Config, width: int, heads: int) -> None:
        super().__init__()
        share = even_heads(width, heads)
        self.config, self.heads, self.reach = config, heads, 1
        place = torch.arange(width) / width
        self.mix_first = nn.Parameter(1 - place)
        self.mix = nn.Parameter(1 - place ** torch.tensor([[1.0], [0.5], [1.0], [1.0], [0.5]]))  # of d, r, k, v, g
        self.shift_down = nn.Parameter(torch.zeros(width, 5 * config.shift_rank))
        self.shift_up = nn.Parameter(torch.empty(5, config.shift_rank, width).uniform_(-0.01, 0.01))
        self.speed = nn.Parameter(-6 + 5 * (torch.arange(width) / max(width - 1, 1)) ** 0.7)
        self.decay_down = nn.Parameter(torch.zeros(width, config.decay_rank))
        self.decay_up = nn.Parameter(torch.empty(config.decay_rank, width).uniform_(-0.01, 0.01))
        self.bonus = nn.Parameter((0.1 * ((torch.arange(width) + 1) % 3 - 1)).view(heads, share))
        self.rkvg = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm_gain, self.norm_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width, bias=False)

    @property
    def width(self) -> int:
        return self.out.out_features

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        x = features
        apart = before[:, :, -1] - x
        low = ((x + apart * self.mix_first) @ self.shift_down).tanh().unflatten(-1, (5, -1))
        mix = self.mix + torch.einsum("btnr,nrd->btnd", low, self.shift_up)
        shifted, *rest = (x.unsqueeze(2) + apart.unsqueeze(2) * mix).unbind(2)
        log_a = -wide(self.speed + (shifted @ self.decay_down).tanh() @ self.decay_up).exp()
        r, k, v, g = (wide(layer(each)) for layer, each in zip(self.rkvg, rest, strict=True))
        return *(part.unflatten(-1, (self.heads, -1)) for part in (r, k, v, log_a)), silu(g)

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        size = self.width // self.heads
        return (wide(torch.zeros(batch, self.heads, size, size, device=device, dtype=dtype)),)

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        r, k, v, log_a, gate = inputs
        y = vector_decay.read(r, k, v, log_a, self.bonus, carry[0], links)
        flat = group_norm(y.flatten(0, 1).flatten(1), self.heads, eps=self.config.eps).view_as(gate)
        return (flat * self.norm_gain + self.norm_bias) * gate

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        _, k, v, log_a, _ = inputs
        return (vector_decay.advance(k, v, log_a, carry[0], real),)

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        return self.out(y.to(features.dtype))
