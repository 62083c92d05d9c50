"""The absence of a position encoding, as an entry of the registry."""

from typing import ClassVar, final

from fewstep.core.position import NoPosition
from fewstep.nn.position.encoding import EncodingConfig


@final
class NoPositionConfig(EncodingConfig):
    """No position encoding: order is known from the causal mask alone."""

    kind: ClassVar[str] = "none"
    source: ClassVar[str] = "Haviv et al. 2022, arXiv 2203.16634"

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> NoPosition:
        return NoPosition()
