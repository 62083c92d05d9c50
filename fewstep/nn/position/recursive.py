"""Recursive positions: each follows from the one before it by a learned differential equation, solved by Runge-Kutta."""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from fewstep.core.position import NoPosition
from fewstep.nn.position.encoding import EncodingConfig, Kept, one_axis


@final
class RecursiveConfig(EncodingConfig):
    """FLOATER: p(t) solves dp/dt = h(t, p) for a network h of `hidden` units; a token is `step` of time."""

    kind: ClassVar[str] = "recursive"
    source: ClassVar[str] = "Liu et al. 2020, FLOATER, arXiv 2003.09229"

    hidden: int = Field(default=64, ge=1)
    step: float = Field(default=0.1, gt=0)
    init_std: float = Field(default=0.02, gt=0)

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "Recursive":
        return Recursive(self, width or heads * head_width)


@final
class Recursive(NoPosition):
    """x + p(pos), p(0) learned, h(t, p) = W' tanh(W [p; t] + b). Without bounds: the equation goes on beyond trained lengths.

    Cost: 4 evaluations of h a position, one after another; decoding keeps the solution.
    Source: arXiv 2003.09229. Differs: p enters once before the first layer, not in each with its own p(0);
    gradients go through the solver's steps, not through an adjoint equation.
    """

    kind = "recursive"
    parts = frozenset({"embed"})

    def __init__(self, config: RecursiveConfig, width: int) -> None:
        super().__init__()
        self.step = config.step
        self.start = nn.Parameter(torch.randn(width) * config.init_std)
        self.inner = nn.Parameter(torch.randn(config.hidden, width + 1) * (width + 1) ** -0.5)
        self.inner_bias = nn.Parameter(torch.randn(config.hidden))
        self.outer = nn.Parameter(torch.randn(width, config.hidden) * config.init_std)
        self._kept, self._longest = Kept(), 1

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        count = int(one_axis(positions, self.kind).max()) + 1
        return x + embedding(positions, self.solution(count)).to(x.dtype)

    def solution(self, count: int) -> Tensor:
        """[R,D], R >= `count`: p at the first positions."""
        size = count
        if torch.is_inference_mode_enabled():
            size = self._longest = max(self._longest, 1 << (count - 1).bit_length())  # doubled, so that decoding seldom solves
        (rows,) = self._kept(self, size, lambda: (self._solve(size),))
        return rows

    def _solve(self, count: int) -> Tensor:
        p: Tensor = self.start
        h = self.step
        rows = [p]
        for t in range(count - 1):
            now = t * h
            a = self._slope(now, p)
            b = self._slope(now + h / 2, p + h / 2 * a)
            c = self._slope(now + h / 2, p + h / 2 * b)
            d = self._slope(now + h, p + h * c)
            p = p + h / 6 * (a + 2 * b + 2 * c + d)
            rows.append(p)
        return torch.stack(rows)

    def _slope(self, t: float, p: Tensor) -> Tensor:
        """dp/dt."""
        inner = linear(torch.cat([p, p.new_full((1,), t)]), self.inner, self.inner_bias)
        return linear(inner.tanh(), self.outer)
