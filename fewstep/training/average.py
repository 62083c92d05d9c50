"""The exponential moving average of a model's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from fewstep.training.checkpoint import tensors_of


@final
class WeightAverage:
    """Averages the trained parameters of a model; everything else is taken as it is.

    `decay` in (0, 1), reached gradually as min(decay, (1 + step) / (10 + step)), so that the first weights are soon forgotten.

    Cost: 4 bytes per trained parameter and one read-modify-write of them a step.
    Source: Polyak and Juditsky 1992; the gradual decay is TensorFlow's `ExponentialMovingAverage(num_updates)`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._model = model
        self._names = [name for name, param in model.named_parameters() if param.requires_grad]
        self._weights = [param for param in model.parameters() if param.requires_grad]
        self._means = [param.detach().clone() for param in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after optimizer step `step` (from 0)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._means, [weight.detach() for weight in self._weights], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def tensors(self) -> dict[str, Tensor]:
        """`tensors_of` the model, with the averages in place of the trained parameters."""
        return {**tensors_of(self._model), **dict(zip(self._names, self._means, strict=True))}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, mean in zip(self._names, self._means, strict=True):
            mean.copy_(tensors[name])

    def _exchange(self) -> None:
        for index, weight in enumerate(self._weights):
            weight.data, self._means[index] = self._means[index], weight.data
