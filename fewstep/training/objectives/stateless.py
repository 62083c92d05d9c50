"""What objectives share that learn nothing but the model. This file knows no objective."""

from collections.abc import Mapping
from typing import Any

from torch import nn


class Stateless:
    """Keeps nothing between steps; `name` is what it is called where a checkpoint brings a state along."""

    name: str

    def after_step(self, model: nn.Module) -> None:
        """Nothing to do."""

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Nothing to learn from it."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(
                f"objective state {sorted(state)}: {self.name} keeps none; the checkpoint belongs to another objective"
            )
