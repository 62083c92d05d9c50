"""What objectives of drafters' heads have in common: whose they train, whether the trunk learns too, and what heads foresee."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from fewstep.core.objective import Batch
from fewstep.core.recipe import Config


class HeadsObjectiveConfig(Config):
    """The base of their configs. `drafter`: the heads they train; `trunk`: whether it stays as it is or is trained with them."""

    drafter: ClassVar[str] = ""

    trunk: Literal["frozen", "joint"] = "frozen"


@runtime_checkable
class Foresees(Protocol):
    """An objective whose heads' predictions can be read off a text, depth by depth."""

    def foresee(self, model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        """For k = 1, 2, ...: the logits [B,T-k,V] of depth k; entry i predicts token i+k+1 with all before it known."""
        ...
