"""Tuning: the draft length and tree that make a drafter fastest on this machine, or none where plain decoding is faster.

Steps are timed by tree size and by what drafting adds, one run with a wide tree scores all trees inside it, and the best by these
numbers race plain decoding. This file knows models and drafters by their contracts, and what shapes there are from `shapes`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from fewstep.core.model import Target
from fewstep.core.recipe import Config, parse
from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.drafters.silent import Silent, SilentConfig
from fewstep.decode.guard import Prices
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.text import drafter_config
from fewstep.hub.heads import companion
from fewstep.models.model import Model
from fewstep.nn.heads import ParallelHeads, SequentialHeads
from fewstep.nn.medusa import FreeHeads
from fewstep.report.acceptance import Ledger, Pace, accepted
from fewstep.report.prompts import prompts_for, read_prompts
from fewstep.report.shapes import Shape, anchors, inside, widest
from fewstep.report.steps import Costs, Curve, Timing, Work, measured_costs, measured_curve, raced
from fewstep.report.tuned import Tuned, circumstances, keep

_LEVELS = 6  # of drafters that can go on for ever
_RACED = 4  # prompts of the race: few, so that many rounds tell how long a step takes where nothing disturbs it
_FREE = ("ngram", "retrieval")  # drafters that need no weights


@final
class TuneConfig(Config):
    """How a drafter is tuned: for `batch` rows at `temperature`, trees of at most `nodes` nodes, its root included.

    Acceptance is measured on `prompts` prompts continued by `new_tokens` tokens; the `finalists` best race plain decoding on some
    of them, up to `rounds` times, and one that is not `gain` times as fast loses to it. `seconds`: what the costs, the acceptance
    and the race take at most, each, about.
    """

    batch: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    nodes: int = Field(default=16, ge=2)
    prompts: int = Field(default=12, ge=1)
    new_tokens: int = Field(default=64, ge=8)
    finalists: int = Field(default=3, ge=1)
    rounds: int = Field(default=8, ge=1)
    gain: float = Field(default=1.02, ge=1)
    seconds: float = Field(default=10.0, gt=0, allow_inf_nan=False)


@final
@dataclass(frozen=True, slots=True)
class Candidate:
    """A shape, how it advances, and how many times faster than plain decoding that makes it by the costs."""

    shape: Shape
    pace: Pace
    predicted: float
    prices: Prices


@final
@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured: the curve, the `candidates`, best first, and of the first few the speed over plain decoding."""

    curve: Curve
    candidates: tuple[Candidate, ...]
    measured: tuple[float, ...]
    chosen: Tuned

    def show(self, console: Console) -> None:
        """The curve, the finalists and the choice."""
        calls = Table("nodes", *map(str, self.curve.steps), box=SIMPLE_HEAD)
        calls.add_row("v(n) / v(1)", *(f"{price:.2f}" for price in self.curve.steps.values()))
        console.print(calls)
        table = Table(box=SIMPLE_HEAD)
        for column in ("nodes", "depth", "tokens per call", "predicted", "measured"):
            table.add_column(column, justify="right")
        for place, one in enumerate(self.candidates[:5]):
            speed = f"{self.measured[place]:.2f}x" if place < len(self.measured) else ""
            size = str(one.shape.nodes), str(one.shape.depth)
            table.add_row(*size, f"{one.pace.tokens:.2f}", f"{one.predicted:.2f}x", speed)
        console.print(table)
        console.print(f"chosen: {self.chosen.label}", highlight=False, markup=False)


def tune(
    target: Target,
    drafter: DrafterConfig,
    load: Load,
    prompts: Sequence[Sequence[int]],
    config: TuneConfig = TuneConfig(),
    curve: Curve | None = None,
) -> Tuning:
    """Choose the shape of `drafter` that is fastest on `prompts`, or silence; `curve`: if it was measured before.

    Cost: at most about three times `config.seconds`.

    A drafter whose trees have no shape to set is only compared with silence. Raises ValueError if it does not fit `target`.
    """
    prompts = [list(prompt) for prompt in prompts[: max(config.prompts, 4 * config.batch)]]
    prompts += prompts[: -len(prompts) % config.batch]
    sampling = SamplingConfig(temperature=config.temperature)
    work = Work(target, prompts, config.batch, config.new_tokens, config.nodes, sampling)
    families = widest(drafter, levels(drafter, target, load), config.nodes)
    curve = curve or measured_curve(work, config.seconds / 2)
    candidates: list[Candidate] = []
    for wide in families:
        share = config.seconds / len(families)
        costs = measured_costs(
            work, {one: one.config.build(target, load) for one in anchors(wide, config.nodes)}, curve, share / 2
        )
        built = wide.config.build(target, load)
        ledger = accepted(
            target, built, prompts[: config.prompts], config.new_tokens - 1, wide.nodes, sampling=sampling, seconds=share
        )
        candidates += ranked(inside(wide, config.nodes, ledger.likeliest), ledger, costs, config.batch)
    candidates.sort(key=lambda one: (-one.predicted, one.shape.nodes))
    finalists = candidates[: config.finalists]
    some = replace(work, prompts=prompts[: config.batch * -(-_RACED // config.batch)])
    entrants = [Silent(), *(one.shape.config.build(target, load) for one in finalists)]
    plain, *timings = raced(some, entrants, config.rounds, config.seconds)
    speeds = [_speed(one, plain, timing) for one, timing in zip(finalists, timings, strict=True)]
    best = max(range(len(speeds)), key=speeds.__getitem__)
    if speeds[best] < config.gain:
        chosen = Tuned(SilentConfig(), 1.0, Prices({1: 1.0}, 0.0))
    else:
        chosen = Tuned(finalists[best].shape.config, speeds[best], finalists[best].prices)
    return Tuning(curve, tuple(candidates), tuple(speeds), chosen)


def tune_model(
    model: Model,
    source: str,
    drafters: Sequence[str],
    fields: Mapping[str, object],
    asked: Mapping[str, object],
    prompts: Path | None = None,
    *,
    console: Console | None = None,
) -> list[Path]:
    """`tune` as a command, for each of `drafters` (none: all that the model can run with): shown, kept for `generate`; the files.

    `fields` are the drafter's, `asked` those of `TuneConfig`. Raises ValueError for a bad field, a drafter that does not fit, or
    a model without a tokenizer.
    """
    console = console or Console()
    if model.tokenizer is None:
        raise ValueError(f"model={source!r}: has no tokenizer to read prompts with; load it with its tokenizer.json")
    config = parse(TuneConfig, asked)
    count = max(config.prompts, 4 * config.batch)
    held_out = read_prompts(prompts) if prompts else prompts_for(source, model, count)
    ids = [model.tokenizer.encode(prompt.prompt) for prompt in held_out[:count]]
    facts = circumstances(model, config.batch, config.temperature > 0)
    kept: list[Path] = []
    curve = None
    for name in drafters or [*(head for head in model.network.heads if head in DRAFTERS), *_FREE]:
        chosen = drafter_config(model, name, fields)
        found = tune(model.network, chosen, companion(model), ids, config, curve)
        curve = found.curve
        console.print(f"{name}, {facts['dtype']}, {facts['threads']} threads, batch {config.batch}", highlight=False)
        found.show(console)
        kept.append(keep(found.chosen, chosen, facts))
    return kept


def ranked(shapes: Iterable[Shape], ledger: Ledger, costs: Costs, batch: int) -> list[Candidate]:
    """Every shape with what it promises on `batch` rows, the fastest first."""
    found = []
    for shape in shapes:
        pace = ledger.pace(shape)
        speed = costs.speed(shape, pace.tokens, pace.together(batch))
        found.append(Candidate(shape, pace, speed, costs.prices(shape)))
    return sorted(found, key=lambda one: (-one.predicted, one.shape.nodes))


def _speed(one: Candidate, plain: Timing, timing: Timing) -> float:
    """How many times faster than plain decoding by the seconds of the steps raced, at the pace on all texts."""
    pace = (one.pace.tokens * one.pace.steps + timing.tokens) / (one.pace.steps + timing.steps)
    return plain.best / timing.best * pace * timing.steps / timing.tokens


def levels(drafter: DrafterConfig, target: Target, load: Load) -> int:
    """How deep its trees may be."""
    path = drafter.model_dump().get("path")
    heads: nn.Module | None = target.heads.get(drafter.kind)
    if heads is None and path:
        heads = load(path).heads.get(drafter.kind)
    return heads.depth if isinstance(heads, SequentialHeads | ParallelHeads | FreeHeads) else _LEVELS
