"""NICE: additive couplings, which keep volumes, and one scale for each element at the end."""

from typing import ClassVar, final

from pydantic import Field

from fewstep.nn.bijections.coupling import vector_coupling
from fewstep.nn.bijections.elementwise import Additive
from fewstep.nn.bijections.layer import BijectionConfig, Chain, Layer, Shape, size_of
from fewstep.nn.bijections.linear import Diagonal


@final
class NICEConfig(BijectionConfig):
    """Non-linear independent components, for vectors; images are flattened. The paper's base law is the logistic one."""

    kind: ClassVar[str] = "nice"
    source: ClassVar[str] = "Dinh et al. 2014, arXiv 1410.8516"
    claims: ClassVar[tuple[str, ...]] = ("flow-likelihood",)

    layers: int = Field(default=4, ge=1)
    hidden: int = Field(default=64, ge=1)
    depth: int = Field(default=2, ge=1)

    def build(self, *, shape: Shape, context: int = 0) -> Layer:
        size = size_of(shape)
        couplings = [vector_coupling(size, i, Additive(), context, self.hidden, self.depth) for i in range(self.layers)]
        return Chain([*couplings, Diagonal(size)])
