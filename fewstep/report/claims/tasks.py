"""Decoders and the made-up tasks they are trained on: texts drawn afresh for every step, labels where an answer is asked for.

All get the same number of steps, so that what they learn does not depend on the machine. This file knows no task and no mixer.
"""

from pathlib import Path
from typing import cast, final

import torch
from rich.console import Console
from torch import nn

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import CounterRng, Rng
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.report.claims.claim import Bench
from fewstep.report.claims.tuning import built, finished
from fewstep.training.objectives.next_token import token_loss
from fewstep.training.objectives.stateless import Stateless
from fewstep.training.optim import AdamWConfig
from fewstep.training.plan import Budget, Plan, Run
from fewstep.training.precision import PRECISIONS
from fewstep.training.schedule import SCHEDULES
from fewstep.training.trainer import Data, Trainer

_HELD_OUT = 8  # batches that a trained decoder is asked


@final
class Answers(Stateless):
    """The objective of a batch with `labels` [B,T] in its extras: the cross-entropy of what is asked for."""

    name = "answers"

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        network = cast(Decoder, model)
        value, accuracy, units = token_loss(network.unembed(network(batch.tokens).final), batch.extra["labels"])
        return Loss(value, int(units), {"accuracy": accuracy})


def trained(bench: Bench, config: DecoderConfig, task: Data, name: str) -> Decoder:
    """A decoder trained on `task` for the bench's steps; every step is in the log in the folder `name` of scratch."""
    effort = bench.effort
    bench.console.print(f"training a decoder with {name} for {effort.steps} steps")
    return learned(config, task, effort.steps, effort.seed, bench.scratch / name, bench.console)


def learned(
    config: DecoderConfig, task: Data, steps: int, seed: int, directory: Path, console: Console, log_every: int = 1
) -> Decoder:
    """A decoder with weights drawn by `seed`, trained on `task`; the log and the last weights are in `directory`."""
    network = built(config, seed)
    run = Run(seed=seed, validate_every=0, checkpoint_seconds=0, checkpoint_steps=0, log_every=log_every, divergence=0)
    optim = AdamWConfig(lr=5e-3, weight_decay=0.0)
    plan = Plan(optim, SCHEDULES["wsd"](), PRECISIONS["fp32"](), Budget(steps=steps), run)
    finished(Trainer(network, Answers(), task, plan, directory, console=console).run())
    return network.eval()


@torch.inference_mode()
def answered(network: nn.Module, task: Data) -> float:
    """The share of what is asked for in eight batches of `task` that the most likely token answers."""
    hits, asked, rng = 0.0, 0, CounterRng.seeded([0])
    for step in range(_HELD_OUT):
        loss = Answers().loss(network, task.batch(step), rng)
        hits, asked = hits + float(loss.metrics["accuracy"]) * loss.units, asked + loss.units
    return hits / asked
