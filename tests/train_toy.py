"""A language model, objective and data for tests of the trainer: tiny, stochastic, with a state of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import CounterRng, Rng
from fewstep.training.checkpoint import read
from fewstep.training.optim import OPTIMS
from fewstep.training.plan import Budget, Plan, Run
from fewstep.training.precision import PRECISIONS
from fewstep.training.schedule import SCHEDULES
from fewstep.training.trainer import Summary, Trainer, Validation

VOCAB, LENGTH, ROWS = 16, 12, 4


class ToyModel(nn.Module):
    """Predicts the next token from the present one, through a residual block with dropout."""

    def __init__(self, seed: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.recompute = False
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            self.embedding = nn.Embedding(VOCAB, 24)
            self.block = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 40), nn.GELU(), nn.Dropout(dropout), nn.Linear(40, 24))
            self.head = nn.Linear(24, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + (checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)))


class ToyObjective:
    """Next token after replacing a tenth of the inputs; its state is a moving average of the embedding and a count of steps."""

    def __init__(self, corrupted: float = 0.1, factor: float = 1.0) -> None:
        self.corrupted, self.factor = corrupted, factor
        self.average: Tensor | None = None
        self.steps = 0

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        inputs = batch.tokens[:, :-1]
        inputs = torch.where(rng.uniform(inputs.shape[1]) < self.corrupted, 0, inputs)
        target = batch.tokens[:, 1:]
        if batch.segments is not None:
            target = torch.where(batch.segments[:, 1:] >= 0, target, -100)
        units = int((target != -100).sum())
        total = cross_entropy(model(inputs).flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
        value = total / max(units, 1)
        return Loss(value * self.factor, units, {"next_token": value.detach()})

    def after_step(self, model: nn.Module) -> None:
        self.steps += 1
        weight = model.get_parameter("embedding.weight").detach()
        self.average = weight.clone() if self.average is None else self.average.lerp(weight, 0.1)

    def validated(self, metrics: Mapping[str, float]) -> None:
        self.last = dict(metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "nested": [{"average": self.average}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.average = state["steps"], state["nested"][0]["average"].clone()


class ToyData:
    """Arithmetic sequences modulo the vocabulary, in batches of `rows`; batch n holds the samples n * rows and on."""

    def __init__(self, seed: int, rows: int = ROWS, padded: bool = False) -> None:
        self.rng = CounterRng.seeded([seed]).split("toy")
        self.rows, self.padded = rows, padded

    def batch(self, step: int) -> Batch:
        sample = torch.arange(self.rows) + step * self.rows
        rng = self.rng.fork(torch.zeros_like(sample)).at(sample)
        start, stride, cut = (rng.uniform(3) * torch.tensor([VOCAB, 3, LENGTH - 3])).long().unbind(1)
        index = torch.arange(LENGTH)
        tokens = (start[:, None] + (1 + stride[:, None]) * index) % VOCAB
        segments = torch.where(index < 3 + cut[:, None], 0, -1) if self.padded else None
        return Batch(tokens, segments)


def plan(steps: int, optim: str = "adamw", precision: str = "fp32", lr: float = 3e-3, **run: Any) -> Plan:
    settings = {"batch": ROWS, "length": LENGTH, "checkpoint_seconds": 0, "log_every": 5, "threads": 1, **run}
    schedule, budget = SCHEDULES["wsd"](), Budget(steps=steps)
    return Plan(OPTIMS[optim](lr=lr), schedule, PRECISIONS[precision](), budget, Run(**settings))


def trainer(directory: Path, seed: int, settings: Plan, **parts: Any) -> Trainer:
    model = parts.pop("model", None) or ToyModel(seed)
    objective = parts.pop("objective", None) or ToyObjective()
    data = parts.pop("data", None) or ToyData(seed)
    console = parts.pop("console", None) or Console(quiet=True)
    validation = Validation([ToyData(seed).batch(10**6)], bytes_per_token=2.0)
    return Trainer(model, objective, data, settings, directory, validation=validation, console=console, **parts)


def assert_same_end(one: Summary, other: Summary) -> None:
    """Both runs ended in the same state, bit for bit, clocks apart."""
    assert one.used.steps == other.used.steps and one.used.tokens == other.used.tokens
    first, second = read(one.checkpoint), read(other.checkpoint)
    for name in ("weights", "tensors"):
        left, right = getattr(first, name), getattr(second, name)
        assert left.keys() == right.keys() and left
        different = [key for key in left if not torch.equal(left[key], right[key])]
        assert not different, f"{name}: {different}"
    left, right = dict(first.state), dict(second.state)
    left.pop("seconds"), right.pop("seconds")
    assert left == right
