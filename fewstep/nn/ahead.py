"""What heads that predict beyond the next token have in common: configs, and how fresh ones begin. This file knows no heads."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor, nn

from fewstep.core.recipe import Config
from fewstep.nn.blocks import Block

Embed = Callable[[Tensor], Tensor]
MakeBlock = Callable[[], Block]
Share = Annotated[float, Field(ge=0, le=1)]


class HeadsConfig(Config):
    """The base of the configs of heads that are trained for a finished target.

    `drafter`: the drafter that runs them. `accuracies[d][r]`: how often the token of rank r (from 0) at depth d (from 0) is the
    target's, where all shallower ones were right too; measured at the end of their training, saved with them, and what the
    drafter makes its default tree from; (): not measured.
    """

    drafter: ClassVar[str] = ""

    accuracies: tuple[tuple[Share, ...], ...] = ()

    @abstractmethod
    def build(self, *, width: int, vocab: int, trunk_depth: int, eps: float, make_block: MakeBlock) -> nn.Module:
        """The heads for a trunk of `trunk_depth` blocks, `width` channels and `vocab` tokens.

        `make_block` makes a block like its last one. Raises ValueError for a trunk they cannot stand beside.
        """


@runtime_checkable
class Begins(Protocol):
    """Heads that do not begin with random weights alone."""

    def begin(self, unembedding: Tensor) -> None:
        """Set the weights that training starts from; `unembedding` [V,D] is the trunk's. The others are drawn already."""
        ...


@runtime_checkable
class Restricts(Protocol):
    """Heads that draft from the most frequent tokens alone, where their config says so."""

    def restrict(self, counts: Tensor, unembedding: Tensor) -> None:
        """Choose those tokens, by their `counts` [V] in the training data, and begin anew from the trunk's `unembedding`."""
        ...
