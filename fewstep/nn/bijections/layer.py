"""What every bijection is made of: the base, and the three ways to compose: one after another, backwards, on a part."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import cast, final

import torch
from torch import Tensor, nn

from fewstep.core.random import Rng
from fewstep.core.recipe import Config

Shape = tuple[int, ...]
Image = tuple[int, int, int]  # channels, height, width


class Layer(nn.Module, ABC):
    """The base of the bijections; fulfils `core.bijection.Bijection`."""

    def __init__(self, size: int, context: int = 0) -> None:
        super().__init__()
        self.size, self.context = size, context

    @abstractmethod
    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        """z [B,d] and log|dz/dx| [B]."""

    @abstractmethod
    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        """x [B,d] and log|dx/dz| [B]."""


class BijectionConfig(Config):
    """The base of the configs of bijections."""

    @abstractmethod
    def build(self, *, shape: Shape, context: int = 0) -> Layer:
        """The bijection for data of `shape`, (d,) or (channels, height, width), given `context` numbers a row.

        Raises ValueError for a shape it cannot take.
        """


def vector_or_image(shape: Shape) -> Image | None:
    """The shape of an image, or None for a vector's. Raises ValueError for any other."""
    match shape:
        case (_,):
            return None
        case (channels, height, width):
            return channels, height, width
    raise ValueError(f"shape={shape}: neither (d,) nor (channels, height, width); flatten the rows or name their channels")


def size_of(shape: Shape) -> int:
    """The number of elements. Raises ValueError for a shape without any."""
    size = math.prod(shape)
    if not shape or size < 1:
        raise ValueError(f"shape={shape}: no elements; give the sizes of one row, e.g. (2,) or (1, 8, 8)")
    return size


@final
class Chain(Layer):
    """Bijections one after another; log-determinants add up."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        listed = list(layers)
        sizes = {layer.size for layer in listed}
        if len(sizes) != 1:
            raise ValueError(f"layers: sizes {sorted(sizes)}; a chain needs at least one, and all of one size")
        super().__init__(sizes.pop(), max(layer.context for layer in listed))
        self.layers = nn.ModuleList(listed)

    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        log_dets = []
        for i, layer in enumerate(self.layers):
            x, log_det = layer(x, c, None if rng is None else rng.split(str(i)))
            log_dets.append(log_det)
        return x, torch.stack(log_dets).sum(0)

    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        log_dets = []
        for i, layer in reversed(list(enumerate(self.layers))):
            z, log_det = cast(Layer, layer).inverse(z, c, None if rng is None else rng.split(str(i)))
            log_dets.append(log_det)
        return z, torch.stack(log_dets).sum(0)


@final
class Inverse(Layer):
    """A bijection the other way round."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.size, layer.context)
        self.layer = layer

    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        return self.layer.inverse(x, c, rng)

    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.layer(z, c, rng)
        return z, log_det


@final
class Part(Layer):
    """A bijection of the last elements; the first `start` stay as they are, which is how latents leave a multi-scale flow."""

    def __init__(self, start: int, layer: Layer) -> None:
        super().__init__(start + layer.size, layer.context)
        self.start, self.layer = start, layer

    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.layer(x[:, self.start :], c, rng)
        return torch.cat([x[:, : self.start], z], 1), log_det

    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.layer.inverse(z[:, self.start :], c, rng)
        return torch.cat([z[:, : self.start], x], 1), log_det
