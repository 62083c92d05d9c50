"""What a run may spend and how it goes about it: the sections of a recipe that the trainer reads. No model, no objective."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Self, cast, final

from pydantic import Field, model_validator

from fewstep.core.recipe import Config, Recipe
from fewstep.training.optim import Optim
from fewstep.training.precision import Precision
from fewstep.training.schedule import Schedule


@final
@dataclass(frozen=True, slots=True)
class Used:
    """What a run has spent: optimizer steps, tokens (positions of the batches, padding included), seconds of wall time."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


@final
class Budget(Config):
    """Limits of a run, whichever is met first. With none given: 1000 steps."""

    kind = "budget"

    tokens: int | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)
    seconds: float | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _some_limit(cls, values: Any) -> Any:
        limited = isinstance(values, Mapping) and any(values.get(name) is not None for name in ("tokens", "steps", "seconds"))
        return values if limited or not isinstance(values, Mapping) else {**values, "steps": 1000}

    def progress(self, used: Used) -> float:
        """The fraction of the budget used; the run ends when it reaches 1."""
        pairs = ((used.tokens, self.tokens), (used.steps, self.steps), (used.seconds, self.seconds))
        return max(spent / limit for spent, limit in pairs if limit is not None)


@final
class Run(Config):
    """How the run goes about it.

    `batch` rows of `length` tokens make one micro-batch (the caller builds the data from them); `accumulate` micro-batches make
    one optimizer step. `clip`: the largest gradient norm (0: off). `ema`: the decay of the weights' moving average (0: off).
    `divergence`: stop when this fraction of the loss gained so far is lost again (0: off). Checkpoints are written every
    `checkpoint_steps` steps and every `checkpoint_seconds` seconds (0: not by that clock) and at the end; the last `keep` stay.
    `validate_every`, `log_every`: steps (0: off; a validation closes the run if it is on). `compile`: `torch.compile` the model's
    forward. `recompute`: activation checkpointing. `threads`: CPU threads (0: leave them as they are).
    """

    kind = "run"

    batch: int = Field(16, gt=0)
    length: int = Field(512, gt=0)
    accumulate: int = Field(1, gt=0)
    clip: float = Field(1.0, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    divergence: float = Field(0.5, ge=0)
    seed: int = 0
    checkpoint_steps: int = Field(500, ge=0)
    checkpoint_seconds: float = Field(600.0, ge=0)
    keep: int = Field(3, gt=0)
    validate_every: int = Field(200, ge=0)
    log_every: int = Field(10, gt=0)
    compile: bool = False
    recompute: bool = False
    threads: int = Field(0, ge=0)


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """The five sections of a recipe that the trainer reads."""

    optim: Optim
    schedule: Schedule
    precision: Precision
    budget: Budget
    run: Run

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The trainer's sections of `recipe`. Raises ValueError for a section that is missing or of another kind."""
        values = {field.name: recipe.sections.get(field.name) for field in fields(cls)}
        kinds = {"optim": Optim, "schedule": Schedule, "precision": Precision, "budget": Budget, "run": Run}
        for name, value in values.items():
            if not isinstance(value, kinds[name]):
                raise ValueError(
                    f"{name}={value!r}: expected {kinds[name].__name__}; load the recipe with the trainer's registries"
                )
        return cls(**cast(Any, values))


BUDGETS: Mapping[str, type[Budget]] = MappingProxyType({Budget.kind: Budget})
RUNS: Mapping[str, type[Run]] = MappingProxyType({Run.kind: Run})
