"""Autoregression: each element is moved as those before it say, all at once one way, one after another the other way.

The network's hidden units are sorted by how many elements they have seen, so that every mask is a staircase: what a unit reads is
the first so many units of the layer below. Hence the sequential way takes the arithmetic of one call of the network, not of d.
"""

from itertools import pairwise
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fewstep.core.random import Rng
from fewstep.nn.bijections.elementwise import Elementwise
from fewstep.nn.bijections.layer import Layer
from fewstep.nn.bijections.networks import zeroed


@final
class MaskedLinear(nn.Linear):
    """A linear layer whose output of degree n reads the inputs of degree at most n. `seen`, `shown`: the degrees, both rising."""

    mask: Tensor

    def __init__(self, seen: Tensor, shown: Tensor) -> None:
        super().__init__(len(seen), len(shown))
        self.register_buffer("mask", shown[:, None] >= seen, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight * self.mask, self.bias)

    def some(self, x: Tensor, rows: slice) -> Tensor:
        """The outputs `rows`, which see just the inputs x [B,N] that are known: the first N."""
        return linear(x, self.weight[rows, : x.shape[1]], self.bias[rows])


@final
class MaskedNetwork(nn.Module):
    """x [B,d], c [B,context] -> [B,d,numbers], where row i depends on c and the first i elements alone.

    `depth` hidden layers of `hidden` ReLUs. A unit of degree m has seen c and the first m elements. `hidden` is at least d.
    Source: Germain et al. 2015, MADE, arXiv 1502.03509. Differs: given c there are units of degree 0 too, without which c would
    not reach the first element.
    """

    def __init__(self, size: int, numbers: int, context: int, hidden: int, depth: int) -> None:
        super().__init__()
        if hidden < size:
            raise ValueError(
                f"hidden={hidden}: fewer units than the {size} elements they are to tell apart; give at least {size}"
            )
        lowest = 0 if context or size == 1 else 1
        degrees = (torch.arange(hidden) % (size - lowest) + lowest).sort().values
        inputs = torch.cat([torch.zeros(context, dtype=torch.int64), torch.arange(1, size + 1)])
        outputs = torch.arange(size).repeat_interleave(numbers)
        levels = [inputs, *[degrees] * depth, outputs]
        self.numbers = numbers
        self.layers = nn.ModuleList(MaskedLinear(a, b) for a, b in pairwise(levels))
        zeroed(self.layers[-1])
        self.ends = (0, *torch.searchsorted(degrees, torch.arange(size), right=True).tolist())  # units below degree m

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        h = x if c is None else torch.cat([c, x], 1)
        for i, layer in enumerate(self.layers):
            h = layer(h.relu() if i else h)
        return h.unflatten(1, (-1, self.numbers))


@final
class Walk:
    """A `MaskedNetwork` evaluated element by element: each unit once, as soon as what it sees is known."""

    def __init__(self, network: MaskedNetwork, c: Tensor | None, like: Tensor) -> None:
        """`like` [B,...]: rows of the wanted number and type."""
        *self._hidden, self._last = cast(list[MaskedLinear], list(network.layers))
        self._numbers, self._ends, self._told = network.numbers, network.ends, 0
        nothing = like.new_empty(len(like), 0)
        self._known = [nothing if c is None else c, *[nothing] * len(self._hidden)]  # by layer, in order of degree
        self._grow()

    def next(self) -> Tensor:
        """[B,1,numbers] of the first element that was not told yet."""
        start = self._told * self._numbers
        return self._last.some(self._known[-1], slice(start, start + self._numbers)).unsqueeze(1)

    def tell(self, x: Tensor) -> None:
        """The value [B,1] of that element."""
        self._known[0] = torch.cat([self._known[0], x], 1)
        self._told += 1
        if self._told + 1 < len(self._ends):
            self._grow()

    def _grow(self) -> None:
        rows = slice(self._ends[self._told], self._ends[self._told + 1])
        for i, layer in enumerate(self._hidden):
            self._known[i + 1] = torch.cat([self._known[i + 1], layer.some(self._known[i], rows).relu()], 1)


@final
class Autoregressive(Layer):
    """z_i = f(x_i; network(x_<i, c)).

    Cost: one call of the network forwards; backwards the same arithmetic in d steps.
    Source: Papamakarios et al. 2017, arXiv 1705.07057, section 3.1.
    """

    def __init__(self, network: MaskedNetwork, transform: Elementwise, size: int, context: int = 0) -> None:
        super().__init__(size, context)
        self.network, self.transform = network, transform

    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        z, log_slope = self.transform.forward(x, self.network(x, c if self.context else None))
        return z, log_slope.sum(1)

    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        walk = Walk(self.network, c if self.context else None, z)
        found, total = [], z.new_zeros(len(z))
        for column in z.split(1, 1):
            x, log_slope = self.transform.inverse(column, walk.next())
            walk.tell(x)
            found.append(x)
            total = total + log_slope[:, 0]
        return torch.cat(found, 1), total
