"""The claims about flow matching and reflow: what their measures are, and the whole of each at a size that takes a moment."""

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.decode.arrays import SampleConfig, sample
from fewstep.models.denoiser import DenoiserConfig
from fewstep.recipes.run import Trained, train
from fewstep.report.claims import CLAIMS, flow_matching, reflow
from fewstep.report.claims.claim import Effort
from fewstep.report.images_cells import Setup, reference
from fewstep.report.images_methods import GROUNDS, Pace, recipe_of


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for field, value in {"_STEPS": 2, "_BATCH": 16, "_PAIRS": 24, "_MOST": 64, "_PATHS": 8, "_FINE": 4}.items():
        monkeypatch.setattr(reflow, field, value)
    for field, value in {"_SHARE": 1.0, "_ROWS": 2, "_MOST": 64}.items():
        monkeypatch.setattr(flow_matching, field, value)
    monkeypatch.setattr("fewstep.report.images_cells._POINT_STEPS", 6)
    backbone = {"kind": "points", "width": 8, "depth": 1}
    brief = {name: replace(GROUNDS[name], denoiser=Pace(2, 16, 1e-3, 1.0), backbone=backbone) for name in flow_matching._LAWS}
    for module in ("images_cells", "images_methods"):
        monkeypatch.setattr(f"fewstep.report.{module}.GROUNDS", brief)


def bench(folder: Path) -> Any:
    return SimpleNamespace(effort=Effort(draws=1000), scratch=folder, console=Console(file=io.StringIO()))


def test_each_flow_is_refitted_on_the_one_before_after_equal_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, Mapping[str, Any]]] = []

    def brief(name: str, told: Mapping[str, Any], *, directory: Path, console: Console) -> Trained:
        asked.append((name, {**told, "directory": str(directory)}))
        few = {"data.held_out": 8, "data.shard": 32, "data.steps": 3} if name == "points-reflow" else {}
        return train(name, {**told, **few}, directory=directory, console=console)

    monkeypatch.setattr(reflow, "train", brief)
    found = list(CLAIMS["reflow"].measure(bench(tmp_path)))
    assert tuple(finding.criterion for finding in found) == CLAIMS["reflow"].criteria
    assert all(finding.value is not None and 0 < finding.value < torch.inf for finding in found)
    assert [name for name, _ in asked] == 2 * ["points-flow-matching", "points-reflow", "points-reflow"]
    for i, (name, told) in enumerate(asked):
        assert (told["budget.steps"], told["run.batch"]) == (2, 16)
        assert name != "points-reflow" or told["model.teacher"] == asked[i - 1][1]["directory"]
    assert [told["data.density"] for name, told in asked if name == "points-flow-matching"] == ["ring", "checkerboard"]
    assert len({told["data.seed"] for _, told in asked[1:3]}) == 2, "each refit has pairs of its own"


def test_a_flow_of_straight_lines_is_straight_and_one_step_takes_it_where_many_do(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """x_0 = eps / 2 all along, so that v = x / (1 + t): what is measured must not depend on the steps."""
    monkeypatch.setattr(reflow, "_PATHS", 32)
    model = parse(DenoiserConfig, {"process": "flow", "parameterisation": "velocity", "backbone": {"kind": "points", "width": 8}})
    lines = model.build()
    lines.network = lambda x, t, label=None, told=None: (x / (1 + t[:, None]), None)  # type: ignore[method-assign]
    data = 0.5 * CounterRng.seeded(range(seed, seed + 64)).normal(2)
    found = reflow._Found.of(lines, data, 0)
    assert found.bent < 1e-10
    assert found.far[1] == pytest.approx(found.far[32], abs=1e-5) and found.far.keys() == {1, 2, 32}
    lines.network = lambda x, t, label=None, told=None: (x, None)  # type: ignore[method-assign]
    assert reflow._Found.of(lines, data, 0).bent > 1e-3, "v = x takes curved ways"


def test_a_distance_below_that_of_fresh_data_counts_as_that() -> None:
    criterion = reflow.CRITERIA["ring"][1]
    near, far = (reflow._Found(0.0, 0.0, {1: distance}) for distance in (-1e-5, 0.3))
    assert reflow._far(criterion, far, near, 1, 0.01).value == pytest.approx(30)
    assert reflow._far(criterion, near, near, 1, 0.01).value == 1


def test_the_claim_of_flow_matching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_matching, "_LAWS", ("ring", "moons"))
    found = list(CLAIMS["flow-matching"].measure(bench(tmp_path)))
    assert tuple(finding.criterion for finding in found) == CLAIMS["flow-matching"].criteria
    for finding in found:
        means = {training: sum(by_law.values()) / 2 for training, by_law in finding.numbers.items()}
        assert means.keys() == {"fm", "vp", "edm"} and finding.value == pytest.approx(means["fm"] / means["vp"])


def test_a_way_makes_no_more_calls_than_it_says_and_the_better_grid_counts(tmp_path: Path) -> None:
    setup = Setup(tmp_path, 1.0, 64, 1, 2, 0)
    recipe: Any = recipe_of("ring", "fm", 1.0, 9.0, 0)
    network = recipe["model"].build()
    network.save(setup.run("ring", "fm"))
    held = reference(setup, "ring")
    for (solver, calls), steps in flow_matching._WAYS.items():
        alone = []
        for grid in flow_matching._GRIDS["fm"]:
            made = sample(network.eval(), parse(SampleConfig, {"count": 64, "solver": solver, "steps": steps, "grid": grid}))
            assert calls - 1 <= made.cost.calls / 64 <= calls
            alone.append(flow_matching.energy_distance(made.x, held.data))
        assert flow_matching.nearest(setup, held, "ring", "fm", (solver, calls)) == pytest.approx(min(alone))
