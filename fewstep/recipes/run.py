"""From a recipe to a trained model: data, model, objective and trainer, put together as the recipe's sections say."""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, final

import torch
from rich.console import Console

from fewstep.core.objective import Batch
from fewstep.core.recipe import Recipe
from fewstep.models.decoder import Decoder
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.models.flow import Flow, FlowConfig
from fewstep.models.model import Model
from fewstep.recipes import load_recipe
from fewstep.recipes.converting import described, open_start
from fewstep.recipes.distilling import StudentConfig, data_of, objective_of, open_teacher
from fewstep.recipes.drafting import corpus_of, finish, open_target, restrict
from fewstep.text.tokenizer import Tokenizer
from fewstep.training.data import ArraysConfig, BPEConfig, DataConfig, Dataset, prepare
from fewstep.training.data.arrays import Arrays
from fewstep.training.objectives.consistency import ConsistencyObjectiveConfig
from fewstep.training.objectives.denoising import DenoisingConfig
from fewstep.training.objectives.likelihood import LikelihoodConfig
from fewstep.training.objectives.mean_flow import MeanFlowConfig
from fewstep.training.objectives.sliced import SlicedConfig
from fewstep.training.objectives.variational import VariationalConfig
from fewstep.training.plan import Plan
from fewstep.training.trainer import Summary, Trainer, Validation

_OF_DENOISERS = (DenoisingConfig, SlicedConfig, VariationalConfig, ConsistencyObjectiveConfig, MeanFlowConfig)
LEARNT_BY: Mapping[str, tuple[str, ...]] = MappingProxyType(  # the objectives of each kind of model of arrays
    {
        FlowConfig.kind: (LikelihoodConfig.kind,),
        DenoiserConfig.kind: tuple(config.kind for config in _OF_DENOISERS),
        StudentConfig.kind: (DenoisingConfig.kind, ConsistencyObjectiveConfig.kind),
    }
)


@final
@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run: the model, how the run ended, and the folder that holds both."""

    model: Model | Flow | Denoiser
    summary: Summary
    directory: Path


def cache_directory() -> Path:
    """Where prepared data and compiled kernels are kept: `XDG_CACHE_HOME`/fewstep, or ~/.cache/fewstep."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"


def train(
    recipe: Recipe | Path | str,
    overrides: Mapping[str, object] | None = None,
    *,
    directory: Path | str | None = None,
    resume: bool = False,
    device: str = "cpu",
    console: Console | None = None,
) -> Trained:
    """Train what `recipe` (a shipped name, a file or a loaded recipe) describes, in the run folder `directory`.

    The folder (default runs/NAME) holds the recipe, the log, the checkpoints and their cost; `resume` goes on from the last
    checkpoint, bit for bit. Heads for a finished model (model.kind "drafter") end in the folder itself, beside the report of
    their acceptance. Raises ValueError for a bad recipe, empty data, a folder in use or a full disk; Diverged when the
    loss does.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise ValueError("overrides: given beside a loaded recipe; pass the recipe's name or path instead")
    console = console or Console(stderr=True)
    directory = Path(directory or Path("runs") / recipe.name)
    sections = cast(Any, recipe)
    plan = Plan.of(recipe)
    if isinstance(recipe["data"], ArraysConfig) or recipe["model"].kind in LEARNT_BY:
        return _train_on_arrays(recipe, plan, directory, resume, device, console)
    target = open_target(recipe, device, plan.run.seed)
    given = target or open_start(recipe, device)
    dataset = _prepared(recipe, given, console)
    network = build_network(recipe, dataset, plan.run.seed).to(device) if given is None else given.network
    if given is not target:
        recipe = described(recipe, network)
    if target is not None:
        restrict(target.network, dataset)
    objective = sections["objective"].build()
    trainer = Trainer(
        network,
        objective,
        dataset.train(plan.run.batch, plan.run.length, plan.run.seed),
        plan,
        directory,
        validation=Validation(_HeldOut(dataset, plan.run.batch, plan.run.length), dataset.bytes_per_token),
        extra={"recipe.json": recipe.dump(), **dataset.tokenizer.files()},
        console=console,
    )
    summary = trainer.run(resume)
    if target is None:
        return Trained(Model.load(summary.checkpoint, device), summary, directory)
    if not summary.interrupted:
        target = finish(target, recipe, objective, dataset, summary.checkpoint, directory, console)
    return Trained(target, summary, directory)


def _train_on_arrays(recipe: Recipe, plan: Plan, directory: Path, resume: bool, device: str, console: Console) -> Trained:
    """The same for data that are arrays: no tokens, no tokenizer."""
    source, config, run = recipe["data"], cast(Any, recipe["model"]), plan.run
    objectives = LEARNT_BY.get(config.kind, ())
    if not isinstance(source, ArraysConfig) or not objectives:
        kinds = " or ".join(repr(kind) for kind in LEARNT_BY)
        raise ValueError(f"model.kind={config.kind!r}: does not learn data.kind={source.kind!r}; arrays need model.kind={kinds}")
    if recipe["objective"].kind not in objectives:
        kinds = " or ".join(map(repr, objectives))
        raise ValueError(f"objective.kind={recipe['objective'].kind!r}: does not teach a {config.kind}; choose {kinds}")
    teacher = open_teacher(config, device)
    if teacher is not None:
        config = cast(StudentConfig, config).like(teacher)
        recipe = recipe.model_copy(update={"sections": {**recipe.sections, "model": config}})
    arrays = data_of(source, teacher, cache_directory(), console)
    told = "classes" if isinstance(config, DenoiserConfig) else "context"
    for name, needed, given in (("shape", arrays.shape, config.shape), (told, arrays.context, getattr(config, told))):
        if needed != given:
            raise ValueError(f"model.{name}={given}: the data have {needed}; set model.{name} to that")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        network = config.build().to(device)
    if teacher is not None:
        network.load_state_dict(teacher.state_dict())
    trainer = Trainer(
        network,
        objective_of(recipe["objective"], teacher),
        arrays.train(run.batch, run.seed),
        plan,
        directory,
        validation=Validation(_HeldOutRows(arrays, run.batch)),
        extra={"recipe.json": recipe.dump()},
        console=console,
    )
    summary = trainer.run(resume)
    return Trained(type(network).load(summary.checkpoint, device), summary, directory)


def build_network(recipe: Recipe, dataset: Dataset, seed: int) -> Decoder:
    """The recipe's model with weights drawn from `seed`. Raises ValueError if the tokenizer has more ids than the model."""
    config = cast(Any, recipe["model"])
    if dataset.tokenizer.vocab > config.vocab:
        raise ValueError(
            f"model.vocab={config.vocab}: the tokenizer has {dataset.tokenizer.vocab} ids; set model.vocab to at least that"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(Decoder, config.build())


@final
class _HeldOut:
    """The validation batches of a dataset, iterated anew each time."""

    def __init__(self, dataset: Dataset, batch: int, length: int) -> None:
        self._dataset, self._batch, self._length = dataset, batch, length

    def __iter__(self) -> Iterator[Batch]:
        return self._dataset.validation(self._batch, self._length)


@final
class _HeldOutRows:
    """The held-out batches of arrays, iterated anew each time."""

    def __init__(self, arrays: Arrays, batch: int) -> None:
        self._arrays, self._batch = arrays, batch

    def __iter__(self) -> Iterator[Batch]:
        return self._arrays.validation(self._batch)


def _prepared(recipe: Recipe, target: Model | None, console: Console) -> Dataset:
    """The recipe's data in its tokenizer's tokens, or in the target's."""
    data = corpus_of(recipe["data"], target, cache_directory(), console)
    tokenizer = cast(BPEConfig, recipe["tokenizer"]) if target is None else cast(Tokenizer, target.tokenizer)
    return prepare(data, tokenizer, data_directory(data, tokenizer), console.print)


def data_directory(data: DataConfig, tokenizer: BPEConfig | Tokenizer) -> Path:
    """One folder per source, tokenizer and Python version, so that runs of one recipe share their tokens."""
    words = tokenizer.hash if isinstance(tokenizer, Tokenizer) else tokenizer.identity
    content = f"{data.model_dump_json()}{words}{sys.version}"
    return cache_directory() / "data" / hashlib.sha256(content.encode()).hexdigest()[:16]
