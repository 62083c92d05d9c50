"""Glow: steps of actnorm, mixed channels and affine coupling; on images at several levels, half of the channels leaving each."""

from typing import ClassVar, final

from pydantic import Field

from fewstep.nn.bijections.coupling import channel_coupling, vector_coupling
from fewstep.nn.bijections.elementwise import Affine
from fewstep.nn.bijections.layer import BijectionConfig, Chain, Image, Layer, Part, Shape, size_of, vector_or_image
from fewstep.nn.bijections.linear import ActNorm, Mix, squeeze


@final
class GlowConfig(BijectionConfig):
    """`levels` of a squeeze and `steps` steps each; vectors pass the steps alone, with networks of `depth` hidden layers.

    What leaves a level has a learned law given what stays: an affine coupling, the paper's learned prior in other words.
    Latents are in the order in which they leave.
    """

    kind: ClassVar[str] = "glow"
    source: ClassVar[str] = "Kingma and Dhariwal 2018, arXiv 1807.03039"
    claims: ClassVar[tuple[str, ...]] = ("flow-likelihood",)

    levels: int = Field(default=2, ge=1)
    steps: int = Field(default=6, ge=1)
    hidden: int = Field(default=64, ge=1)
    depth: int = Field(default=2, ge=1)

    def build(self, *, shape: Shape, context: int = 0) -> Layer:
        image = vector_or_image(shape)
        if image is not None:
            return self._levels(image, self.levels, context)
        size, parts = size_of(shape), list[Layer]()
        for _ in range(self.steps):
            coupling = vector_coupling(size, 0, Affine(), context, self.hidden, self.depth)
            parts += [ActNorm(shape), Mix(shape), coupling]
        return Chain(parts)

    def _levels(self, shape: Image, left: int, context: int) -> Layer:
        parts: list[Layer] = [squeeze(shape)]
        channels, height, width = 4 * shape[0], shape[1] // 2, shape[2] // 2
        squeezed = (channels, height, width)
        for _ in range(self.steps):
            parts += [ActNorm(squeezed), Mix(squeezed), channel_coupling(squeezed, 0, Affine(), context, self.hidden)]
        if left == 1:
            return Chain(parts)
        parts.append(channel_coupling(squeezed, 1, Affine(), context, self.hidden))
        half = (channels // 2, height, width)
        return Chain([*parts, Part(size_of(half), self._levels(half, left - 1, context))])
