"""Coupling: the elements that stay steer an increasing map of those that move. The masks say which."""

from typing import final

import torch
from torch import Tensor, nn

from fewstep.core.random import Rng
from fewstep.nn.bijections.elementwise import Elementwise
from fewstep.nn.bijections.layer import Image, Layer
from fewstep.nn.bijections.networks import ConvNet, Holed, Perceptron


@final
class Coupling(Layer):
    """z_b = f(x_b; network(x_a, c)), z_a = x_a, for the elements b that `moves` [d] bool marks and the others, a.

    `network` maps [B,|a|] and c to [B,|b|,transform.numbers]. Cost: one call of it in either direction.
    Raises ValueError for a mask that moves all elements, which nothing could invert, or none.
    Source: Dinh et al. 2014, arXiv 1410.8516, section 3.1; 2016, arXiv 1605.08803, section 3.4 (masks).
    """

    order: Tensor  # what stays, then what moves
    back: Tensor

    def __init__(self, moves: Tensor, transform: Elementwise, network: nn.Module, context: int = 0) -> None:
        super().__init__(len(moves), context)
        kept, moved = sides(moves)
        self.transform, self.network, self._split = transform, network, (len(kept), len(moved))
        order = torch.cat([kept, moved])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)

    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        a, b, p = self._steered(x, c)
        b, log_slope = self.transform.forward(b, p)
        return torch.cat([a, b], 1).index_select(1, self.back), log_slope.sum(1)

    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        a, b, p = self._steered(z, c)
        b, log_slope = self.transform.inverse(b, p)
        return torch.cat([a, b], 1).index_select(1, self.back), log_slope.sum(1)

    def _steered(self, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What stays, what moves, and the numbers that say how."""
        a, b = x.index_select(1, self.order).split(self._split, 1)
        return a, b, self.network(a, c if self.context else None)


def sides(moves: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of the elements that stay and of those that move. Raises ValueError where there are none of either."""
    kept, moved = (~moves).nonzero()[:, 0], moves.nonzero()[:, 0]
    if not len(kept) or not len(moved):
        many = "every element" if len(moved) else "no element"
        raise ValueError(f"mask: moves {many} of {len(moves)}; keep at least one and move at least one")
    return kept, moved


def alternating(size: int, parity: int) -> Tensor:
    """[d] bool: every second element moves, those of odd number where `parity` is even."""
    return (torch.arange(size) + parity) % 2 == 1


def checkerboard(shape: Image, parity: int) -> Tensor:
    """[d] bool: every second pixel of each row and column moves, in all channels."""
    channels, height, width = shape
    board = (torch.arange(height)[:, None] + torch.arange(width) + parity) % 2 == 1
    return board.expand(channels, height, width).flatten()


def half_channels(shape: Image, parity: int) -> Tensor:
    """[d] bool: the last half of the channels moves where `parity` is even, else the first."""
    channels, height, width = shape
    last = torch.arange(channels) >= channels // 2
    return (last if parity % 2 == 0 else ~last)[:, None].expand(channels, height * width).flatten()


def vector_coupling(size: int, parity: int, transform: Elementwise, context: int, hidden: int, depth: int) -> Coupling:
    """A coupling of every second element, steered by a perceptron."""
    moves = alternating(size, parity)
    kept, moved = sides(moves)
    return Coupling(moves, transform, Perceptron(len(kept), len(moved), transform.numbers, context, hidden, depth), context)


def channel_coupling(shape: Image, parity: int, transform: Elementwise, context: int, hidden: int) -> Coupling:
    """A coupling of half of the channels, steered by convolutions over the other half."""
    moves = half_channels(shape, parity)
    kept, moved = sides(moves)
    pixels = shape[1] * shape[2]
    network = ConvNet((len(kept) // pixels, *shape[1:]), len(moved) // pixels, transform.numbers, context, hidden)
    return Coupling(moves, transform, network, context)


def checkerboard_coupling(shape: Image, parity: int, transform: Elementwise, context: int, hidden: int) -> Coupling:
    """A coupling of every second pixel, steered by convolutions over the image with holes."""
    moves = checkerboard(shape, parity)
    network = Holed(ConvNet(shape, shape[0], transform.numbers, context, hidden), *sides(moves))
    return Coupling(moves, transform, network, context)
