"""Arrays to learn from: laws of points against their own densities, tables, digits, and a run from recipe to flow."""

import gzip
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fewstep.core.random import CounterRng
from fewstep.core.recipe import Recipe, parse
from fewstep.models.flow import Flow
from fewstep.recipes import SECTIONS
from fewstep.recipes.run import train
from fewstep.training.data import ARRAYS
from fewstep.training.data.arrays import CSVConfig, DigitsConfig, Table
from fewstep.training.data.points import DENSITIES, PointsConfig


def drawn(name: str, count: int, seed: int) -> Tensor:
    return DENSITIES[name].sample(CounterRng.seeded(range(seed, seed + count)))


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_integrates_to_one_and_gives_its_entropy(name: str) -> None:
    density, cells = DENSITIES[name], 160
    side = 2 * density.reach / cells
    middles = torch.arange(cells, dtype=torch.float64).add(0.5).mul(side) - density.reach
    log_p = density.log_density(torch.cartesian_prod(middles, middles))
    assert float(log_p.exp().sum()) * side**2 == pytest.approx(1, abs=2e-4)
    assert density.entropy(cells) == pytest.approx(-float(torch.special.xlogy(log_p.exp(), log_p.exp()).sum()) * side**2)


@pytest.mark.parametrize("name", DENSITIES)
def test_samples_have_the_law(name: str, seed: int) -> None:
    """A chi-square test over the squares of a board that are likely enough, the others together."""
    density, count, cells, parts = DENSITIES[name], 3000, 12, 16
    x, reach = drawn(name, count, seed), density.reach
    fine = torch.arange(cells * parts, dtype=torch.float64).add(0.5).mul(2 * reach / (cells * parts)) - reach
    p = density.log_density(torch.cartesian_prod(fine, fine)).exp() * (2 * reach / (cells * parts)) ** 2
    expected = count * p.view(cells, parts, cells, parts).sum((1, 3)).flatten()
    index = ((x + reach) / (2 * reach) * cells).floor().clamp(0, cells - 1).long()
    found = torch.bincount(index[:, 0] * cells + index[:, 1], minlength=cells**2).double()
    likely = expected >= 5
    expected, found = (torch.cat([n[likely], n[~likely].sum()[None]]) for n in (expected, found))
    expected = expected.clamp(min=1e-9)
    statistic, freedom = float(((found - expected).square() / expected)[expected > 1e-6].sum()), len(expected) - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 20  # below one false alarm in a million
    assert found[expected <= 1e-6].sum() == 0


@pytest.mark.parametrize("name", DENSITIES)
def test_samples_are_worth_the_entropy(name: str, seed: int) -> None:
    density = DENSITIES[name]
    log_p = density.log_density(drawn(name, 2000, seed))
    assert abs(float(log_p.mean()) + density.entropy(160)) < 5.5 * float(log_p.std()) / math.sqrt(2000) + 1e-3


def test_batches_of_points_are_a_function_of_seed_and_step() -> None:
    points = PointsConfig(density="moons", held_out=10).build()
    one, two = points.train(4, 1), points.train(4, 1)
    two.batch(5)
    assert torch.equal(one.batch(2).extra["x"], two.batch(2).extra["x"])
    assert torch.equal(points.train(8, 1).batch(1).extra["x"][:4], one.batch(2).extra["x"])  # by the sample's number alone
    assert not torch.equal(one.batch(2).extra["x"], points.train(4, 2).batch(2).extra["x"])
    assert one.batch(2).tokens.tolist() == [[8], [9], [10], [11]]
    held_out = [batch.extra["x"] for batch in points.validation(4)]
    assert [len(x) for x in held_out] == [4, 4, 2] and torch.equal(held_out[0], next(points.validation(4)).extra["x"])


def table(path: Path, text: str, **fields: Any) -> Table:
    path.write_text(text, encoding="utf-8")
    return parse(CSVConfig, {"path": path, **fields}, "data").build()


LINES = "\n".join(f"{i},{i * i},{i % 3}" for i in range(40))


def test_a_table_becomes_rows_and_conditions(tmp_path: Path) -> None:
    found = table(tmp_path / "a.csv", f"age,area,kind\n{LINES}\n\n", given=("kind",), held_out=0.3)
    assert (found.shape, found.context) == ((2,), 1)
    batches = [found.train(5, 0).batch(step) for step in range(3)] + list(found.validation(7))
    for batch in batches:
        number = batch.extra["x"][:, 0]
        assert torch.equal(batch.extra["x"][:, 1], number.square()) and torch.equal(batch.extra["c"][:, 0], number % 3)
    held_out = {int(row) for batch in found.validation(7) for row in batch.extra["x"][:, 0]}
    epochs = found.train(5, 0)
    seen = [int(row) for step in range(2 * ((40 - len(held_out)) // 5)) for row in epochs.batch(step).extra["x"][:, 0]]
    assert held_out and not held_out & set(seen)
    half = len(seen) // 2
    assert len(set(seen[:half])) == half and seen[:half] != seen[half:]


def test_equal_rows_share_a_part(tmp_path: Path) -> None:
    found = table(tmp_path / "a.csv", f"{LINES}\n{LINES}\n{LINES}", held_out=0.4)
    rows = [tuple(row.tolist()) for batch in found.validation(100) for row in batch.extra["x"]]
    assert all(rows.count(row) == 3 for row in rows)


def test_a_packed_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(LINES.encode()))
    assert CSVConfig(path=tmp_path / "a.csv.gz").build().shape == (3,)


@pytest.mark.parametrize(
    ("text", "fields", "told"),
    [
        ("a,b\n1,2\n3,x\n", {}, r"row 3, column 'b' holds 'x', which is no finite number; "),
        ("1,2\n3,\n", {}, r"row 2, column '2' holds '', which is no finite number; "),
        ("1,2\nnan,3\n", {}, r"row 2, column '1' holds 'nan', which is no finite number; "),
        ("a,b\n1,2\n3\n", {}, r"row 3 has 1 cells, expected 2; "),
        ("a,b\n", {}, r"no row of numbers; "),
        ("a,b\n1,2\n1,3\n", {}, r"column 'a' is constant and has no density; "),
        ("a,b\n1,2\n3,4\n", {"given": ("c",)}, r"^data\.given='c': no such column"),
        ("a,b\n1,2\n3,4\n", {"given": ("a", "b")}, r"every column is given; "),
        ("1,2\n3,4\n", {"held_out": 1e-9}, r"^data\.held_out=1e-09: 0 of 2 rows; "),
        ("\x00\n", {}, r"; "),
    ],
)
def test_a_bad_table_is_refused(text: str, fields: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told) as refusal:
        table(tmp_path / "a.csv", text, **fields)
    assert str(refusal.value).startswith("data.") and "\n" not in str(refusal.value)


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.path='[^\n]*': no such file; "):
        CSVConfig(path=tmp_path / "a.csv").build()
    (tmp_path / "a.csv.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"not a readable CSV file \([^\n]*\); "):
        CSVConfig(path=tmp_path / "a.csv.gz").build()
    with pytest.raises(ValueError, match=r"^run\.batch=400: more than [^\n]*; "):
        table(tmp_path / "b.csv", LINES).train(400, 0)


def test_digits_are_read_from_the_package_or_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sklearn" / "datasets" / "data"
    monkeypatch.setattr("fewstep.training.data.arrays.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^data='digits': [^\n]* not installed; "):
        DigitsConfig().build()
    folder.mkdir(parents=True)
    lines = "\n".join(",".join(str((i + j) % 17) for j in range(64)) + f",{i % 10}" for i in range(60))
    (folder / "digits.csv.gz").write_bytes(gzip.compress(lines.encode()))
    found: Any = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "sklearn")]})
    monkeypatch.setattr("fewstep.training.data.arrays.find_spec", lambda name: found)
    digits = DigitsConfig(classes=True).build()
    batch = digits.train(6, 0).batch(0)
    assert (digits.shape, digits.context) == ((1, 8, 8), 10)
    assert torch.equal(batch.extra["c"].argmax(1), batch.tokens[:, 0] % 10) and bool((batch.extra["c"].sum(1) == 1).all())
    assert torch.equal(batch.extra["x"][:, 0, 0, 0], (batch.tokens[:, 0] % 17).float())


def recipe(**sections: Any) -> Recipe:
    values = {
        "model": {"kind": "flow", "bijections": ["nsf"]},
        "data": {"kind": "points", "density": "moons", "held_out": 256},
        "objective": {"kind": "likelihood"},
        "budget": {"steps": 30},
        "run": {"batch": 64, "validate_every": 15, "log_every": 5, "checkpoint_steps": 10},
    }
    return Recipe.from_values("moons", {**values, **sections}, registries=SECTIONS)


def test_a_recipe_becomes_a_flow(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    trained = train(recipe(), directory=tmp_path / "whole", console=console)
    assert isinstance(trained.model, Flow) and trained.summary.used.tokens == 30 * 64
    untrained = 0.5 * 2 * math.log(2 * math.pi * math.e)
    assert trained.summary.validation["nats"] < untrained
    x = trained.model.sample(CounterRng.seeded(range(5)))
    assert x.shape == (5, 2)
    constant = {"kind": "wsd", "warmup": 0, "share": 1e-9}
    halved, whole = recipe(budget={"steps": 15}, schedule=constant), recipe(schedule=constant)
    train(halved, directory=tmp_path / "resumed", console=console)
    again = train(whole, directory=tmp_path / "resumed", resume=True, console=console)
    straight = train(whole, directory=tmp_path / "straight", console=console)
    for name, weight in straight.model.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(again.model.state_dict()[name], weight), name  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"model": {"kind": "decoder"}}, r"^model\.kind='decoder': does not learn data\.kind='points'; "),
        ({"data": {"kind": "text"}}, r"^model\.kind='flow': does not learn data\.kind='text'; "),
        ({"objective": {"kind": "next_token"}}, r"^objective\.kind='next_token': does not teach a flow; "),
        ({"model": {"kind": "flow", "shape": [3]}}, r"^model\.shape=\(3,\): the data have \(2,\); "),
        ({"model": {"kind": "flow", "context": 1}}, r"^model\.context=1: the data have 0; "),
    ],
)
def test_sections_that_do_not_fit_are_refused(sections: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told) as refusal:
        train(recipe(**sections), directory=tmp_path, console=Console(file=io.StringIO()))
    assert "\n" not in str(refusal.value)


def test_the_registry_names_every_kind_of_array() -> None:
    assert list(ARRAYS) == ["points", "digits", "csv", "images", "glyphs", "shapes", "coupling"]
