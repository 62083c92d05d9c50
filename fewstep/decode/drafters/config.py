"""What every drafter's config has in common. This file knows no drafter."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from fewstep.core.draft import Drafter
from fewstep.core.model import Target
from fewstep.core.recipe import Config

Load = Callable[[str], Target]  # a model directory or hub id -> the model: lent by the caller, since decoding reads no files


class DrafterConfig(Config):
    """A drafter before it meets its target."""

    @abstractmethod
    def build(self, target: Target, load: Load) -> Drafter[Any]:
        """The drafter for `target`; `load` fetches a second model where one is needed. Raises ValueError if they do not fit."""
        ...
