"""Whole models that claims need: found by name in the bench's folder of heads, or trained there by a recipe.

This file knows run folders and the trainer; it knows no claim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, final

from fewstep.hub.load import RUN, load
from fewstep.models.model import Model
from fewstep.recipes import load_recipe
from fewstep.recipes.converting import ConvertedConfig
from fewstep.recipes.run import train
from fewstep.report.claims.claim import Bench
from fewstep.report.claims.tuning import finished
from fewstep.text.tokenizer import Tokenizer
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.data import SelfDistilledConfig

_UNFINISHED = ".unfinished"


@final
@dataclass(frozen=True, slots=True)
class AtHand:
    """A `model`, the `path` it was loaded from, and the `tokens` of its last training (None: its run is not there to tell).

    What a converted model learnt before, as the model it began as, is not among them.
    """

    model: Model
    path: str
    tokens: int | None

    @property
    def told(self) -> str:
        """The training in words."""
        return "training unknown" if self.tokens is None else f"{self.tokens:,} tokens in its last training"

    @property
    def block(self) -> int:
        """The tokens of a block as it was trained. Raises ValueError for a model that was not trained in blocks."""
        objective = cast(Mapping[str, object], self.model.recipe.get("objective", {}))
        size = objective.get("size")
        if not isinstance(size, int):
            raise ValueError(f"heads: {self.path} was trained by objective={objective.get('kind')!r}; give one trained by block")
        return size


def at_hand(bench: Bench, name: str, recipe: str, tokens: int | None = None) -> AtHand:
    """The model `name` in the bench's folder of heads, a run or a model's directory, else trained there by `recipe`.

    It is trained on so many `tokens` (None: for the bench's seconds), without a folder in scratch, on the data of the bench's
    model. A training that was stopped goes on the next time, and is found only when it has ended. Raises ValueError if it is
    stopped, for a model of another tokenizer, and a bench's model that names no data.
    """
    effort = bench.effort
    folder = Path(effort.heads) if effort.heads else bench.scratch
    directory = folder / name
    if not directory.is_dir():
        partial = folder / f"{name}{_UNFINISHED}"
        for_how_long = f"{effort.seconds:g} s" if tokens is None else f"{tokens:,} tokens"
        bench.console.print(f"no model {name} among the heads: training {recipe} for {for_how_long}", highlight=False)
        fields = _fields(bench, recipe) | {"budget.seconds": effort.seconds if tokens is None else None, "budget.tokens": tokens}
        finished(train(recipe, fields, directory=partial, resume=partial.is_dir(), console=bench.console).summary)
        partial.rename(directory)
    model = load(directory, dtype=effort.dtype)
    if model.tokenizer is None or model.tokenizer.hash != tokenizer_of(bench).hash:
        raise ValueError(f"heads={effort.heads!r}: {name} has another tokenizer than {effort.model}; train it with the model's")
    run = Checkpoints(directory / RUN, keep=1).latest(bench.console.print)
    return AtHand(model, str(directory), None if run is None else int(run.state["tokens"]))


def tokenizer_of(bench: Bench) -> Tokenizer:
    """The tokenizer of the bench's model. Raises ValueError if it has none."""
    if bench.model.tokenizer is None:
        raise ValueError("model: has no tokenizer to read text with; load it with its tokenizer.json")
    return bench.model.tokenizer


def data_of(bench: Bench) -> Mapping[str, object]:
    """The data that the bench's model was trained on. Raises ValueError if its recipe names none."""
    if "data" not in bench.model.recipe:
        raise ValueError("model: its recipe names no training data; use a fewstep model, e.g. code-nano")
    return cast(Mapping[str, object], bench.model.recipe["data"])


def encoded(bench: Bench) -> list[list[int]]:
    """The bench's prompts in its model's tokens."""
    tokenizer = tokenizer_of(bench)
    return [tokenizer.encode(prompt.prompt) for prompt in bench.prompts[: bench.effort.count]]


def _fields(bench: Bench, recipe: str) -> dict[str, object]:
    """What the bench says of a recipe: the data, where a converted model starts, the seed; nothing is validated on the way."""
    sections = load_recipe(recipe)
    fields: dict[str, object] = {"run.seed": bench.effort.seed, "run.validate_every": 0}
    if isinstance(sections["data"], SelfDistilledConfig):
        fields |= {"data.writer": bench.effort.model, "data.prompts": data_of(bench)}
    else:
        fields |= {f"data.{name}": value for name, value in data_of(bench).items()}
    if isinstance(sections["model"], ConvertedConfig):
        fields["model.start"] = bench.effort.model
    return fields
