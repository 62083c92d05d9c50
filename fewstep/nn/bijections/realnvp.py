"""RealNVP: affine couplings; on images checkerboards, then channels, with half of the elements leaving at each scale."""

from typing import ClassVar, final

from pydantic import Field

from fewstep.nn.bijections.coupling import channel_coupling, checkerboard_coupling, vector_coupling
from fewstep.nn.bijections.elementwise import Affine
from fewstep.nn.bijections.layer import BijectionConfig, Chain, Image, Layer, Part, Shape, size_of, vector_or_image
from fewstep.nn.bijections.linear import ActNorm, squeeze


@final
class RealNVPConfig(BijectionConfig):
    """Real-valued non-volume-preserving flow.

    Vectors pass `layers` couplings of every second element. Images pass, at each of `scales`, three couplings by checkerboard, a
    squeeze and three by channel, after which half of the elements leave; four by checkerboard close.
    Differs: actnorm, whose rows do not depend on one another, for batch norm; plain networks for residual ones.
    """

    kind: ClassVar[str] = "realnvp"
    source: ClassVar[str] = "Dinh et al. 2016, arXiv 1605.08803"
    claims: ClassVar[tuple[str, ...]] = ("flow-likelihood",)

    layers: int = Field(default=6, ge=1)
    scales: int = Field(default=1, ge=0)
    hidden: int = Field(default=64, ge=1)
    depth: int = Field(default=2, ge=1)

    def build(self, *, shape: Shape, context: int = 0) -> Layer:
        image = vector_or_image(shape)
        if image is not None:
            return self._scales(image, self.scales, context)
        size, parts = size_of(shape), list[Layer]()
        for i in range(self.layers):
            parts += [vector_coupling(size, i, Affine(), context, self.hidden, self.depth), ActNorm(shape)]
        return Chain(parts)

    def _scales(self, shape: Image, left: int, context: int) -> Layer:
        parts: list[Layer] = []
        for i in range(3 if left else 4):
            parts += [checkerboard_coupling(shape, i, Affine(), context, self.hidden), ActNorm(shape)]
        if not left:
            return Chain(parts)
        parts.append(squeeze(shape))
        channels, height, width = 4 * shape[0], shape[1] // 2, shape[2] // 2
        for i in range(3):
            squeezed = (channels, height, width)
            parts += [channel_coupling(squeezed, i, Affine(), context, self.hidden), ActNorm(squeezed)]
        half = (channels // 2, height, width)
        return Chain([*parts, Part(size_of(half), self._scales(half, left - 1, context))])
