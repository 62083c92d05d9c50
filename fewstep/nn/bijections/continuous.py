"""A continuous flow: an ordinary differential equation whose velocity is a network, solved by fixed Runge-Kutta steps."""

from itertools import pairwise
from typing import ClassVar, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.random import Rng
from fewstep.nn.bijections.layer import BijectionConfig, Layer, Shape, size_of
from fewstep.nn.bijections.networks import zeroed


@final
class ContinuousConfig(BijectionConfig):
    """dx/dt = network(x, t, c) from data (t = 0) to latents (t = 1) in `steps` steps of the fourth-order Runge-Kutta rule.

    The log-determinant is the integral of the trace of the network's Jacobian: exact where `probes` is 0 (at d times the cost),
    else Hutchinson's estimate from so many Rademacher vectors a row, the same at all times.
    """

    kind: ClassVar[str] = "continuous"
    source: ClassVar[str] = "Grathwohl et al. 2018, FFJORD, arXiv 1810.01367; Chen et al. 2018, arXiv 1806.07366"

    steps: int = Field(default=8, ge=1)
    probes: int = Field(default=0, ge=0)
    hidden: int = Field(default=64, ge=1)
    depth: int = Field(default=2, ge=1)

    def build(self, *, shape: Shape, context: int = 0) -> Layer:
        return Continuous(self, size_of(shape), context)


@final
class Velocity(nn.Module):
    """A perceptron of (x, t, c) with tanh between, which pushes tangents [K,B,d] through together with x [B,d]."""

    def __init__(self, size: int, context: int, hidden: int, depth: int) -> None:
        super().__init__()
        widths = [size + 1 + context, *[hidden] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.last = zeroed(nn.Linear(widths[-1], size))

    def forward(self, x: Tensor, t: float, c: Tensor | None, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """v [B,d] and its Jacobian by x times each tangent [K,B,d]."""
        h = torch.cat([x, torch.full_like(x[:, :1], t), *([] if c is None else [c])], 1)
        size = x.shape[1]
        for layer in cast(list[nn.Linear], list(self.hidden)):
            h = layer(h).tanh()
            tangents = (tangents @ layer.weight[:, :size].T) * (1 - h.square())
            size = h.shape[1]
        return self.last(h), tangents @ self.last.weight.T


@final
class Continuous(Layer):
    """The flow of a velocity. It and its inverse agree, and log|det| is right, up to the rule's error, of order steps^-4.

    Cost: 4 `steps` calls of the network, with d tangents or `probes`.
    """

    def __init__(self, config: ContinuousConfig, size: int, context: int) -> None:
        super().__init__(size, context)
        self.config = config
        self.velocity = Velocity(size, context, config.hidden, config.depth)

    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(x, c, rng, 0.0, 1.0)

    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(z, c, rng, 1.0, 0.0)

    def _solve(self, x: Tensor, c: Tensor | None, rng: Rng | None, start: float, end: float) -> tuple[Tensor, Tensor]:
        tangents, c = self._tangents(x, rng), c if self.context else None
        steps, total = self.config.steps, x.new_zeros(len(x))
        h = (end - start) / steps

        def slope(at: Tensor, t: float) -> tuple[Tensor, Tensor]:
            v, pushed = self.velocity(at, t, c, tangents)
            return v, (tangents * pushed).sum((0, 2)) / max(1, self.config.probes)

        for i in range(steps):
            t = start + i * h
            v_1, trace_1 = slope(x, t)
            v_2, trace_2 = slope(x + h / 2 * v_1, t + h / 2)
            v_3, trace_3 = slope(x + h / 2 * v_2, t + h / 2)
            v_4, trace_4 = slope(x + h * v_3, t + h)
            x = x + h / 6 * (v_1 + 2 * v_2 + 2 * v_3 + v_4)
            total = total + h / 6 * (trace_1 + 2 * trace_2 + 2 * trace_3 + trace_4)
        return x, total

    def _tangents(self, x: Tensor, rng: Rng | None) -> Tensor:
        """[K,B,d] or [d,1,d]."""
        probes = self.config.probes
        if not probes:
            return torch.eye(self.size, dtype=x.dtype, device=x.device).unsqueeze(1)
        if rng is None:
            raise ValueError(f"rng=None: {probes} probes of the trace are to be drawn; hand one in, or set probes=0")
        signs = torch.where(rng.uniform(probes, self.size) < 0.5, -1.0, 1.0)
        return signs.to(x).transpose(0, 1)
