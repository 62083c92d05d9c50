"""A grid of races: drafters at several temperatures and batch sizes, a file per race, so that a killed grid goes on where it was.

This file knows how races are laid out and written down. How one is run is in `contest`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated, Any, final

from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fewstep.core.recipe import Config
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.hub.load import locate
from fewstep.models.model import Model
from fewstep.report.contest import PLAIN, RaceConfig, compete
from fewstep.report.race import bar, runners
from fewstep.report.tuned import circumstances
from fewstep.training.data.shards import write_atomically

PAGE = "table.md"
_END = 1 << 20  # bytes of a file that stand for it: weights that were trained differently differ anywhere

Numbers = Mapping[str, Any]  # as `Record.numbers` gives them


@final
class GridConfig(Config):
    """A race at each of `temperatures` (0 is greedy) for each of `batches` prompts at a time; all else is as in `race`."""

    temperatures: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(default=(0.0, 1.0), min_length=1)
    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 4, 16), min_length=1)
    race: RaceConfig = RaceConfig()

    def races(self) -> Iterator[RaceConfig]:
        """The races, the batches of the first temperature first."""
        for temperature in self.temperatures:
            for batch in self.batches:
                yield self.race.model_copy(update={"temperature": temperature, "batch": batch})


@final
@dataclass(frozen=True, slots=True)
class Grid:
    """What was found: `cells[temperature, batch][name]`, plain decoding first."""

    cells: Mapping[tuple[float, int], Mapping[str, Numbers]]

    def as_dict(self) -> dict[str, Any]:
        """Every number in JSON values, by the names of the cells' files."""
        return {_stem(*key): {name: dict(row) for name, row in cell.items()} for key, cell in self.cells.items()}

    def show(self, console: Console) -> None:
        """A table per temperature."""
        for temperature, batches in self._sheets():
            table = Table(title=_law(temperature), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
            table.add_column("")
            for batch in batches:
                for column in (f"batch {batch}\ntokens/call", "\ntokens/s", "\nover plain"):
                    table.add_column(column, justify="right", no_wrap=True)
            for name, *row in self._rows(temperature, batches):
                table.add_row(name, *row)
            console.print(table)

    def markdown(self) -> str:
        """The same tables for a page."""
        lines: list[str] = []
        for temperature, batches in self._sheets():
            columns = [column for batch in batches for column in (f"tokens/call, batch {batch}", "tokens/s", "over plain")]
            lines += [
                f"**{_law(temperature).capitalize()}**",
                "",
                f"| | {' | '.join(columns)} |",
                f"|---{'|---:' * len(columns)}|",
            ]
            lines += [f"| {' | '.join(row)} |" for row in self._rows(temperature, batches)]
            lines += [""]
        return "\n".join(lines)

    def _sheets(self) -> list[tuple[float, list[int]]]:
        temperatures = dict.fromkeys(temperature for temperature, _ in self.cells)
        return [(one, [batch for temperature, batch in self.cells if temperature == one]) for one in temperatures]

    def _rows(self, temperature: float, batches: Sequence[int]) -> Iterator[list[str]]:
        for name in self.cells[temperature, batches[0]]:
            row = [name]
            for batch in batches:
                found = self.cells[temperature, batch][name]
                speed, ratio = found["tokens_per_second"]["median"], found["speed_over_plain"]["median"]
                row += [f"{found['tokens_per_call']:.2f}", f"{speed:.0f}", f"{ratio:.2f}"]
            yield row


def run_grid(
    model: Model,
    drafters: Mapping[str, DrafterConfig],
    prompts: Sequence[Sequence[int]],
    config: GridConfig,
    directory: Path,
    console: Console,
) -> Grid:
    """Race `drafters`, by the names to print and plain decoding first, over the token ids `prompts` in every cell of the grid.

    A cell whose file is in `directory` and was measured under the same circumstances (model, networks that draft, prompts,
    machine, settings) is not measured again; remove its file to do so. The tables are written there as a page, too.
    Raises ValueError for a drafter that does not fit the model.
    """
    facts = {
        "drafters": {name: drafter.model_dump(mode="json") for name, drafter in drafters.items()},
        "networks": {name: digest(path) for name, drafter in drafters.items() if (path := drafter.model_dump().get("path"))},
        "prompts": hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()[:16],
    }
    cells: dict[tuple[float, int], Mapping[str, Numbers]] = {}
    for race in config.races():
        path = directory / f"{_stem(race.temperature, race.batch)}.json"
        own = circumstances(model, race.batch, race.temperature > 0)
        setting = json.loads(json.dumps({**own, **facts, "race": race.model_dump(mode="json")}))
        found = _kept(path, setting)
        if found is None:
            found = _measured(model, drafters, prompts, race, console)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"setting": setting, "contestants": found}, indent=1).encode())
        cells[race.temperature, race.batch] = found
        console.print(f"{_law(race.temperature)}, batch {race.batch}: {_best(found)}; {path}", highlight=False, soft_wrap=True)
    grid = Grid(cells)
    write_atomically(directory / PAGE, grid.markdown().encode())
    return grid


def digest(path: str) -> str:
    """A fingerprint of the network or corpus that a drafter has at `path`: of the names, sizes and ends of its files."""
    content, folder = hashlib.sha256(), locate(path)
    for file in sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".json", ".bin")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            stream.seek(max(0, size - _END))
            content.update(f"{file.relative_to(folder)}:{size}:".encode() + stream.read())
    return content.hexdigest()[:16]


def _measured(
    model: Model,
    drafters: Mapping[str, DrafterConfig],
    prompts: Sequence[Sequence[int]],
    race: RaceConfig,
    console: Console,
) -> dict[str, Numbers]:
    contestants = runners(model, drafters, race)
    total = len(contestants) * (1 + race.rounds * ceil(len(prompts) / race.batch))
    with bar(console, total) as advance:
        records = compete(contestants, prompts, race, advance)
    return {record.name: record.numbers(records[0], race.temperature == 0) for record in records}


def _kept(path: Path, setting: Numbers) -> dict[str, Numbers] | None:
    """The contestants in the file, if it was written whole and under the same circumstances."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["contestants"] if record["setting"] == setting else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _best(cell: Mapping[str, Numbers]) -> str:
    drafted = [row for name, row in cell.items() if name != PLAIN]
    if not drafted:
        return "plain decoding alone"
    most = max(drafted, key=lambda row: row["tokens_per_call"])
    fastest = max(drafted, key=lambda row: row["speed_over_plain"]["median"])
    speed = f"{fastest['speed_over_plain']['median']:.2f}x plain ({fastest['name']})"
    return f"{most['tokens_per_call']:.2f} tokens per call ({most['name']}), {speed}"


def _law(temperature: float) -> str:
    return f"temperature {temperature:g}" if temperature else "greedy"


def _stem(temperature: float, batch: int) -> str:
    return f"{_law(temperature).replace(' ', '-')}-batch-{batch}"
