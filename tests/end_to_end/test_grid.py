"""A grid of races: every cell under its own conditions, and a killed grid goes on with the cells it has."""

import json
from pathlib import Path

import pytest
from raced import files, prompts, small_model
from rich.console import Console

from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.models.model import Model
from fewstep.report.contest import PLAIN, RaceConfig
from fewstep.report.grid import PAGE, Grid, GridConfig, digest, run_grid

DRAFTERS: dict[str, DrafterConfig] = {PLAIN: SilentConfig(), "ngram": NgramConfig(min_ngram=1), "mtp chain": MultiTokenConfig()}
PLAN = GridConfig(batches=(1, 2), race=RaceConfig(max_new_tokens=8, rounds=2, peers=False))


@pytest.fixture
def console(tmp_path: Path) -> Console:
    return Console(file=(tmp_path / "terminal.txt").open("w", encoding="utf-8"), width=160)


def ids(model: Model, count: int = 3) -> list[list[int]]:
    assert model.tokenizer is not None
    return [model.tokenizer.encode(prompt.prompt) for prompt in prompts(count)]


def run(model: Model, directory: Path, console: Console, plan: GridConfig = PLAN, count: int = 3) -> Grid:
    return run_grid(model, DRAFTERS, ids(model, count), plan, directory, console)


def test_every_cell_is_a_race_of_its_own(tmp_path: Path, console: Console) -> None:
    grid = run(small_model(), tmp_path / "grid", console)
    assert list(grid.cells) == [(0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2)]
    for (temperature, _), cell in grid.cells.items():
        assert list(cell) == list(DRAFTERS)
        for name, row in cell.items():
            assert row["tokens"] == 3 * 8 and len(row["seconds"]) == 2
            assert row["identical"] == (None if temperature else 3), name
        assert cell[PLAIN]["tokens_per_call"] == 1 and cell[PLAIN]["speed_over_plain"]["median"] == 1
    assert grid.cells[0.0, 1]["ngram"]["calls"] == grid.cells[0.0, 2]["ngram"]["calls"], "a row's calls are its own"
    grid.show(console)
    console.file.flush()
    told, page = ((tmp_path / name).read_text(encoding="utf-8") for name in ("terminal.txt", f"grid/{PAGE}"))
    for text in (told, page):
        assert text.count("mtp chain") >= 2 and "temperature 1" in text.lower() and "batch 2" in text
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {2 + 1 + 2 * 3}


def test_a_killed_grid_goes_on(tmp_path: Path, console: Console) -> None:
    model = small_model()
    run(model, tmp_path, console)
    first, second, third, fourth = (tmp_path / f"{law}-batch-{b}.json" for law in ("greedy", "temperature-1") for b in (1, 2))
    record = json.loads(first.read_text(encoding="utf-8"))
    record["contestants"]["ngram"]["calls"] = -1
    first.write_text(json.dumps(record), encoding="utf-8")
    second.unlink()
    third.write_text(third.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    before = fourth.stat().st_mtime_ns
    grid = run(model, tmp_path, console)
    assert grid.cells[0.0, 1]["ngram"]["calls"] == -1, "kept"
    assert fourth.stat().st_mtime_ns == before, "kept"
    assert json.loads(second.read_text(encoding="utf-8"))["contestants"] == grid.cells[0.0, 2], "measured again"
    assert grid.cells[1.0, 1]["ngram"]["calls"] > 0, "half a file is none"


def test_what_was_measured_under_other_circumstances_is_measured_again(tmp_path: Path, console: Console) -> None:
    model, other = small_model(), small_model()
    plan = GridConfig(temperatures=(0.0,), batches=(3,), race=PLAN.race.model_copy(update={"rounds": 1}))
    longer = plan.model_copy(update={"race": plan.race.model_copy(update={"max_new_tokens": 9})})
    path = tmp_path / "greedy-batch-3.json"
    for asked in ((model, plan, 3), (model, longer, 3), (model, longer, 2), (other, longer, 2)):
        found = run(asked[0], tmp_path, console, asked[1], asked[2]).cells[0.0, 3]
        assert found["ngram"]["calls"] > 0, "not what was marked under other circumstances"
        record = json.loads(path.read_text(encoding="utf-8"))
        record["contestants"]["ngram"]["calls"] = -1
        path.write_text(json.dumps(record), encoding="utf-8")


def test_a_fingerprint_is_of_the_files(tmp_path: Path) -> None:
    folder = files(tmp_path / "corpus", count=2)
    assert digest(str(folder)) == digest(str(tmp_path / "corpus"))
    (folder / "order.bin").write_bytes(b"abc")
    before = digest(str(folder))
    (folder / "order.bin").write_bytes(b"abd")
    assert digest(str(folder)) != before
    with pytest.raises(ValueError, match="no such directory"):
        run_grid(
            model := small_model(),
            {PLAIN: SilentConfig(), "retrieval": RetrievalConfig(path=str(tmp_path / "none"))},
            ids(model),
            PLAN,
            tmp_path,
            Console(quiet=True),
        )


def test_verified_otherwise_a_drafter_is_a_contestant_of_its_own(tmp_path: Path, console: Console) -> None:
    race = RaceConfig(max_new_tokens=8, rounds=1, verification="typical")
    plan = GridConfig(temperatures=(0.7,), batches=(3,), race=race)
    (cell,) = run(small_model(), tmp_path, console, plan).cells.values()
    assert list(cell) == [*DRAFTERS, "ngram, typical (lossy)", "mtp chain, typical (lossy)"]
