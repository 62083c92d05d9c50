"""Linear bijections: permutations, diagonals, actnorm and the mixing of channels by one matrix (Glow's 1x1 convolution).

A channel is an element of a vector, or a map of an image.
"""

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fewstep.core.random import Rng
from fewstep.nn.bijections.layer import Layer, Shape, size_of

_SINGULAR = 1e-6  # of the largest pivot


@final
class Permute(Layer):
    """z = x[:, order], for `order` [d] int64. Raises ValueError for anything but a permutation."""

    order: Tensor
    back: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__(len(order))
        if order.sort().values.tolist() != list(range(len(order))):
            raise ValueError(f"order: not a permutation of 0..{len(order) - 1}; each index is to occur once")
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)

    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(1, self.order), x.new_zeros(len(x))

    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        return z.index_select(1, self.back), z.new_zeros(len(z))


def reversal(size: int) -> Permute:
    """The last element first."""
    return Permute(torch.arange(size).flip(0))


def squeeze(shape: tuple[int, int, int]) -> Permute:
    """Each 2x2 square of pixels becomes four channels: (C,H,W) -> (4C,H/2,W/2). Raises ValueError for odd sides.

    Source: Dinh et al. 2016, arXiv 1605.08803, section 3.6.
    """
    channels, height, width = shape
    if height % 2 or width % 2:
        raise ValueError(f"shape={shape}: a side of odd length cannot be halved; use fewer levels or pad the images")
    index = torch.arange(channels * height * width).view(channels, height // 2, 2, width // 2, 2)
    return Permute(index.permute(0, 2, 4, 1, 3).flatten())


@final
class Diagonal(Layer):
    """z = x e^s, one s for each element. Source: Dinh et al. 2014, arXiv 1410.8516, section 3.3 (the scaling layer)."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.log_scale = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp(), -self.log_scale.sum().expand(len(z))


@final
class ActNorm(Layer):
    """z = (x + shift) e^s by channel. The first batch seen in training sets both so that its channels have mean 0 and variance 1.

    `ready` says whether that has happened, and is saved with the weights. Raises ValueError for a first batch of one number a
    channel, which has no variance.
    Source: Kingma and Dhariwal 2018, arXiv 1807.03039, section 3.1.
    """

    ready: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__(size_of(shape))
        self.shape = (shape[0], self.size // shape[0])
        self.shift = nn.Parameter(torch.zeros(shape[0], 1))
        self.log_scale = nn.Parameter(torch.zeros(shape[0], 1))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        maps = x.view(-1, *self.shape)
        if self.training and not self.ready:
            self._begin(maps.detach())
        return ((maps + self.shift) * self.log_scale.exp()).view_as(x), (self.log_scale.sum() * self.shape[1]).expand(len(x))

    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        maps, inverse = z.view(-1, *self.shape), -self.log_scale
        return (maps * inverse.exp() - self.shift).view_as(z), (inverse.sum() * self.shape[1]).expand(len(z))

    @torch.no_grad()
    def _begin(self, maps: Tensor) -> None:
        if maps.shape[0] * maps.shape[2] < 2:
            raise ValueError(
                "x: the first batch of training holds one number a channel, which has no variance; give it more rows"
            )
        variance, mean = torch.var_mean(maps, (0, 2), correction=0)
        self.shift.copy_(-mean[:, None])
        self.log_scale.copy_(-0.5 * variance.clamp(min=1e-12).log()[:, None])
        self.ready.fill_(True)


@final
class Mix(Layer):
    """z = W x over the channels, W = P L (U + diag(sign e^s)) with P a fixed permutation: invertible whatever is learned.

    `weight` [C,C] to begin with; None: a random rotation. Raises ValueError for a weight that has no inverse.
    Cost: C^2 a pixel, and no determinant but the sum of s.
    Source: Kingma and Dhariwal 2018, arXiv 1807.03039, section 3.2 and equation 10.
    """

    order: Tensor
    sign: Tensor

    def __init__(self, shape: Shape, weight: Tensor | None = None) -> None:
        super().__init__(size_of(shape))
        count = shape[0]
        self.shape = (count, self.size // count)
        if weight is None:
            weight = torch.linalg.qr(torch.empty(count, count).normal_()).Q
        _invertible(weight, count)
        permutation, lower, upper = torch.linalg.lu(weight.detach())
        pivots = upper.diagonal()
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_scale = nn.Parameter(pivots.abs().log())
        self.register_buffer("sign", pivots.sign())
        self.register_buffer("order", permutation.argmax(1))

    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        return self._mix(self.weight(), x), self._log_det().expand(len(x))

    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        placed = eye.index_select(0, self.order.argsort())  # P^T
        half = torch.linalg.solve_triangular(lower, placed, upper=False, unitriangular=True)
        return self._mix(torch.linalg.solve_triangular(upper, half, upper=True), z), -self._log_det().expand(len(z))

    def weight(self) -> Tensor:
        """W [C,C]."""
        lower, upper = self._factors()
        return (lower @ upper).index_select(0, self.order)

    def _factors(self) -> tuple[Tensor, Tensor]:
        lower = self.lower.tril(-1) + torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        return lower, self.upper.triu(1) + torch.diag(self.sign * self.log_scale.exp())

    def _mix(self, weight: Tensor, x: Tensor) -> Tensor:
        if self.shape[1] == 1:
            return linear(x, weight)
        return (weight @ x.view(-1, *self.shape)).flatten(1)

    def _log_det(self) -> Tensor:
        return self.log_scale.sum() * self.shape[1]


def _invertible(weight: Tensor, count: int) -> None:
    if weight.shape != (count, count):
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected ({count}, {count}); give one row and column a channel")
    pivots = torch.linalg.lu(weight.detach()).U.diagonal().abs()
    if not math.isfinite(float(pivots.sum())) or float(pivots.min()) <= _SINGULAR * float(pivots.max()):
        raise ValueError(f"weight: pivots from {float(pivots.min()):.2g} to {float(pivots.max()):.2g}; no inverse, give another")
