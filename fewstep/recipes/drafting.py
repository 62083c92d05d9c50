"""Training heads for a finished model, the target: what a run reads from it, what it leaves alone, and what it writes at its end.

This file knows no kind of heads: a config builds them, an objective teaches them, `acceptance` measures them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, final

import torch
from pydantic import Field
from rich.console import Console
from rich.progress import track

from fewstep.core.recipe import Config, Recipe, choice
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.text import GenerationConfig, generate
from fewstep.hub.heads import save_heads
from fewstep.hub.load import load
from fewstep.models.decoder import Decoder
from fewstep.models.model import Model
from fewstep.nn.ahead import HeadsConfig, Restricts
from fewstep.nn.heads import HEADS
from fewstep.nn.medusa import MedusaHeadsConfig
from fewstep.recipes.acceptance import measure
from fewstep.text.tokenizer import Tokenizer
from fewstep.training.checkpoint import load_tensors, read
from fewstep.training.data import Dataset, SelfDistilledConfig, TargetTokenizerConfig, TextConfig
from fewstep.training.data.shards import write_atomically
from fewstep.training.data.sources import DataConfig
from fewstep.training.objectives.ahead import Foresees, HeadsObjectiveConfig

MODEL = "model"  # the folder of the run for a target that is written with its heads


@final
class DrafterConfig(Config):
    """`heads` for the finished model `target`: a shipped name, a directory or a hub id.

    `save`: "heads" alone, or the whole "model" with them, which a trunk that was trained too needs. The acceptance report at the
    end of the run continues `prompts` held-out texts by `new_tokens` (0 prompts: no report).
    """

    kind: ClassVar[str] = "drafter"
    source: ClassVar[str] = "none: whatever can be loaded, with heads beside it"

    target: str = "code-nano"
    heads: choice(lambda: HEADS, "heads") = MedusaHeadsConfig()  # type: ignore[valid-type]
    save: Literal["heads", "model"] = "heads"
    prompts: int = Field(default=64, ge=0)
    new_tokens: int = Field(default=64, ge=16)

    @property
    def drafter(self) -> str:
        """Whom the heads serve."""
        name: str = cast(Any, self.heads).drafter
        return name

    def build(self, device: str = "cpu", seed: int = 0) -> Model:
        """The target with freshly drawn heads, to be trained. Raises ValueError if there is no such model or they do not fit."""
        model = load(self.target, device, packed=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.network.attach(cast(Config, self.heads))
        return model


def open_target(recipe: Recipe, device: str, seed: int) -> Model | None:
    """The target of a recipe that trains heads for one, all else frozen; None for any other recipe.

    Raises ValueError for sections that do not go together.
    """
    config, objective, tokenizer = (recipe[name] for name in ("model", "objective", "tokenizer"))
    if not isinstance(config, DrafterConfig):
        return None
    if not isinstance(objective, HeadsObjectiveConfig) or objective.drafter != config.drafter:
        raise ValueError(
            f"objective={objective.kind!r}: does not train the heads of {config.drafter!r}; choose the one that does"
        )
    if not isinstance(tokenizer, TargetTokenizerConfig):
        raise ValueError(f"tokenizer={tokenizer.kind!r}: a drafter speaks its target's tokens; set tokenizer='target'")
    if objective.trunk == "joint" and config.save == "heads":
        raise ValueError("model.save='heads': with objective.trunk='joint' the trunk changes too; set model.save='model'")
    model = config.build(device, seed)
    if model.tokenizer is None:
        raise ValueError(f"model.target={config.target!r}: has no tokenizer to read text with; add its tokenizer.json")
    mine = f"extra.{config.drafter}."
    for name, parameter in model.network.named_parameters():
        joint = objective.trunk == "joint" and not name.startswith("extra.")
        parameter.requires_grad_(joint or name.startswith(mine))
    return model


def corpus_of(data: Config, target: Model | None, cache: Path, console: Console) -> DataConfig:
    """`data`, or in place of self-distilled data the texts that its writer wrote, kept in `cache` for later runs.

    Raises ValueError for a writer without a tokenizer, and without one for a target that knows masks, which writes otherwise.
    """
    if not isinstance(data, SelfDistilledConfig) or (target is None and data.writer is None):
        return cast(DataConfig, data)
    writer = cast(Model, target) if data.writer is None else load(data.writer)
    if writer.tokenizer is None:
        raise ValueError(f"data.writer={data.writer!r}: has no tokenizer to read text with; add its tokenizer.json")
    if data.writer is None and writer.network.mask_token is not None:
        raise ValueError("data.writer: none, and a model with a mask token does not write by itself; name the one that writes")
    file = cache / "distilled" / f"{_identity(data, writer.network)}.jsonl"
    if not file.is_file():
        console.print(f"{data.count} texts of the writer's own: {data.new_tokens} tokens each", highlight=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, _written(data, writer, console).encode())
    return TextConfig(paths=(file,), held_out=data.held_out)


def restrict(network: Decoder, dataset: Dataset) -> None:
    """Let heads with a vocabulary of their own choose it from the training data."""
    for heads in network.heads.values():
        if isinstance(heads, Restricts) and any(parameter.requires_grad for parameter in heads.parameters()):
            heads.restrict(dataset.counts(network.vocab), network.head.weight)


def finish(
    target: Model, recipe: Recipe, objective: object, dataset: Dataset, checkpoint: Path, directory: Path, console: Console
) -> Model:
    """Take the trained weights, measure and report their acceptance, and write heads or model into the run's `directory`."""
    config, network = cast(DrafterConfig, recipe["model"]), target.network
    load_tensors(network, read(checkpoint).weights)
    network.requires_grad_(False).eval()
    if config.prompts and isinstance(objective, Foresees):
        found = measure(objective, network, held_out(dataset, config.prompts), config.new_tokens)
        if isinstance(config.heads, HeadsConfig):
            _remember(network, config.heads.model_copy(update={"accuracies": found.accuracies}))
        found.write(directory)
        found.show(console)
    trained = Model(network, target.tokenizer, target.recipe, chat=target.chat, settings=target.settings)
    if config.save == "model":
        trained.save(directory / MODEL)
    else:
        save_heads(network, config.drafter, directory, target=config.target)
    return trained


def held_out(dataset: Dataset, count: int, length: int = 64) -> list[list[int]]:
    """At most `count` pieces of `length` held-out tokens, each of one document, spread over all of them.

    Raises ValueError if no document is that long.
    """
    whole = [
        tokens.tolist()
        for batch in dataset.validation(256, length)
        for tokens, segments in zip(batch.tokens, cast(torch.Tensor, batch.segments), strict=True)
        if not bool(segments.any())
    ]
    if not whole:
        raise ValueError(f"data: no held-out document has {length} tokens; add text, or set model.prompts=0 for no report")
    return [whole[i * len(whole) // count] for i in range(count)] if count < len(whole) else whole


def _remember(network: Decoder, measured: HeadsConfig) -> None:
    """Set the same heads anew, with a config that holds what was measured."""
    weights = network.heads[measured.drafter].state_dict()
    network.attach(measured)
    network.heads[measured.drafter].load_state_dict(weights)
    network.requires_grad_(False).eval()


def _written(data: SelfDistilledConfig, writer: Model, console: Console) -> str:
    """JSON lines of the writer's continuations, prompts included."""
    tokenizer = cast(Tokenizer, writer.tokenizer)
    pieces = (
        ids[start : start + data.prompt_tokens]
        for document in cast(DataConfig, data.prompts).build().documents("train")
        for ids in tokenizer.encode_documents([document.text])
        for start in range(0, len(ids) - data.prompt_tokens + 1, data.prompt_tokens)
    )
    prompts = _spread(list(pieces), data.count)
    options = GenerationConfig(max_new_tokens=data.new_tokens, temperature=data.temperature, seed=data.seed, budget=1)
    silent = SilentConfig().build(writer.network, lambda path: writer.network)
    lines = []
    starts = range(0, len(prompts), data.batch)
    for start in track(starts, "writing", console=console, transient=True, disable=not console.is_terminal):
        rows = prompts[start : start + data.batch]
        for row, done in zip(rows, generate(writer, rows, silent, options), strict=True):
            lines.append(json.dumps({"text": tokenizer.decode([*row, *done.tokens])}) + "\n")
    return "".join(lines)


def _spread(pieces: list[list[int]], count: int) -> list[list[int]]:
    if not pieces:
        raise ValueError("data.prompt_tokens: no document is that long; lower it, or give prompts of more text")
    return [pieces[i * len(pieces) // count] for i in range(count)] if count < len(pieces) else pieces


def _identity(data: SelfDistilledConfig, network: Decoder) -> str:
    """A name for what `network` would write: of the settings, its config and a sample of its weights."""
    content = hashlib.sha256(f"{data.model_dump_json()}{network.config.model_dump_json()}".encode())
    for parameter in (network.norm.weight, network.embedding.weight[:256], network.head.weight[:256]):
        content.update(cast(torch.Tensor, parameter).detach().float().cpu().numpy().tobytes())
    return content.hexdigest()[:16]
