"""Performer: softmax attention estimated with random features, so that the past is one matrix a head."""

import math
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.position import NoPosition, fitted
from fewstep.core.random import CounterRng, Rng
from fewstep.core.recipe import Config
from fewstep.nn.recurrent import Carry, Inputs, Links, Recurrent, even_heads, wide

Kernel = Literal["positive", "trigonometric"]
_NOTHING = -1e30  # the logarithm of an empty sum, finite so that differences of two are


@final
class PerformerConfig(Config):
    """FAVOR+ attention. `count` random features a head (None: E ln E, as the theory asks for); `kernel`: how they are made.

    `orthogonal`: the projections are orthogonal in blocks of E. `eps` is added to positive features relative to their largest.
    """

    kind: ClassVar[str] = "performer"
    source: ClassVar[str] = "Choromanski et al. 2020, arXiv 2009.14794"
    claims: ClassVar[tuple[str, ...]] = ("performer",)

    count: int | None = Field(default=None, ge=1)
    kernel: Kernel = "positive"
    orthogonal: bool = True
    eps: float = Field(default=1e-6, gt=0)

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "Performer":
        return Performer(self, width, heads, position)


@final
class Performer(Recurrent):
    """y_i = sum_j f(q_i) f(k_j) v_j / sum_j f(q_i) f(k_j) over j <= i, where E f(q) f(k) = exp(q k / sqrt(E)). M features a head.

    Features leave with a logarithmic scale of their own; a key's is weighed against the largest on the query's path, which is
    part of the state. Cost: 4 T M E a head; state: M (E + 1) + 1 numbers a head.
    Differs: the stabiliser is that running maximum, exact in every form, where the authors subtract one maximum over all keys,
    those to come included; heads share their projections; the denominator is kept off zero as in the authors' code.
    """

    encodings = frozenset({"rotate"})

    def __init__(self, config: PerformerConfig, width: int, heads: int, position: NoPosition | None) -> None:
        super().__init__()
        share = even_heads(width, heads)
        self.config, self.heads, self.position = config, heads, fitted(position, config.kind, self.encodings)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        count = config.count or max(1, int(share * math.log(share)))
        self.register_buffer("projection", torch.empty(count, share))
        self.redraw(CounterRng.seeded([int(torch.randint(2**62, ()))]))

    @property
    def width(self) -> int:
        return self.out.out_features

    def redraw(self, rng: Rng) -> None:
        """Draw the projections [M,E] anew from the first row of `rng`. States filled before hold features of the old ones."""
        own = self.get_buffer("projection")
        own.copy_(projections(own.shape[0], own.shape[1], rng, orthogonal=self.config.orthogonal))

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        q, k, v = wide(self.qkv(features)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = self.position.rotate(q.transpose(1, 2), k.transpose(1, 2), positions, positions, {})
        projection = wide(self.get_buffer("projection"))
        (q, _), (k, scale) = (
            random_features(x.transpose(1, 2) * x.shape[-1] ** -0.25, projection, self.config.kernel) for x in (q, k)
        )
        if self.config.kernel == "positive":
            q, k = q + self.config.eps, k + self.config.eps
        return q, k, scale, torch.cat([v, torch.ones_like(v[..., :1])], -1)

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        count, size = self.get_buffer("projection").shape
        count *= 1 if self.config.kernel == "positive" else 2
        state = wide(torch.zeros(batch, self.heads, count, size + 1, device=device, dtype=dtype))
        return state, torch.full_like(state[..., 0, 0], _NOTHING)

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        q, k, scale, v = (x.transpose(1, 2) for x in inputs)
        sees = links.sees.unsqueeze(1)
        state, most = carry
        most = most.unsqueeze(-1).masked_fill(links.fresh.unsqueeze(1), _NOTHING)
        logs = scale.unsqueeze(2).masked_fill(~sees, -torch.inf)
        top = torch.maximum(logs.amax(-1), most).detach()  # cancels, so no gradient is lost
        scores = (q @ k.mT) * (logs - top.unsqueeze(-1)).exp()
        y = scores @ v + (q * (most - top).exp().unsqueeze(-1)) @ state
        y, total = y[..., :-1], y[..., -1:]
        small = self.config.eps / 2  # below what one positive feature gives
        return (y / (total + 2 * small * (total.abs() <= small))).transpose(1, 2)

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        _, k, scale, v = (x.transpose(1, 2) for x in inputs)
        state, most = carry
        logs = scale.masked_fill(~real.unsqueeze(1), -torch.inf)
        top = torch.maximum(logs.amax(-1), most).detach()
        k = k * (logs - top.unsqueeze(-1)).exp().unsqueeze(-1)
        return state * (most - top).exp()[..., None, None] + k.mT @ v, top

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        return self.out(y.flatten(2).to(features.dtype))


def random_features(x: Tensor, projection: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """f(x) [..., M or 2 M] and a logarithmic scale [...] for x [..., E]: the mean over `projection` [M,E] of
    f(q) f(k) exp(scale_q + scale_k) estimates exp(q k).

    Positive: exp(w x - |x|^2/2), the largest being the scale. Trigonometric: sin(w x) and cos(w x) under the scale |x|^2/2.
    """
    angles, half = x @ projection.mT, x.square().sum(-1) / 2
    if kernel == "trigonometric":
        return torch.cat([angles.sin(), angles.cos()], -1), half
    most = angles.amax(-1)
    return (angles - most.unsqueeze(-1)).exp(), most - half


def projections(count: int, width: int, rng: Rng, *, orthogonal: bool) -> Tensor:
    """[count,width] float64 Gaussian vectors from the first row of `rng`, orthogonal among each `width` of them if asked:
    uniformly distributed directions with the lengths of independent Gaussian vectors."""
    drawn = rng.split("directions").normal(-(-count // width), width, width)[0]
    if orthogonal:
        directions, corner = torch.linalg.qr(drawn)
        directions = directions * corner.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
        lengths = rng.split("lengths").normal(len(drawn), width, width)[0].norm(dim=-1, keepdim=True)
        drawn = directions.mT * lengths
    return drawn.flatten(0, 1)[:count]
