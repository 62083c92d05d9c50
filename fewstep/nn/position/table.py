"""Position encodings that are a table with one vector a position: added to the input, or multiplied with it."""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding

from fewstep.core.position import NoPosition
from fewstep.nn.position.encoding import EncodingConfig, one_axis


class TableConfig(EncodingConfig):
    """One learned vector for each of `length` positions, which start with the standard deviation `init_std`."""

    length: int = Field(default=2048, ge=1)
    init_std: float = Field(default=0.02, gt=0)


@final
class TrainableConfig(TableConfig):
    """Learned absolute positions, added to the input; a text ends with the table."""

    kind: ClassVar[str] = "trainable"
    source: ClassVar[str] = "Gehring et al. 2017, arXiv 1705.03122; Devlin et al. 2018, arXiv 1810.04805"

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "Trainable":
        return Trainable(self, width or heads * head_width)


@final
class MultiplicativeConfig(TableConfig):
    """Learned absolute positions, multiplied with the input channel by channel."""

    kind: ClassVar[str] = "multiplicative"
    source: ClassVar[str] = "none: named in Su's survey of encodings, 2021, spaces.ac.cn/archives/8130"

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "Multiplicative":
        return Multiplicative(self, width or heads * head_width)


class Table(NoPosition):
    """A table [length,D]. Cost: one row a token."""

    parts = frozenset({"embed"})

    def __init__(self, config: TableConfig, width: int) -> None:
        super().__init__()
        self.kind, self.length = config.kind, config.length
        self.embedding = nn.Parameter(torch.randn(config.length, width) * config.init_std)

    def rows(self, positions: Tensor) -> Tensor:
        """[B,T,D] at `positions` [B,T]. Raises ValueError beyond the table."""
        last = int(one_axis(positions, self.kind).max())
        if last >= self.embedding.shape[0]:
            raise ValueError(f"positions: {last} is beyond the table of length={self.length}; shorten the text or raise length")
        return embedding(positions, self.embedding)


@final
class Trainable(Table):
    """x + p. Source: arXiv 1705.03122 section 3.1."""

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.rows(positions)


@final
class Multiplicative(Table):
    """x * (1 + p). Differs: p counts from 1, so that weight decay pulls towards no encoding instead of towards nothing."""

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x * (1 + self.rows(positions))
