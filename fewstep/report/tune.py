"""Tuning: the draft length and tree that make a drafter fastest on this machine, or none where plain decoding is faster.

Steps are timed by tree size, one run with a wide tree scores all trees inside it, and the best by these numbers race plain
decoding. This file knows models and drafters by their contracts, and what shapes there are from `shapes`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, final

from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from fewstep.core.draft import Drafter
from fewstep.core.model import Target
from fewstep.core.recipe import Config, parse
from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.drafters.silent import Silent, SilentConfig
from fewstep.decode.generate import requests
from fewstep.decode.guard import Prices, interpolated
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.hub.heads import companion
from fewstep.models.model import Model
from fewstep.nn.heads import ParallelHeads, SequentialHeads
from fewstep.nn.medusa import FreeHeads
from fewstep.report.certificate import drafter_config
from fewstep.report.contest import PLAIN, Ours, RaceConfig, compete
from fewstep.report.costs import call_seconds
from fewstep.report.prompts import prompts_for, read_prompts
from fewstep.report.shapes import Ledger, Recorder, Shape, inside, widest
from fewstep.report.tuned import Tuned, circumstances, keep

_CALLS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_LEVELS = 6  # of drafters that can go on for ever


@final
class TuneConfig(Config):
    """How a drafter is tuned: for `batch` rows at `temperature`, trees of at most `nodes` nodes, its root included.

    Acceptance is measured on `prompts` prompts continued by `new_tokens` tokens; the `finalists` best race plain decoding, and
    one that is not `gain` times as fast loses to it.
    """

    batch: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    nodes: int = Field(default=16, ge=2)
    prompts: int = Field(default=12, ge=1)
    new_tokens: int = Field(default=64, ge=8)
    finalists: int = Field(default=3, ge=1)
    rounds: int = Field(default=2, ge=1)
    gain: float = Field(default=1.02, ge=1)
    seed: int = 0

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(temperature=self.temperature)


@final
@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds: `plain`, a step of plain decoding; `calls[n]`, a target call on n nodes; `rest[d][n]`, what a step with a tree of
    depth d and n nodes takes beyond its call: the proposal and the loop; `start[d]`, what the first step takes beyond a later
    one, since networks that draft read the prompt then; `horizon`: the tokens that a start is spread over."""

    plain: float
    calls: Mapping[int, float]
    rest: Mapping[int, Mapping[int, float]]
    start: Mapping[int, float] = field(default_factory=lambda: {1: 0.0})
    horizon: int = 64

    def speed(self, tokens: float, depth: int, sizes: Mapping[int, float]) -> float:
        """How many times faster than plain decoding steps are that emit `tokens` each."""
        per_token = self.seconds(depth, sizes) / tokens + interpolated(self.start, depth) / self.horizon
        return self.plain / per_token

    def seconds(self, depth: int, sizes: Mapping[int, float]) -> float:
        """A step with trees of `depth` that have n nodes in a share `sizes[n]` of the steps."""
        known = interpolated({at: interpolated(rest, max(sizes)) for at, rest in self.rest.items()}, depth)
        return known + sum(share * interpolated(self.calls, nodes) for nodes, share in sizes.items())

    def prices(self, depth: int, nodes: int) -> Prices:
        """The same in plain steps, for the guard: the loop's own time counts with the call, as it does in plain decoding."""
        loop = self.plain - self.calls[1]
        steps = {count: (seconds + loop) / self.plain for count, seconds in self.calls.items()}
        return Prices(steps, max(0.0, (self.seconds(depth, {nodes: 1.0}) - interpolated(self.calls, nodes) - loop) / self.plain))


@final
@dataclass(frozen=True, slots=True)
class Candidate:
    """A shape, the tokens per step it would keep, and how many times faster than plain decoding that makes it by the costs."""

    shape: Shape
    tokens: float
    predicted: float


@final
@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured: the costs, the `candidates`, best first, and of the first few the speed over plain decoding."""

    costs: Costs
    candidates: tuple[Candidate, ...]
    measured: tuple[float, ...]
    chosen: Tuned

    def show(self, console: Console) -> None:
        """The costs, the finalists and the choice."""
        calls = Table("nodes", *map(str, self.costs.calls), box=SIMPLE_HEAD)
        calls.add_row("v(n) / v(1)", *(f"{seconds / self.costs.calls[1]:.2f}" for seconds in self.costs.calls.values()))
        console.print(calls)
        table = Table(box=SIMPLE_HEAD)
        for column in ("nodes", "depth", "tokens per call", "predicted", "measured"):
            table.add_column(column, justify="right")
        for place, one in enumerate(self.candidates[:5]):
            speed = f"{self.measured[place]:.2f}x" if place < len(self.measured) else ""
            table.add_row(str(one.shape.nodes), str(one.shape.depth), f"{one.tokens:.2f}", f"{one.predicted:.2f}x", speed)
        console.print(table)
        fields = self.chosen.drafter.model_dump(mode="json", exclude_defaults=True)
        console.print(f"chosen: {fields}, {self.chosen.speed:.2f}x plain decoding", highlight=False, markup=False)


def tune(
    target: Target, drafter: DrafterConfig, load: Load, prompts: Sequence[Sequence[int]], config: TuneConfig = TuneConfig()
) -> Tuning:
    """Choose the shape of `drafter` that is fastest on `prompts`, or silence. Cost: a few seconds.

    A drafter whose trees have no shape to set is only compared with silence. Raises ValueError if it does not fit `target`.
    """
    prompts = [list(prompt) for prompt in prompts[: max(config.prompts, 4 * config.batch)]]
    prompts += prompts[: -len(prompts) % config.batch]
    wide = widest(drafter, levels(drafter, target, load)) or Shape(drafter, frozenset())
    ledger = accepted(target, wide.config.build(target, load), prompts, config, max(wide.nodes, config.nodes))
    costs = measured_costs(target, wide, load, prompts, config)
    shapes = list(inside(wide, ledger, config.nodes)) if wide.paths else [_as_it_is(drafter, ledger)]
    candidates = ranked(shapes, ledger, costs)
    finalists = candidates[: config.finalists]
    speeds = _race(target, [one.shape.config for one in finalists], load, prompts, config)
    place = max(range(len(speeds)), key=lambda i: speeds[i], default=-1)
    if place < 0 or speeds[place] < config.gain:
        chosen = Tuned(SilentConfig(), 1.0, Prices({1: 1.0}, 0.0))
    else:
        best = finalists[place].shape
        chosen = Tuned(best.config, speeds[place], costs.prices(best.depth, best.nodes))
    return Tuning(costs, tuple(candidates), tuple(speeds), chosen)


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
    kept = []
    for name in drafters or [*(head for head in model.network.heads if head in DRAFTERS), "ngram"]:
        chosen = drafter_config(model, name, fields)
        found = tune(model.network, chosen, companion(model), ids, config)
        console.print(f"{name}, {facts['dtype']}, {facts['threads']} threads, batch {config.batch}", highlight=False)
        found.show(console)
        kept.append(keep(found.chosen, chosen.kind, facts))
    return kept


def ranked(shapes: Sequence[Shape], ledger: Ledger, costs: Costs) -> list[Candidate]:
    """Every shape with what it promises, the fastest first."""
    found = []
    for shape in shapes:
        tokens = ledger.tokens(shape.paths)
        speed = costs.speed(tokens, shape.depth, ledger.sizes(shape.paths))
        found.append(Candidate(shape, tokens, speed))
    return sorted(found, key=lambda one: (-one.predicted, one.shape.nodes))


def accepted(target: Target, drafter: Drafter[Any], prompts: Sequence[Sequence[int]], config: TuneConfig, budget: int) -> Ledger:
    """What `drafter` has accepted while it continues `prompts`."""
    recorder = Recorder(drafter)
    for _ in _steps(target, recorder, prompts, config, config.new_tokens, budget):
        pass
    return recorder.ledger


def measured_costs(target: Target, wide: Shape, load: Load, prompts: Sequence[Sequence[int]], config: TuneConfig) -> Costs:
    """Time calls by size, plain steps, and of each depth the steps with the narrowest and the widest trees."""
    before = call_seconds(target, prompts[0], _CALLS, config.batch)
    some, tokens = prompts[: 2 * config.batch], config.new_tokens // 2
    plain = median(seconds for _, _, seconds in _steps(target, Silent(), some, config, tokens, 1))
    timed = []
    for shape in _timed(wide):
        drafter, budget = shape.config.build(target, load), max(shape.nodes, config.nodes)
        timed.append((shape.depth, list(_steps(target, drafter, some, config, tokens, budget))))
    after = call_seconds(target, prompts[0], _CALLS, config.batch)
    calls = {nodes: min(seconds, after[nodes]) for nodes, seconds in before.items()}  # others use the machine, too
    rest: dict[int, dict[int, float]] = {}
    start: dict[int, float] = {}
    for depth, steps in timed:
        beyond = [(first, nodes, seconds - interpolated(calls, nodes)) for first, nodes, seconds in steps]
        later = median(seconds for first, _, seconds in beyond if not first)
        rest.setdefault(depth, {})[max(nodes for _, nodes, _ in beyond)] = later
        begun = median(seconds for first, _, seconds in beyond if first) - later
        start[depth] = min(start.get(depth, begun), max(0.0, begun))
    return Costs(plain, calls, rest, start, config.new_tokens)


def levels(drafter: DrafterConfig, target: Target, load: Load) -> int:
    """How deep its trees may be."""
    path = drafter.model_dump().get("path")
    heads: nn.Module | None = target.heads.get(drafter.kind)
    if heads is None and path:
        heads = load(path).heads.get(drafter.kind)
    return heads.depth if isinstance(heads, SequentialHeads | ParallelHeads | FreeHeads) else _LEVELS


def _timed(wide: Shape) -> Iterator[Shape]:
    """Of each depth the chain and the widest tree, where shapes can be set."""
    branching = wide.config.model_dump().get("branching")
    if not wide.paths or branching is None:
        yield wide
        return
    for depth in range(1, len(branching) + 1):
        for shape in dict.fromkeys(((1,) * depth, tuple(branching[:depth]))):
            given = wide.config.model_copy(update={"branching": shape})
            yield Shape(given, frozenset(path for path in wide.paths if _within(path, shape)))


def _within(path: Sequence[int], branching: Sequence[int]) -> bool:
    return len(path) <= len(branching) and all(rank < most for rank, most in zip(path, branching, strict=False))


def _as_it_is(drafter: DrafterConfig, ledger: Ledger) -> Shape:
    return Shape(drafter, frozenset(path for offered in ledger.offered for path in offered))


def _steps(
    target: Target, drafter: Drafter[Any], prompts: Sequence[Sequence[int]], config: TuneConfig, tokens: int, budget: int
) -> Iterator[tuple[bool, int, float]]:
    """Of every step with all rows running: if it is a batch's first, the nodes of its largest tree, and its seconds."""
    settings = Settings(tokens, budget=budget)
    for start in range(0, len(prompts), config.batch):
        batch = prompts[start : start + config.batch]
        before, first = 0.0, True
        for event in requests(target, drafter, batch, settings, sampling=config.sampling, seed=config.seed + start):
            if event.payload.calls and len(event.payload.rows) == len(batch):
                yield first, max(event.payload.nodes.tolist()), event.cost.seconds - before
                first = False
            before = event.cost.seconds


def _race(
    target: Target, finalists: Sequence[DrafterConfig], load: Load, prompts: Sequence[Sequence[int]], config: TuneConfig
) -> list[float]:
    """How many times faster than plain decoding each of `finalists` is."""
    race = RaceConfig(
        max_new_tokens=config.new_tokens,
        temperature=config.temperature,
        rounds=config.rounds,
        batch=config.batch,
        budget=config.nodes,
        seed=config.seed,
    )
    entrants = {PLAIN: SilentConfig(), **{str(i): one for i, one in enumerate(finalists)}}
    contestants = [Ours(name, target, one.build(target, load), race) for name, one in entrants.items()]
    plain, *others = compete(contestants, prompts[: 4 * config.batch], race)
    return [other.decoding_speed_over(plain).median for other in others]
