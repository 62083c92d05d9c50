"""Features of images: the last hidden layer of a small classifier, trained on the classes of the data themselves.

It is trained once for a data set and a seed, and kept in the cache. This file knows no generative model.
"""

import hashlib
from pathlib import Path
from typing import cast, final

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.models.weights import fill, headers, shards
from fewstep.recipes.run import cache_directory
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.data.arrays import ArraysConfig, Table
from fewstep.training.objectives.stateless import Stateless
from fewstep.training.optim import AdamWConfig
from fewstep.training.plan import Budget, Plan, Run
from fewstep.training.precision import PRECISIONS
from fewstep.training.schedule import SCHEDULES
from fewstep.training.trainer import Trainer

WIDTH = 64  # features of an image
_BATCH, _ROWS = 64, 1024


@final
class Classifier(nn.Module):
    """Two convolutions, a mean over the halves of both sides, and two linear layers; images [B,C,H,W], both sides even."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.pool, self.hidden, self.out = nn.AdaptiveAvgPool2d(2), nn.Linear(256, WIDTH), nn.Linear(WIDTH, classes)
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        """[B,64], none below 0."""
        scaled = (x - cast(Tensor, self.centre)) / cast(Tensor, self.scale)
        return relu(self.hidden(self.pool(relu(self.second(relu(self.first(scaled))))).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the classes [B,K]."""
        return cast(Tensor, self.out(self.features(x)))


@final
class Classifying(Stateless):
    """Cross-entropy of the class of `extra["c"]` [B,K] given `extra["x"]`."""

    name = "classifying"

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        logits, label = model(batch.extra["x"]), batch.extra["c"].argmax(1)
        value = cross_entropy(logits, label)
        right = (logits.argmax(1) == label).float().mean()
        return Loss(value, len(label), {"accuracy": right})


def features(classifier: Classifier, x: Tensor) -> Tensor:
    """[N,64] of images x [N,C,H,W], some at a time."""
    with torch.no_grad():
        return torch.cat([classifier.features(some) for some in x.float().split(_ROWS)])


def accuracy(classifier: Classifier, batch: Batch) -> float:
    """The share of the images of `batch` whose class it tells."""
    with torch.no_grad():
        return float((classifier(batch.extra["x"]).argmax(1) == batch.extra["c"].argmax(1)).double().mean())


def classifier_of(data: ArraysConfig, steps: int = 600, seed: int = 0, cache: Path | None = None) -> Classifier:
    """The classifier of the images of `data`, which tells classes, from the `cache` (None: the user's) or trained now.

    Raises ValueError for data that are no images with classes. Cost: some ten seconds for digits, once.
    """
    table = data.build()
    if not isinstance(table, Table) or len(table.shape) != 3 or not table.context or table.shape[1] % 2 or table.shape[2] % 2:
        raise ValueError(f"data.kind={data.kind!r}: no images of even sides with classes; set data.classes=true or choose others")
    rows = table.rows("train").extra["x"]
    content = f"{data.model_dump_json()} {steps} {seed} {hashlib.sha256(rows.numpy().tobytes()).hexdigest()} {torch.__version__}"
    place = (cache or cache_directory()) / "features" / hashlib.sha256(content.encode()).hexdigest()[:16]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(table.shape[0], table.context)
    cast(Tensor, network.centre).fill_(float(rows.mean()))
    cast(Tensor, network.scale).fill_(float(rows.std()))
    checkpoints = Checkpoints(place / "checkpoints", keep=1)
    found = checkpoints.latest(lambda notice: None)
    if found is None or found.step < steps:
        run = Run(
            seed=seed, batch=min(_BATCH, len(rows)), validate_every=0, checkpoint_steps=0, checkpoint_seconds=0, log_every=steps
        )
        optim, schedule = AdamWConfig(lr=2e-3, weight_decay=1e-2), SCHEDULES["cosine"]()
        plan = Plan(optim, schedule, PRECISIONS["fp32"](), Budget(steps=steps), run)
        trainer = Trainer(network, Classifying(), table.train(run.batch, seed), plan, place, console=Console(quiet=True))
        trainer.run(resume=found is not None)
    else:
        fill(network.state_dict(keep_vars=True), headers(shards(checkpoints.path(found.step))))
    return network.eval()
