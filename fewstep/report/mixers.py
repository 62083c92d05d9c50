"""The race of the sequence mixers: what they cost against the length of a sequence, and what they recall.

This file knows the registry and what is written down. How costs are measured is in `mixer_costs`, what is asked in
`mixer_quality`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, final

import torch
from pydantic import Field, field_validator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from fewstep.core.recipe import Config, lookup
from fewstep.nn.mixers import MIXERS
from fewstep.report.costs import cpu_name
from fewstep.report.mixer_costs import (
    BOTH_WAYS,
    SOFTMAX,
    WORKS,
    Cell,
    Layer,
    Mixing,
    Softmax,
    Work,
    alternate,
    expected,
    prepared,
    repeats,
)
from fewstep.report.mixer_quality import TASKS, Answer, asked
from fewstep.report.mixers_page import write_page
from fewstep.training.data.shards import write_atomically

RECORD, PAGE = "race.json", "race.html"
_SHORTEST = 128
_FREE = ("mixers", "length", "limit", "quality", "steps")  # parts of a setting that leave a measured cell what it is
_WEIGHTS: Mapping[Work, float] = MappingProxyType({"forward": 1.0, "training": 3.0, "prefill": 1.5, "decode": 0.5})

Tell = Callable[[float, str], None]  # what a turn that is over weighs, and whose it was


@final
class MixerRaceConfig(Config):
    """What a race of mixers holds equal for everybody.

    `mixers`: names of the registry; (): all. `length`: the longest sequence; lengths double from 128 up to it. A layer has
    `width` channels in `heads`. Everybody has a turn in each of `rounds`. `limit`: seconds that one mixer may take for one work
    at one length; what would take longer is left out. `quality`: decoders are trained on the tasks, too, for `steps`.
    """

    mixers: tuple[str, ...] = ()
    length: int = 4096
    width: int = Field(default=256, ge=1)
    heads: int = Field(default=4, ge=1)
    rounds: int = Field(default=3, ge=1)
    limit: float = Field(default=20.0, gt=0)
    quality: bool = True
    steps: int = Field(default=200, ge=1)
    seed: int = 0

    @field_validator("length")
    @classmethod
    def _doubles(cls, length: int) -> int:
        if length < _SHORTEST or length % _SHORTEST or (length // _SHORTEST).bit_count() != 1:
            raise ValueError(f"length={length}: must be {_SHORTEST} doubled some times; give 1024, 2048 or 4096")
        return length

    @field_validator("mixers")
    @classmethod
    def _are_known(cls, mixers: tuple[str, ...]) -> tuple[str, ...]:
        for name in mixers:
            lookup(MIXERS, name, "mixers")
        return tuple(dict.fromkeys(mixers))

    @property
    def lengths(self) -> list[int]:
        return [_SHORTEST << i for i in range((self.length // _SHORTEST).bit_length())]

    @property
    def chosen(self) -> dict[str, Config]:
        """The configs that race, by name."""
        return {name: MIXERS[name]() for name in self.mixers or MIXERS}


@final
@dataclass(slots=True)
class MixerRace:
    """A race, finished or under way. `setting`: what was equal for everybody, in plain values; `costs` by mixer, work and length;
    `states`: bytes of a state by mixer and length; `answers` by mixer and task."""

    setting: Mapping[str, Any]
    costs: dict[tuple[str, Work, int], Cell] = field(default_factory=dict)
    states: dict[str, dict[int, int]] = field(default_factory=dict)
    answers: dict[tuple[str, str], Answer] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Every number in JSON values, for `race.json`, the table and the page."""
        names = [SOFTMAX, BOTH_WAYS, *MIXERS]
        states = [
            {"mixer": name, "length": length, "bytes": size, "bytes_per_token": size / length}
            for name in names
            for length, size in self.states.get(name, {}).items()
        ]
        costs = sorted(self.costs.values(), key=lambda cell: (list(WORKS).index(cell.work), cell.length, names.index(cell.mixer)))
        answers = sorted(self.answers.values(), key=lambda answer: (list(TASKS).index(answer.task), names.index(answer.mixer)))
        return {
            "setting": dict(self.setting),
            "costs": [cell.numbers() for cell in costs],
            "states": states,
            "quality": [answer.numbers() for answer in answers],
        }

    @property
    def names(self) -> list[str]:
        """Who took part."""
        return [name for name in (SOFTMAX, BOTH_WAYS, *MIXERS) if name in self.states]

    def table(self) -> Table:
        """The result for a terminal."""
        return _table(self)

    def seconds(self, name: str, work: Work) -> dict[int, float]:
        """Seconds a call by length, where it was measured."""
        cells = (cell for (mixer, kind, _), cell in self.costs.items() if (mixer, kind) == (name, work) and not cell.reason)
        return {cell.length: cell.median for cell in cells}


def race_mixers(
    config: MixerRaceConfig = MixerRaceConfig(), directory: Path | str | None = None, *, console: Console | None = None
) -> MixerRace:
    """Race the mixers of `config`; PyTorch's softmax attention takes part, and everybody's speed is held against it.

    With a `directory`, `race.json` and the page are written there. What was measured there under the same circumstances (sizes,
    seed, rounds, threads, machine, PyTorch) stays and is not measured again, so that a killed race goes on where it was and a
    further mixer joins the others. Raises ValueError for sizes that do not fit a mixer.
    """
    console, folder = console or Console(), None if directory is None else Path(directory)
    layers = _layers(config)
    race = _begun(config, folder)
    for name, layer in layers.items():
        race.states[name] = race.states.get(name, {}) | _state_bytes(layer, config.lengths)
    for line in chain(_costs(race, layers, config, console), _answers(race, config, console)):
        if folder is not None:  # written down one by one: what took minutes to measure is not lost
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / RECORD, json.dumps(race.as_dict(), indent=1).encode())
        console.print(line, highlight=False, soft_wrap=True)
    if folder is not None:
        write_page(race.as_dict(), folder / PAGE)
    return race


def race_mixers_here(config: MixerRaceConfig, directory: Path, console: Console | None = None) -> MixerRace:
    """`race_mixers` as a command: the result printed."""
    console = console or Console()
    race = race_mixers(config, directory, console=console)
    console.print(race.table())
    console.print(f"{(directory / PAGE).resolve()}", soft_wrap=True)
    return race


def _layers(config: MixerRaceConfig) -> dict[str, Layer]:
    """Everybody, softmax attention first; that which looks both ways only beside mixers that cannot do otherwise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        ours: dict[str, Layer] = {}
        for name, mixer in config.chosen.items():
            module = cast(Any, mixer).build(width=config.width, heads=config.heads).eval()
            ours[name] = Mixing(module, list(module.parameters()))
        softmax: dict[str, Layer] = {SOFTMAX: Softmax(config.width, config.heads, causal=True)}
        if not all(layer.causal for layer in ours.values()):
            softmax[BOTH_WAYS] = Softmax(config.width, config.heads, causal=False)
    return softmax | ours


def _begun(config: MixerRaceConfig, folder: Path | None) -> MixerRace:
    """An empty race, or what the folder's record holds of one under the same circumstances."""
    own = {
        **config.model_dump(mode="json"),
        "mixers": _dumps(config.chosen),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
    }
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8")) if folder else {}
        before = record["setting"]
        if any(before[key] != value for key, value in own.items() if key not in _FREE):
            return MixerRace(own)
        mixers = {name: dump for name, dump in _dumps(MIXERS).items() if before["mixers"].get(name) == dump}
        held = {SOFTMAX, BOTH_WAYS, *mixers}
        cells = (Cell.read(numbers) for numbers in record["costs"] if numbers["mixer"] in held)
        answers = (Answer.read(numbers) for numbers in record["quality"] if numbers["mixer"] in held)
        race = MixerRace({**own, "mixers": mixers | own["mixers"]})
        race.costs.update({(cell.mixer, cell.work, cell.length): cell for cell in cells})
        race.answers.update({(answer.mixer, answer.task): answer for answer in answers})
        for numbers in record["states"]:
            if numbers["mixer"] in held:
                race.states.setdefault(numbers["mixer"], {})[int(numbers["length"])] = int(numbers["bytes"])
        return race
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not whole
        return MixerRace(own)


def _dumps(names: Iterable[str]) -> dict[str, Any]:
    return {name: MIXERS[name]().model_dump(mode="json") for name in names}


def _state_bytes(layer: Layer, lengths: Sequence[int]) -> dict[int, int]:
    try:
        return {length: layer.state_bytes(length) for length in lengths}
    except ValueError:  # it has none
        return {}


def _costs(race: MixerRace, layers: Mapping[str, Layer], config: MixerRaceConfig, console: Console) -> Iterator[str]:
    """Measure what is missing, one work at one length at a time; a line after each."""
    weights = {(length, work): _WEIGHTS[work] * max(length, 1024) for length in config.lengths for work in WORKS}
    with _bar(console, sum(weights.values())) as tell:
        for (length, work), weight in weights.items():
            calls = _ready(race, layers, length, work, config)
            if not calls:
                tell(weight, "")
                continue
            share = weight / (len(calls) * config.rounds)
            taken = alternate(calls, config.rounds, repeats(work, length), partial(tell, share))
            for name, seconds in taken.items():
                softmax = taken.get(SOFTMAX if layers[name].causal else BOTH_WAYS, [])
                race.costs[name, work, length] = Cell(name, work, length, tuple(seconds), tuple(softmax))
            yield f"{length} tokens, {work}: {len(calls)} measured"


def _ready(
    race: MixerRace, layers: Mapping[str, Layer], length: int, work: Work, config: MixerRaceConfig
) -> dict[str, Callable[[], object]]:
    """The calls that are to be timed: of the mixers that were not, and of softmax attention beside them. What is left out, too
    slow or refused, is noted."""
    x = torch.randn(1, length, config.width, generator=torch.Generator().manual_seed(config.seed))
    calls: dict[str, Callable[[], object]] = {}
    for name in (*config.chosen, SOFTMAX, BOTH_WAYS):
        known = race.costs.get((name, work, length))
        if name in config.chosen and known and not known.reason:
            continue
        if name not in config.chosen and not any(layers[each].causal == (name == SOFTMAX) for each in calls):
            continue
        reason = _too_long(race, name, work, length, config)
        if not reason:
            try:
                calls[name] = prepared(work, layers[name], x, config.rounds)
            except ValueError as error:
                reason = str(error)
        if reason:
            race.costs[name, work, length] = Cell(name, work, length, reason=reason)
    return calls


def _too_long(race: MixerRace, name: str, work: Work, length: int, config: MixerRaceConfig) -> str:
    """Why this would take too long, as shorter sequences tell; empty if it would not."""
    seconds = config.rounds * repeats(work, length) * expected(race.seconds(name, work), length)
    if work == "decode":
        seconds += expected(race.seconds(name, "prefill"), length)
    return f"would take about {seconds:.0f} s, more than limit={config.limit:g}" if seconds > config.limit else ""


def _answers(race: MixerRace, config: MixerRaceConfig, console: Console) -> Iterator[str]:
    """Ask what was not asked yet; a line after each answer."""
    missing = [
        (name, task)
        for task in TASKS
        for name in config.chosen
        if (known := race.answers.get((name, task))) is None or known.share is None or known.steps != config.steps
    ]
    with _bar(console, len(missing)) as tell:
        for name, task in missing if config.quality else ():
            answer = asked(name, config.chosen[name], task, config.steps, config.seed)
            race.answers[name, task] = answer
            tell(1, name)
            yield f"{task}: {name} {answer.reason if answer.share is None else f'answers {answer.share:.3f}'}"


@contextmanager
def _bar(console: Console, total: float) -> Iterator[Tell]:
    """A progress bar over `total`, with the time left; silent where the console is no terminal."""
    columns = (TextColumn("{task.description:>24}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    shown = console.is_terminal
    # drawn between turns only: a thread that draws during one would be measured with it
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not shown) as progress:
        task = progress.add_task("", total=total)
        yield lambda weight, name: progress.update(task, advance=weight, description=name, refresh=True)


def _table(race: MixerRace) -> Table:
    """Milliseconds a call at the greatest length, with the speed over softmax attention, the state, and the answers."""
    setting, length = race.setting, max(length for _, _, length in race.costs)
    size = f"{length} tokens, width {setting['width']}, {setting['heads']} heads"
    title = f"{size}: milliseconds (speed over PyTorch's softmax attention)"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", no_wrap=True)
    for column in (*WORKS, "state", *TASKS):
        table.add_column(column, justify="right", min_width=6, overflow="fold")
    for name in race.names:
        state = race.states.get(name, {}).get(length)
        row = [_told(race.costs.get((name, work, length))) for work in WORKS]
        row.append(f"{_short(state / 1e3)} kB" if state else "-")
        for task in TASKS:
            answer = race.answers.get((name, task))
            row.append("-" if answer is None or answer.share is None else f"{answer.share:.2f}")
        table.add_row(name, *row)
    return table


def _told(cell: Cell | None) -> str:
    if cell is None or cell.reason:
        return "-"
    speed = cell.speed_over_softmax
    return _short(1e3 * cell.median) + (f" ({speed.median:.2f})" if speed else "")


def _short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"
