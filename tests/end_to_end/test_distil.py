"""From a teacher to a student, and other ways to few steps: `train`, samples in one or two calls, and what is refused."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from train_toy import assert_same_end

from fewstep.core.recipe import Recipe, parse
from fewstep.decode.arrays import SampleConfig, sample
from fewstep.hub.arrays import load_arrays
from fewstep.models.denoiser import Denoiser
from fewstep.recipes import SECTIONS, shipped
from fewstep.recipes.run import train

BRIEF = {"budget.steps": 4, "run.batch": 16, "run.validate_every": 0, "run.checkpoint_steps": 2}
SMALL = {"model.backbone.width": 16, "data.held_out": 64}
PAIRS = {"data.count": 40, "data.held_out": 8, "data.shard": 16, "data.steps": 3}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("teachers")
    for name in ("points-flow-matching", "points-edm"):
        train(name, {**BRIEF, **SMALL}, directory=directory / name)
    train("points-nsf", {**BRIEF, "data.held_out": 64}, directory=directory / "points-nsf")
    return {name: directory / name for name in ("points-flow-matching", "points-edm", "points-nsf")}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def changed(name: str, **sections: Any) -> Recipe:
    """A shipped recipe with other sections; "model" keeps what is not named, if its kind stays."""
    told = tomllib.loads(shipped()[name].read_text())
    model = sections.pop("model", {})
    told["model"] = model if "kind" in model else {**told["model"], **model}
    return Recipe.from_values(told.pop("name"), {**told, **sections}, registries=SECTIONS)


def drawn(run: Path, solver: object, steps: int, **fields: object) -> tuple[torch.Tensor, int]:
    """Five samples and the calls each cost."""
    model = load_arrays(run)
    assert isinstance(model, Denoiser)
    made = sample(model, parse(SampleConfig, {"count": 5, "steps": steps, "solver": solver, **fields}))
    assert bool(made.x.isfinite().all())
    return made.x, made.cost.calls // 5


def test_reflow_refits_its_teacher_on_its_own_pairs(teachers: dict[str, Path], tmp_path: Path) -> None:
    told = {**BRIEF, **PAIRS, "model.teacher": str(teachers["points-flow-matching"])}
    whole = train("points-reflow", told, directory=tmp_path / "whole", console=Console(quiet=True))
    shards = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(shards) == 3
    teacher, student = load_arrays(teachers["points-flow-matching"]), load_arrays(tmp_path / "whole")
    assert isinstance(student, Denoiser) and student.config == teacher.config
    moved = [float((a - b).detach().abs().max()) for a, b in zip(teacher.parameters(), student.parameters(), strict=True)]
    assert 0 < max(moved) < 0.2  # it began at the teacher's weights
    resumed = train("points-reflow", told, directory=tmp_path / "whole", resume=True)
    assert_same_end(resumed.summary, whole.summary)
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == shards
    assert drawn(tmp_path / "whole", "euler", 1)[1] == 1
    train("points-reflow", {**told, "data.count": 0, "model.teacher": str(tmp_path / "whole")}, directory=tmp_path / "again")


def test_a_consistency_model_is_distilled_and_sampled_in_one_and_two_calls(teachers: dict[str, Path], tmp_path: Path) -> None:
    train("points-consistency", {**BRIEF, "data.held_out": 64, "model.teacher": str(teachers["points-edm"])}, directory=tmp_path)
    student = load_arrays(tmp_path)
    assert isinstance(student, Denoiser) and student.parameterisation.kind == "consistency"
    grid = {"kind": "karras", "least": 1.0}
    (once, one), (twice, two) = (drawn(tmp_path, "consistency", steps, grid=grid) for steps in (1, 2))
    assert (one, two) == (1, 2) and not torch.allclose(once, twice)
    alone = changed(
        "points-edm", model={"parameterisation": "consistency"}, objective={"kind": "consistency"}, budget={"steps": 2}
    )
    train(alone, directory=tmp_path / "training")


def test_a_mean_flow_looks_ahead_under_solvers_that_hold_the_estimate(tmp_path: Path) -> None:
    train("points-mean-flow", {**BRIEF, **SMALL}, directory=tmp_path)
    model = load_arrays(tmp_path)
    with torch.no_grad():
        model.backbone.out.weight.normal_()  # type: ignore[operator, union-attr]
    assert isinstance(model, Denoiser)
    found = {}
    for solver, steps in (("ddim", 1), ("ddim", 3), ({"kind": "deis", "terms": 1}, 3), ({"kind": "heun"}, 3)):
        made = sample(model, parse(SampleConfig, {"count": 4, "steps": steps, "solver": solver}))
        found[f"{solver} {steps}"] = made.x
    ahead = found["{'kind': 'deis', 'terms': 1} 3"]
    torch.testing.assert_close(ahead, found["ddim 3"])
    model.config = model.config.model_copy(update={"told": "nothing"})
    plain = sample(model, parse(SampleConfig, {"count": 4, "steps": 3, "solver": "ddim"})).x
    assert not torch.allclose(plain, ahead)


@pytest.mark.parametrize(
    ("name", "solver", "grid", "calls"),
    [
        ("points-smld", {"kind": "annealed-langevin", "moves": 2}, "log-snr", 9),
        ("points-iddpm", {"kind": "ancestral", "variance": "learned"}, "uniform", 4),
    ],
)
def test_chains_are_trained_and_sampled(name: str, solver: object, grid: str, calls: int, tmp_path: Path) -> None:
    train(name, {**BRIEF, **SMALL}, directory=tmp_path)
    assert drawn(tmp_path, solver, 4, grid=grid)[1] == calls


def test_what_cannot_be_taught_is_refused(teachers: dict[str, Path], tmp_path: Path) -> None:
    plain = str(teachers["points-edm"])
    for recipe, field in (
        (changed("points-reflow", model={"kind": "student", "teacher": str(tmp_path / "none")}), "model="),
        (changed("points-reflow", model={"kind": "student", "teacher": str(teachers["points-nsf"])}), "model.teacher="),
        (
            changed("points-reflow", model={"kind": "student", "teacher": plain}, objective={"kind": "mean-flow"}),
            "objective.kind=",
        ),
        (changed("points-edm", data={"kind": "coupling"}), "data='coupling'"),
        (changed("points-edm", objective={"kind": "likelihood"}), "objective.kind="),
    ):
        with pytest.raises(ValueError, match=rf"^{field}[^\n]*; [^\n]*$"):
            train(recipe, directory=tmp_path / "run")
