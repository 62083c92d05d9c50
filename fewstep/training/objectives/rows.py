"""What the objectives of denoisers read from a batch: the data, and the classes that are not withheld."""

from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.core.random import Rng
from fewstep.models.denoiser import Denoiser


def part(batch: Batch, name: str) -> Tensor:
    """`extra[name]`. Raises ValueError where the batch has none."""
    if name not in batch.extra:
        which = {"c": "data of arrays with classes", "eps": "data='coupling'"}.get(name, "data of arrays")
        raise ValueError(f"batch: no {name!r}; choose {which}")
    return batch.extra[name]


def labels(model: Denoiser, batch: Batch, unlabelled: float, rng: Rng) -> Tensor | None:
    """[B] the classes that `extra["c"]` names, -1 in a share `unlabelled` of the rows in training; None without classes."""
    if not model.classes:
        return None
    label = part(batch, "c").argmax(1)
    return label.masked_fill(rng.split("label").uniform() < unlabelled, -1) if model.training else label
