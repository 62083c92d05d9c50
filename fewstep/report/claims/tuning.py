"""Networks that a reproduction needs and does not find: a small draft model, heads. They train for a fixed time on the model's
own training data.

This file knows decoders, heads and the trainer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from fewstep.core.objective import Objective
from fewstep.core.recipe import resolve
from fewstep.hub.load import HEADS
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.models.model import Model
from fewstep.nn.heads import ParallelHeads, ParallelHeadsConfig
from fewstep.nn.packed import pack
from fewstep.recipes.run import cache_directory, train
from fewstep.report.claims.claim import Bench
from fewstep.training.data import DATA, DataConfig, Dataset, prepare
from fewstep.training.objectives.multi_token import MultiTokenConfig
from fewstep.training.objectives.next_token import NextTokenConfig
from fewstep.training.optim import OPTIMS
from fewstep.training.plan import Budget, Plan, Run, Used
from fewstep.training.precision import PRECISIONS
from fewstep.training.schedule import SCHEDULES
from fewstep.training.trainer import Summary, Trainer


def trained_draft(bench: Bench, depth: int = 2) -> Model:
    """A draft model: the target's first `depth` blocks with its embedding, norm and head, trained on the next token."""
    target = bench.model.network
    config = target.config.model_copy(update={"depth": min(depth, target.depth), "heads": ()})
    draft = built(config, bench.effort.seed)
    own = draft.state_dict()
    draft.load_state_dict({name: value for name, value in _weights(target).items() if name in own})
    tune(bench, dataset_of(bench), draft, NextTokenConfig().build(), "draft")
    return _laid_out(bench, draft)


def trained_parallel_heads(bench: Bench, depth: int = 3) -> Model:
    """The model with parallel heads in place of its own, each from the trunk's last block, trained on the frozen trunk."""
    target = bench.model.network
    network = built(target.config.model_copy(update={"heads": (ParallelHeadsConfig(depth=depth),)}), bench.effort.seed)
    heads = cast(ParallelHeads, network.heads["mtp"])
    for k in range(1, depth + 1):
        heads.block(k).load_state_dict(target.blocks[-1].state_dict())
    trunk = {name: value for name, value in _weights(target).items() if not name.startswith("extra.")}
    network.load_state_dict(network.state_dict() | trunk)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith("extra."))
    objective = MultiTokenConfig(trunk="frozen", weight=float(depth)).build()
    tune(bench, dataset_of(bench), network, objective, "heads")
    return _laid_out(bench, network)


def heads_at_hand(bench: Bench, kind: str) -> str:
    """The directory of heads of `kind` ("": the model has its own): that in the bench's folder of heads, else trained there.

    Without a folder they are trained in scratch, by the shipped recipe of that name. Raises ValueError for a run that has not
    ended, or a model whose recipe names no training data.
    """
    effort = bench.effort
    directory = (Path(effort.heads) if effort.heads else bench.scratch) / kind
    if (directory / HEADS).is_file():
        return str(directory)
    if kind in bench.model.network.heads:
        return ""
    unfinished = f"heads={effort.heads!r}: {directory} holds a run that has not ended; wait for it, resume it or remove it"
    if directory.exists():
        raise ValueError(unfinished)
    if "data" not in bench.model.recipe:
        raise ValueError("model: its recipe names no training data; use a fewstep model, e.g. code-nano, or give its heads")
    bench.console.print(f"no heads for {kind}: training them for {effort.seconds:g} s")
    data = cast(Mapping[str, object], bench.model.recipe["data"])
    fields = {f"data.{name}": value for name, value in data.items()}
    chosen = {"model.target": effort.model, "budget.seconds": effort.seconds, "run.seed": effort.seed}
    if train(kind, {**fields, **chosen}, directory=directory, console=bench.console).summary.interrupted:
        raise ValueError(unfinished)
    return str(directory)


def dataset_of(bench: Bench) -> Dataset:
    """The data that the model's recipe names, in the model's tokens. Raises ValueError if it names none."""
    model = bench.model
    if "data" not in model.recipe or model.tokenizer is None:
        raise ValueError("model: its recipe names no training data; use a fewstep model, e.g. code-nano")
    data = cast(DataConfig, resolve(model.recipe["data"], DATA, "data"))
    return prepare(data, model.tokenizer, cache_directory() / "claims" / model.tokenizer.hash[:16], bench.console.print)


def built(config: DecoderConfig, seed: int) -> Decoder:
    """A decoder with weights drawn by `seed`, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.build().float()


def tune(
    bench: Bench,
    dataset: Dataset,
    network: nn.Module,
    objective: Objective,
    name: str,
    run: Run | None = None,
    budget: Budget | None = None,
) -> Used:
    """Train `network` in place on `dataset` within `budget` (None: the bench's seconds); the log goes to `name` in scratch.

    `run`: its batch and length are taken (None: 8 rows of 256 tokens). Raises ValueError if it is stopped.
    """
    effort = bench.effort
    sizes = run or Run(batch=8, length=256)
    run = sizes.model_copy(update={"seed": effort.seed, "validate_every": 0, "checkpoint_seconds": 0.0})
    budget = budget or Budget(seconds=effort.seconds)
    plan = Plan(OPTIMS["muon"](), SCHEDULES["wsd"](), PRECISIONS["fp32"](), budget, run)
    loader = dataset.train(run.batch, run.length, run.seed)
    used = finished(Trainer(network, objective, loader, plan, bench.scratch / name, console=bench.console).run())
    network.eval()
    return used


def finished(summary: Summary) -> Used:
    """What a training used. Raises ValueError if it was stopped, for a claim must not speak of half a training."""
    if summary.interrupted:
        raise ValueError(f"training: stopped after {summary.used.steps} steps, too early for a claim; reproduce it again")
    return summary.used


def _weights(network: Decoder) -> dict[str, Tensor]:
    """All weights by name, a tied head's too, which is not saved where the weights are packed."""
    weights: dict[str, Tensor] = network.state_dict()
    return weights | ({"head.weight": weights["embedding.weight"]} if network.config.tied else {})


def _laid_out(bench: Bench, network: Decoder) -> Model:
    """A trained network as `load` would give it: in the model's dtype, packed for decoding."""
    network.requires_grad_(False)
    pack(network.to(bench.model.dtype))
    return Model(network, bench.model.tokenizer, bench.model.recipe)
