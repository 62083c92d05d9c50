"""What the configs of drafters have in common. This file knows no drafter."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from fewstep.core.draft import Drafter
from fewstep.core.model import Target
from fewstep.core.recipe import Config

# a model directory, hub id or directory of heads -> a model that has them: lent by the caller, since decoding reads no files
Load = Callable[[str], Target]
M = TypeVar("M", bound=nn.Module)


class DrafterConfig(Config):
    """A drafter before it meets its target."""

    @abstractmethod
    def build(self, target: Target, load: Load) -> Drafter[Any]:
        """The drafter for `target`; `load` fetches a second model where one is needed. Raises ValueError if they do not fit."""
        ...


class HeadsDrafterConfig(DrafterConfig):
    """A drafter that runs the heads that came with the target, or those in the directory `path`."""

    path: str = ""

    def heads(self, target: Target, load: Load, *forms: type[M]) -> M:
        """The heads of this kind, in one of its `forms`.

        Raises ValueError where there are none, or of another width or vocabulary than the target.
        """
        owner = load(self.path) if self.path else target
        found = owner.heads.get(self.kind)
        if not isinstance(found, forms):
            where = f"{self.path!r} holds" if self.path else "the model has"
            raise ValueError(
                f"drafter={self.kind!r}: {where} no {self.kind} heads; train some (fewstep train {self.kind} "
                f"--set model.target=MODEL) and draft with {self.kind}=RUN"
            )
        if (owner.width, owner.vocab) != (target.width, target.vocab):
            raise ValueError(
                f"drafter.path={self.path!r}: heads for a width of {owner.width} and {owner.vocab} tokens, the target has "
                f"{target.width} and {target.vocab}; give heads that were trained for it"
            )
        return found
