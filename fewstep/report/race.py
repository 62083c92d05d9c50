"""The decoding race: quality against calls, and tokens per second, for every drafter and peer on the same weights.

This file knows models, drafters' names and what to write down. How a race is run is in `contest`, what calls cost in `costs`.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.verification import TokenVerificationConfig
from fewstep.hub.heads import companion
from fewstep.hub.load import load
from fewstep.models.model import Model
from fewstep.report.contest import PLAIN, Contestant, Ours, RaceConfig, Record, compete, entrants
from fewstep.report.costs import DraftCost, Machine, cpu_name, draft_cost, machine_costs
from fewstep.report.page import write_page
from fewstep.report.peers import LIBRARY, transformers_peers
from fewstep.report.prompts import Prompt, prompts_for, read_prompts

PAGE = "race.html"
_PROFILED = 2  # prompts on which proposals are timed


@final
@dataclass(frozen=True, slots=True)
class Quality:
    """The mean log2-probability per token of the emitted text under the target, and its standard error over prompts."""

    mean: float
    error: float


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """A contestant in the result: its record, the quality of its text and, for drafters, what a proposal costs."""

    record: Record
    quality: Quality
    draft: DraftCost | None


@final
@dataclass(frozen=True, slots=True)
class Race:
    """A finished race. `setting`: what was equal for everybody, in plain values; the first entry is plain decoding."""

    setting: Mapping[str, Any]
    entries: tuple[Entry, ...]
    machine: Machine
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Every number in JSON values, for `race.json`, the table and the page."""
        machine = asdict(self.machine) | {
            "call_seconds": {str(count): seconds for count, seconds in self.machine.call_seconds.items()},
            "verification": {str(count): ratio for count, ratio in self.machine.verification.items()},
            "bound_seconds": self.machine.bound_seconds,
            "cached_bound_seconds": self.machine.cached_bound_seconds,
        }
        entries = [_row(entry, self.entries[0].record, self.setting["temperature"] == 0) for entry in self.entries]
        return {"setting": dict(self.setting), "entries": entries, "machine": machine, "notes": list(self.notes)}

    def table(self) -> Table:
        """The result for a terminal."""
        return _table(self.as_dict())


def race_decode_model(
    model: Model,
    config: RaceConfig,
    directory: Path,
    prompts: Path | None = None,
    *,
    source: str = "",
    console: Console | None = None,
) -> Race:
    """`race_decode` as a command: prompts from a file or, without one, those of the model, and the result printed.

    `source`: what the model was loaded from (default: the name in its recipe). Raises ValueError as `race_decode` does, and when
    there are no prompts.
    """
    console = console or Console()
    source = source or str(model.recipe.get("name", "model"))
    held_out = read_prompts(prompts) if prompts else prompts_for(source, model, config.count, config.seed)
    race = race_decode(model, held_out, config, directory, name=Path(source).name, console=console)
    console.print(race.table())
    console.print(f"{(directory / PAGE).resolve()}", soft_wrap=True)
    return race


def race_decode(
    model: Model,
    prompts: Sequence[Prompt],
    config: RaceConfig = RaceConfig(),
    directory: Path | str | None = None,
    *,
    name: str = "model",
    console: Console | None = None,
) -> Race:
    """Race the drafters, and the peers where installed, over `prompts`; plain decoding always takes part.

    With a `directory`, `race.json` and the page are written there. `name` is the model's in both. Raises ValueError for a drafter
    that does not fit the model, or prompts beyond its context.
    """
    if model.tokenizer is None:
        raise ValueError(f"model={name!r}: has no tokenizer to read prompts with; load it with its tokenizer.json")
    chosen = entrants(model.network, config.drafters)
    ids = [model.tokenizer.encode(prompt.prompt) for prompt in prompts[: config.count]]
    with tempfile.TemporaryDirectory() as exports:
        ours = runners(model, chosen, config)
        draft = next((drafter.path for drafter in chosen.values() if isinstance(drafter, DraftModelConfig)), None)
        peers, notes = _peers(model, draft, config, Path(exports))
        contestants: list[Contestant] = [*ours, *peers]
        total = len(contestants) * (1 + config.rounds * math.ceil(len(ids) / config.batch))
        with bar(console or Console(), total) as advance:
            records = compete(contestants, ids, config, advance)
    machine = machine_costs(model.network, ids[0])
    costs = _draft_costs(model, ours, ids, config, machine)
    entries = tuple(Entry(record, quality(model, ids, record.lap.tokens), costs.get(record.name)) for record in records)
    race = Race(_setting(model, name, config, len(ids), chosen), entries, machine, (*notes, *_remarks(model, records)))
    if directory is not None:
        write_race(race, Path(directory))
    return race


def runners(model: Model, chosen: Mapping[str, DrafterConfig], config: RaceConfig) -> list[Ours]:
    """The drafters `chosen`, by the names to print, built for `model`; then each but plain decoding under `config.verification`.

    Raises ValueError for a drafter that does not fit the model.
    """
    ours = [Ours(name, model.network, drafter.build(model.network, companion(model)), config) for name, drafter in chosen.items()]
    if not isinstance(config.verification, TokenVerificationConfig):
        ours += [entrant.judged(config.judged) for entrant in ours if entrant.name != PLAIN]
    return ours


def write_race(race: Race, directory: Path) -> Path:
    """Write `race.json` and the page `race.html` into `directory` (made if missing); the path of the page."""
    directory.mkdir(parents=True, exist_ok=True)
    record = race.as_dict()
    (directory / "race.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return write_page(record, directory / PAGE)


def quality(model: Model, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> Quality:
    """How likely the target finds the continuations `outputs` of `prompts`. Cost: one call per prompt."""
    means = []
    for prompt, output in zip(prompts, outputs, strict=True):
        text = torch.tensor([[*prompt, *output]], device=model.device)
        law = model.logits(text[:, :-1])[0, len(prompt) - 1 :].float().log_softmax(-1)
        means.append(float(law.gather(1, text[0, len(prompt) :, None]).mean()) / math.log(2))
    values = torch.tensor(means, dtype=torch.float64)
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
    return Quality(float(values.mean()), error)


@contextmanager
def bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over `total` advances, each with the name of who ran; silent where the console is no terminal."""
    columns = (TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console.is_terminal
    # drawn between laps only: a thread that draws during one would be measured with it
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not shown) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, advance=1, description=name, refresh=True)


def _like(model: Model, path: str) -> Model:
    return load(path, device=str(model.device), dtype=model.dtype)


def _peers(model: Model, draft: str | None, config: RaceConfig, exports: Path) -> tuple[list[Contestant], list[str]]:
    if not config.peers:
        return [], []
    try:
        return transformers_peers(model, _like(model, draft) if draft else None, config, exports), []
    except ValueError as error:
        return [], [str(error)]


def _remarks(model: Model, records: Sequence[Record]) -> Iterator[str]:
    ours = [record for record in records if record.library == Ours.library]
    if any(record.identical_to(ours[0]) < len(record.lap.tokens) for record in ours) and model.dtype != torch.float32:
        yield (
            f"In {str(model.dtype).removeprefix('torch.')} a call on several tokens may round otherwise than a call on one, "
            "so near ties may fall the other way; in float32 the texts are identical."
        )


def _draft_costs(
    model: Model, ours: Sequence[Ours], ids: Sequence[Sequence[int]], config: RaceConfig, machine: Machine
) -> dict[str, DraftCost]:
    call = machine.call_seconds[1]
    return {
        entrant.name: draft_cost(model.network, entrant.drafter, ids[:_PROFILED], call, config.sampling)
        for entrant in ours
        if entrant.name != PLAIN
    }


def _setting(model: Model, name: str, config: RaceConfig, prompts: int, chosen: Mapping[str, DrafterConfig]) -> dict[str, Any]:
    try:
        peer = version(LIBRARY)
    except PackageNotFoundError:
        peer = None
    return {
        **config.model_dump(mode="json"),
        "model": name,
        "parameters": model.size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "count": prompts,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        LIBRARY: peer,
        "lossy": not config.judged.lossless,
        "drafters": {key: config.model_dump(mode="json") for key, config in chosen.items()},
    }


def _row(entry: Entry, plain: Record, greedy: bool) -> dict[str, Any]:
    return {
        **entry.record.numbers(plain, greedy),
        "quality": asdict(entry.quality),
        "draft": asdict(entry.draft) if entry.draft else None,
    }


def _table(race: Mapping[str, Any]) -> Table:
    setting, machine = race["setting"], race["machine"]
    law = f"temperature {setting['temperature']:g}" if setting["temperature"] else "greedy"
    title = f"{setting['model']}: {setting['count']} prompts x {setting['max_new_tokens']} tokens, {law}, {setting['dtype']}"
    bound = f"a call reads {machine['weight_bytes'] / 1e6:.1f} MB: at least {1e3 * machine['bound_seconds']:.2f} ms from memory"
    caption = f"{bound} at {machine['bandwidth'] / 1e9:.1f} GB/s; measured {1e3 * machine['call_seconds']['1']:.2f} ms per call"
    judged = "identical" if not setting["temperature"] else "log2 p/token"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("", min_width=14)
    for column in ("tokens/call", "tokens/s", "over plain", judged, "draft"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in race["entries"]:
        speed, ratio, draft = row["tokens_per_second"], row["speed_over_plain"], row["draft"]
        same = row["identical"]
        table.add_row(
            row["name"] if row["library"] == "fewstep" else f"{row['library']} {row['name']}",
            f"{row['tokens_per_call']:.2f}",
            f"{speed['median']:.0f}",
            f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
            f"{row['quality']['mean']:.3f}" if same is None else f"{same}/{setting['count']}",
            "-" if draft is None else f"{draft['time_ratio']:.2f}",
        )
    return table
