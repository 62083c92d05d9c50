"""Couplings: noise, and the data that a trained denoiser's ODE carries it to. What reflow refits on.

Pair n is a function of the seed, n and the teacher alone, so pairs may be made when asked for, or kept on disk and taken up
where an interrupted run left them. This file knows solvers and grids by their registries only.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, cast, final

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import Config, choice
from fewstep.decode.denoise import sample
from fewstep.diffusion.grids import GRIDS, KarrasConfig
from fewstep.diffusion.solvers import SOLVERS
from fewstep.diffusion.solvers.ode import DEISConfig
from fewstep.models.denoiser import Denoiser
from fewstep.training.data.arrays import ArraysConfig, Content, Epochs
from fewstep.training.data.shards import write_atomically

Source = Callable[[Tensor], Batch]  # the pairs of these numbers [B]


@final
class CouplingConfig(ArraysConfig):
    """`count` pairs of noise and data that a teacher makes by `steps` steps of a deterministic solver (0: new ones every batch).

    Pairs are made and kept `shard` at a time. A teacher with classes is asked for each of them equally often.
    """

    kind: ClassVar[str] = "coupling"
    source: ClassVar[str] = "Liu et al. 2023, arXiv 2209.03003, section 2.1"

    count: int = Field(default=65536, ge=0)
    held_out: int = Field(default=1024, ge=1)
    shard: int = Field(default=4096, ge=1)
    steps: int = Field(default=32, ge=2)
    solver: choice(lambda: SOLVERS, "solver") = DEISConfig()  # type: ignore[valid-type]
    grid: choice(lambda: GRIDS, "grid") = KarrasConfig()  # type: ignore[valid-type]
    seed: int = 0

    def build(self) -> "Couplings":
        """Raises ValueError: the run that has the teacher makes them."""
        raise ValueError("data='coupling': there is no teacher to make pairs; set model.kind='student', or name other data")


@final
class Teacher:
    """Pairs as `model` makes them. Cost of a pair: `steps` times the solver's calls. Raises ValueError for a random one."""

    def __init__(self, config: CouplingConfig, model: Denoiser) -> None:
        self.config, self.model = config, model
        self._solver = cast(Any, config.solver).build()
        if self._solver.stochastic:
            raise ValueError(f"data.solver={cast(Config, config.solver).kind!r}: adds noise; choose a deterministic one")
        self._grid: Tensor = cast(Any, config.grid).build(model.process, config.steps)

    @torch.no_grad()
    def __call__(self, numbers: Tensor) -> Batch:
        """`extra`: "eps" and "x" [B,*shape], "c" [B,classes] where there are classes. On the CPU, whatever the model is on."""
        model, weight = self.model, next(self.model.parameters())
        rng = CounterRng.seeded([self.config.seed]).split("coupling").fork(torch.zeros_like(numbers)).at(numbers)
        grid, eps = self._grid.to(weight.device), model.process.noise(model.shape, rng).to(weight)
        classes = numbers % model.classes if model.classes else None
        denoiser = model.denoiser(None if classes is None else classes.to(weight.device))
        x = model.process.sigma(grid[0]).to(weight) * eps
        ended = sample(denoiser, model.process, self._solver, grid, x, rng).payload.x
        extra = {"eps": eps.cpu(), "x": model.unnormed(ended / model.process.alpha(grid[-1]).to(weight)).cpu()}
        if classes is not None:
            extra["c"] = torch.nn.functional.one_hot(classes, model.classes).float()
        return Batch(numbers.unsqueeze(1), extra=extra)

    @property
    def identity(self) -> str:
        """A name for the pairs: of the settings and the weights."""
        settings = self.config.model_dump_json(exclude={"count", "held_out"})
        content = hashlib.sha256((settings + self.model.config.model_dump_json()).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            content.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
        return content.hexdigest()[:16]


@final
class Couplings:
    """Numbered pairs as a data set of arrays: the first `held_out` for validation, those after them to learn from."""

    def __init__(self, pairs: Source, model: Denoiser, config: CouplingConfig) -> None:
        self.shape, self.context, self._pairs, self._config = model.shape, model.classes, pairs, config

    def train(self, batch: int, seed: int) -> "Pairs":
        """Raises ValueError for a batch of more pairs than there are."""
        if 0 < self._config.count < batch:
            raise ValueError(
                f"run.batch={batch}: more than the {self._config.count} pairs there are; lower it, or raise data.count"
            )
        return Pairs(self._pairs, self._config, batch, seed)

    def validation(self, batch: int) -> Iterator[Batch]:
        for numbers in torch.arange(self._config.held_out).split(batch):
            yield self._pairs(numbers)


@final
class Pairs:
    """Batches of pairs: new ones each time, or those that are kept, in an order of each epoch's own."""

    def __init__(self, pairs: Source, config: CouplingConfig, batch: int, seed: int) -> None:
        numbers = config.held_out + torch.arange(config.count)
        self._pairs, self._held_out, self._batch = pairs, config.held_out, batch
        kept = Content(torch.empty(config.held_out + config.count, 0))  # rows of nothing: their numbers are what is wanted
        self._epochs = Epochs(kept, numbers, batch, seed) if config.count else None

    def batch(self, step: int) -> Batch:
        if self._epochs is None:
            return self._pairs(self._held_out + step * self._batch + torch.arange(self._batch))
        return self._pairs(self._epochs.batch(step).tokens[:, 0])


@final
class Kept:
    """Pairs in memory, by name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def __call__(self, numbers: Tensor) -> Batch:
        return Batch(numbers.unsqueeze(1), extra={name: values[numbers] for name, values in self._tensors.items()})


def couple(config: CouplingConfig, model: Denoiser, cache: Path, watch: Callable[[int, int], None] | None = None) -> Couplings:
    """The coupling that `model` makes: kept in `cache`, in shards of which those that are whole are never made again.

    `watch` is told how many pairs of how many there are. Raises ValueError when the disk refuses.
    """
    teacher = Teacher(config, model.eval())
    if not config.count:
        return Couplings(teacher, model, config)
    folder, total = cache / "couplings" / teacher.identity, config.held_out + config.count
    shards = []
    for first in range(0, total, config.shard):
        shards.append(_shard(folder / f"{first:09d}.safetensors", teacher, torch.arange(first, first + config.shard)))
        if watch is not None:
            watch(min(first + config.shard, total), total)
    return Couplings(Kept({name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}), model, config)


def _shard(path: Path, teacher: Teacher, numbers: Tensor) -> dict[str, Tensor]:
    """The pairs `numbers`, read from `path` or made and written there."""
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):  # not made yet, or damaged
        made = dict(teacher(numbers).extra)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(made))
        settings = teacher.config.model_dump(mode="json")
        write_atomically(path.parent / "coupling.json", json.dumps(settings, indent=1).encode())
    except OSError as error:
        raise ValueError(f"coupling={str(path)!r}: cannot be written ({error}); make room, or set data.count=0") from error
    return made
