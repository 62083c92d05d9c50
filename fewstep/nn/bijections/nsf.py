"""Neural spline flows: rational-quadratic splines in couplings or in autoregression."""

from typing import ClassVar, final

from pydantic import Field

from fewstep.nn.bijections.coupling import vector_coupling
from fewstep.nn.bijections.layer import BijectionConfig, Chain, Layer, Shape, size_of
from fewstep.nn.bijections.linear import Mix
from fewstep.nn.bijections.maf import MaskedConfig
from fewstep.nn.bijections.spline import RationalQuadratic

_SOURCE = "Durkan et al. 2019, arXiv 1906.04032"


@final
class NSFConfig(BijectionConfig):
    """Spline couplings of every second element, the elements mixed before each. Images are flattened.

    `bins` pieces on [-bound, bound], the identity outside.
    """

    kind: ClassVar[str] = "nsf"
    source: ClassVar[str] = _SOURCE
    claims: ClassVar[tuple[str, ...]] = ("flow-likelihood",)

    layers: int = Field(default=6, ge=1)
    hidden: int = Field(default=64, ge=1)
    depth: int = Field(default=2, ge=1)
    bins: int = Field(default=8, ge=2, le=999)
    bound: float = Field(default=5.0, gt=0)

    def build(self, *, shape: Shape, context: int = 0) -> Layer:
        size, spline, parts = size_of(shape), RationalQuadratic(self.bins, self.bound), list[Layer]()
        for _ in range(self.layers):
            parts += [Mix((size,)), vector_coupling(size, 0, spline, context, self.hidden, self.depth)]
        return Chain(parts)


@final
class NSFAutoregressiveConfig(MaskedConfig):
    """Spline autoregression: sharper than couplings, one call of the network for a density, d steps for a sample."""

    kind: ClassVar[str] = "nsf_ar"
    source: ClassVar[str] = _SOURCE
    claims: ClassVar[tuple[str, ...]] = ("flow-likelihood",)

    bins: int = Field(default=8, ge=2, le=999)
    bound: float = Field(default=5.0, gt=0)

    def build(self, *, shape: Shape, context: int = 0) -> Layer:
        return self.masked(shape, context, RationalQuadratic(self.bins, self.bound))
