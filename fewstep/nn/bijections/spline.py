"""The monotone rational-quadratic spline: an increasing map of a number with as many bends as it has bins."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad, softmax, softplus


@final
@dataclass(frozen=True)
class RationalQuadratic:
    """A spline of `bins` pieces from [-bound, bound] onto itself, and the identity outside, slopes matching at the ends.

    p = (bins raw widths, bins raw heights, bins - 1 raw slopes at the inner knots). No bin is narrower or lower than `least` of
    the whole, no slope smaller than `least`.

    Source: Durkan et al. 2019, arXiv 1906.04032, equations 4 to 8; the inverse is the stable root of Press et al.
    """

    bins: int = 8
    bound: float = 5.0
    least: float = 1e-3

    def __post_init__(self) -> None:
        if self.bins < 2 or self.bins * self.least >= 1:
            raise ValueError(f"bins={self.bins}: must be at least 2 and below {1 / self.least:g}; 8 is usual")

    @property
    def numbers(self) -> int:
        return 3 * self.bins - 1

    def forward(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        inside, at = self._bounded(x)
        x_0, width, y_0, height, left, right = self._bin(at, p, 0)
        slope = height / width
        ratio = ((at - x_0) / width).clamp(0, 1)
        y, log_slope = _curve(ratio, slope, left, right)
        return torch.where(inside, y_0 + height * y, x), torch.where(inside, log_slope, 0)

    def inverse(self, y: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        inside, at = self._bounded(y)
        x_0, width, y_0, height, left, right = self._bin(at, p, 1)
        slope = height / width
        risen = ((at - y_0) / height).clamp(0, 1)
        bend = left + right - 2 * slope
        a = slope - left + risen * bend
        b = left - risen * bend
        c = -slope * risen
        root = (b.square() - 4 * a * c).clamp(min=1e-30).sqrt()  # rounding may take the discriminant below 0, and a root's slope
        ratio = (-2 * c / (b + root)).clamp(0, 1)
        _, log_slope = _curve(ratio, slope, left, right)
        return torch.where(inside, x_0 + width * ratio, y), torch.where(inside, -log_slope, 0)

    def _bounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which numbers the spline moves; and all, those outside put inside, where every gradient is finite."""
        inside = x.abs() < self.bound
        return inside, torch.where(inside, x, 0)

    def knots(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[...,bins+1] the knots' x and y and the slopes there."""
        widths, heights, slopes = p.split([self.bins, self.bins, self.bins - 1], -1)
        even = math.log(math.expm1(1 - self.least))  # raw slope 0 is to mean slope 1
        inner = self.least + softplus(slopes + even)
        return self._edges(widths), self._edges(heights), pad(inner, (1, 1), value=1.0)

    def _edges(self, raw: Tensor) -> Tensor:
        share = self.least + (1 - self.least * self.bins) * softmax(raw, -1)
        edges = 2 * self.bound * share[..., :-1].cumsum(-1) - self.bound
        ends = torch.full_like(edges[..., :1], self.bound)
        return torch.cat([-ends, edges, ends], -1)

    def _bin(self, at: Tensor, p: Tensor, axis: int) -> tuple[Tensor, ...]:
        """x_0, width, y_0, height and both slopes of the bin in which `at` lies along `axis` (0: x, 1: y)."""
        x, y, slope = self.knots(p)
        index = (at.unsqueeze(-1) >= (x, y)[axis][..., 1:-1]).sum(-1, keepdim=True)
        ends = torch.cat([index, index + 1], -1)
        (x_0, x_1), (y_0, y_1), (left, right) = (knots.gather(-1, ends).unbind(-1) for knots in (x, y, slope))
        return x_0, x_1 - x_0, y_0, y_1 - y_0, left, right


def _curve(ratio: Tensor, slope: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """How much of its bin's height a spline has risen at `ratio` in [0, 1] of the width, and the logarithm of its slope."""
    rest = 1 - ratio
    between = ratio * rest
    q = slope + (left + right - 2 * slope) * between
    y = (slope * ratio.square() + left * between) / q
    steep = right * ratio.square() + 2 * slope * between + left * rest.square()
    return y, 2 * slope.log() + steep.log() - 2 * q.log()
