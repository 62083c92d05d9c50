"""The networks that steer a coupling: from the elements that stay, and c, to the numbers for each element that moves.

This file knows no bijection. The last layers begin at zero.
"""

from itertools import pairwise
from typing import TypeVar, final

import torch
from torch import Tensor, nn

L = TypeVar("L", bound=nn.Module)


@final
class Perceptron(nn.Module):
    """`depth` hidden layers of `hidden` ReLUs: x [B,inputs], c [B,context] -> [B,outputs,numbers]."""

    def __init__(self, inputs: int, outputs: int, numbers: int, context: int, hidden: int, depth: int) -> None:
        super().__init__()
        widths = [inputs + context, *[hidden] * depth]
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU(inplace=True))]
        self.layers = nn.Sequential(*layers, zeroed(nn.Linear(widths[-1], outputs * numbers)))
        self.numbers = numbers

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        y: Tensor = self.layers(x if c is None else torch.cat([x, c], 1))
        return y.unflatten(1, (-1, self.numbers))


@final
class ConvNet(nn.Module):
    """3x3, 1x1 and 3x3 convolutions with ReLUs between: x [B, channels * height * width] -> `numbers` for each element of
    `outputs` maps, [B, outputs * height * width, numbers]. c [B,context] is added to the hidden maps.

    Source: Kingma and Dhariwal 2018, arXiv 1807.03039, section 4 (the layers).
    """

    def __init__(self, shape: tuple[int, int, int], outputs: int, numbers: int, context: int, hidden: int) -> None:
        super().__init__()
        self.shape, self.numbers = shape, numbers
        self.first = nn.Conv2d(shape[0], hidden, 3, padding=1)
        self.condition = nn.Linear(context, hidden) if context else None
        self.middle = nn.Conv2d(hidden, hidden, 1)
        self.last = zeroed(nn.Conv2d(hidden, outputs * numbers, 3, padding=1))

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        h = self.first(x.view(-1, *self.shape))
        if self.condition is not None:
            h = h + self.condition(c)[:, :, None, None]
        y: Tensor = self.last(self.middle(h.relu()).relu())
        return y.unflatten(1, (-1, self.numbers)).movedim(2, -1).flatten(1, 3)


@final
class Holed(nn.Module):
    """A network of whole images for the elements `kept` alone: it sees zeros in place of those that move, and tells of those."""

    kept: Tensor
    moved: Tensor

    def __init__(self, network: nn.Module, kept: Tensor, moved: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("moved", moved, persistent=False)

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        whole = x.new_zeros(len(x), len(self.kept) + len(self.moved)).index_copy(1, self.kept, x)
        y: Tensor = self.network(whole, c)
        return y.index_select(1, self.moved)


def zeroed(layer: L) -> L:
    """The layer with weights and biases of 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
