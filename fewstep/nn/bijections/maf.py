"""MAF and IAF: affine autoregression, quick to evaluate one way or the other."""

from typing import ClassVar, final

from pydantic import Field

from fewstep.nn.bijections.autoregressive import Autoregressive, MaskedNetwork
from fewstep.nn.bijections.elementwise import Affine, Elementwise
from fewstep.nn.bijections.layer import BijectionConfig, Chain, Inverse, Layer, Shape, size_of
from fewstep.nn.bijections.linear import reversal


class MaskedConfig(BijectionConfig):
    """What flows of masked networks share: `layers`, the order reversed between two, of `depth` times `hidden` units each.

    Images are flattened. A network has at least as many units as there are elements.
    """

    layers: int = Field(default=5, ge=1)
    hidden: int = Field(default=64, ge=1)
    depth: int = Field(default=2, ge=1)

    def masked(self, shape: Shape, context: int, transform: Elementwise) -> Chain:
        """The layers, quick from data to latents."""
        size, parts = size_of(shape), list[Layer]()
        for i in range(self.layers):
            network = MaskedNetwork(size, transform.numbers, context, max(self.hidden, size), self.depth)
            parts += [reversal(size)] if i else []
            parts.append(Autoregressive(network, transform, size, context))
        return Chain(parts)


@final
class MAFConfig(MaskedConfig):
    """Masked autoregressive flow: one call of the network for a density, d steps for a sample.

    Differs: z = x e^s + t, where the paper has (x - mu) e^(-alpha): s = -alpha, t = -mu e^(-alpha); no batch norm.
    """

    kind: ClassVar[str] = "maf"
    source: ClassVar[str] = "Papamakarios et al. 2017, arXiv 1705.07057"
    claims: ClassVar[tuple[str, ...]] = ("flow-likelihood",)

    def build(self, *, shape: Shape, context: int = 0) -> Layer:
        return self.masked(shape, context, Affine())


@final
class IAFConfig(MaskedConfig):
    """Inverse autoregressive flow: one call of the network for a sample, d steps for a density. MAF's map backwards."""

    kind: ClassVar[str] = "iaf"
    source: ClassVar[str] = "Kingma et al. 2016, arXiv 1606.04934"

    def build(self, *, shape: Shape, context: int = 0) -> Layer:
        return Inverse(self.masked(shape, context, Affine()))
