"""From a recipe to samples: `train` and `sample` for models of arrays, the files they leave, and what they refuse."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fewstep
from fewstep.core.recipe import Recipe, parse
from fewstep.decode.arrays import SampleConfig, sample
from fewstep.hub.arrays import load_arrays
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.models.flow import Flow
from fewstep.recipes import SECTIONS, shipped
from fewstep.recipes.run import train
from fewstep.report.sampled import sample_here

BRIEF = {"budget.steps": 3, "run.batch": 16, "run.validate_every": 0, "data.held_out": 64}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few steps of three recipes."""
    directory, found = tmp_path_factory.mktemp("runs"), {}
    small = {"model.backbone.width": 16}
    for name in ("points-edm", "points-flow-matching", "points-nsf"):
        found[name] = directory / name
        train(name, {**BRIEF, **(small if name != "points-nsf" else {})}, directory=found[name])
    return found


def images(classes: int = 3) -> Denoiser:
    backbone = {"kind": "unet", "width": 8, "attention": 0}
    return parse(DenoiserConfig, {"shape": (1, 4, 4), "classes": classes, "backbone": backbone, "centre": 2.0}).build().eval()


@pytest.mark.parametrize("name", ["points-edm", "points-flow-matching", "points-nsf"])
def test_a_run_can_be_sampled(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    made = sample_here(runs[name], {"count": 5, "steps": 4, "seed": 3}, tmp_path, animation="webp")
    assert (tmp_path / "samples.webp").is_file() == (name != "points-nsf"), "a flow's samples have no way"
    assert isinstance(load_arrays(runs[name]), Flow if name == "points-nsf" else Denoiser)
    assert torch.equal(load_file(tmp_path / "samples.safetensors")["x"], made.x) and made.x.shape == (5, 2)
    assert made.x.isfinite().all() and (tmp_path / "samples.png").is_file()
    told = json.loads((tmp_path / "samples.json").read_text())
    assert told["setting"]["seed"] == 3 and told["cost"]["calls"] == 5 * (1 if name == "points-nsf" else 4)
    later = sample_here(runs[name], {"count": 2, "steps": 4, "seed": 6, "batch": 1}, tmp_path / "later")
    torch.testing.assert_close(later.x, made.x[3:], rtol=1e-5, atol=1e-5)  # sample i is that of its own seed


@pytest.mark.parametrize("process", ["vp", "flow", "ve", "edm"])
def test_any_process_samples_any_model(process: str, runs: dict[str, Path]) -> None:
    """The probability-flow ODE is the same on every clock: fine grids between the same ratios end at the same points."""
    grid = {"most": 20.0, "least": 0.02}
    for name in ("points-edm", "points-flow-matching"):
        model = load_arrays(runs[name])
        assert isinstance(model, Denoiser)
        own, other = (
            sample(model, parse(SampleConfig, {"count": 4, "steps": 60, "grid": {"kind": "karras", **grid}, "process": kind}))
            for kind in (None, process)
        )
        scale = own.x.abs().amax()
        assert (own.x - other.x).abs().amax() < 2e-2 * scale


def test_classes_and_guidance_move_samples_and_cost_calls(tmp_path: Path) -> None:
    model = images()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    asked = {"count": 4, "steps": 3}
    free, given, guided = (
        sample(model, parse(SampleConfig, {**asked, **more})) for more in ({}, {"label": (1,)}, {"label": (1,), "guidance": 3.0})
    )
    assert (free.cost.calls, given.cost.calls, guided.cost.calls) == (12, 12, 24)
    assert not torch.allclose(free.x, given.x) and not torch.allclose(given.x, guided.x)
    each = sample(model, parse(SampleConfig, {**asked, "label": (0, 1, 2, 1)}))
    torch.testing.assert_close(each.x[1], given.x[1])
    model.save(tmp_path / "model")
    made = sample_here(tmp_path / "model", asked, tmp_path / "out")
    torch.testing.assert_close(made.x, free.x)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "samples.safetensors",
        "samples.json",
        "samples.png",
        "samples.gif",
    }


def test_what_cannot_be_sampled_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    for fields, field in (
        ({"label": (0, 1)}, "label"),
        ({"guidance": 2.0}, "guidance"),
        ({"label": (7,)}, "label"),
        ({"grid": {"kind": "karras", "most": 1000.0}}, "ratio"),
    ):
        with pytest.raises(ValueError, match=rf"^{field}[^\n]*; [^\n]*$"):
            sample(images(), parse(SampleConfig, {"count": 3, "steps": 2, **fields}))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^out=[^\n]*; [^\n]*$"):
        sample_here(runs["points-nsf"], {"count": 2}, tmp_path / "file" / "out")
    with pytest.raises(ValueError, match=r"^label=[^\n]*; [^\n]*$"):
        sample_here(runs["points-nsf"], {"count": 2, "label": (1,)}, tmp_path)
    with pytest.raises(ValueError, match=r"^animation='avi': must be 'gif' or 'webp'; [^\n]*$"):
        sample_here(runs["points-nsf"], {"count": 2}, tmp_path, animation="avi")
    with pytest.raises(ValueError, match="denoiser"):
        load_arrays("code-nano")


def test_arrays_and_tokens_do_not_mix(tmp_path: Path) -> None:
    for section, values, field in (
        ("objective", {"kind": "likelihood"}, "objective.kind"),
        ("data", {"kind": "stdlib"}, "model.kind"),
        ("model", {"kind": "denoiser", "shape": [3]}, "model.shape"),
        ("model", {"kind": "denoiser", "classes": 2}, "model.classes"),
    ):
        told = tomllib.loads(shipped()["points-edm"].read_text())
        recipe = Recipe.from_values(told.pop("name"), {**told, section: values}, registries=SECTIONS)
        with pytest.raises(ValueError, match=rf"^{field}=[^\n]*; [^\n]*$"):
            train(recipe, directory=tmp_path / "run")


def test_learned_grids_go_with_their_solver(runs: dict[str, Path]) -> None:
    model = load_arrays(runs["points-edm"])
    assert isinstance(model, Denoiser)
    with pytest.raises(ValueError, match="fitted to solver='unipc' with terms=3; set these"):
        parse(SampleConfig, {"grid": "learned", "steps": 8})
    with pytest.raises(ValueError, match="a grid was learned for 5, 8"):
        sample(model, parse(SampleConfig, {"grid": "learned", "steps": 7, "solver": {"kind": "unipc", "terms": 3}}))
    made = sample(
        model, parse(SampleConfig, {"grid": "learned", "steps": 8, "solver": {"kind": "unipc", "terms": 3}, "count": 3})
    )
    assert made.cost.calls == 24 and bool(made.x.isfinite().all())


def test_the_public_face_samples_a_model_or_what_a_name_stands_for(runs: dict[str, Path]) -> None:
    model = load_arrays(runs["points-edm"])
    one = fewstep.sample(runs["points-edm"], 5, solver="heun", steps=4, seed=3, options={"grid": "uniform"})
    other = fewstep.sample(model, 5, solver="heun", steps=4, seed=3, options={"grid": {"kind": "uniform"}})
    assert one.x.shape == (5, 2) and torch.equal(one.x, other.x)
    assert not torch.equal(one.x, fewstep.sample(model, 5, solver="heun", steps=4, seed=4).x)
    assert fewstep.sample(runs["points-nsf"], 7).cost.calls == 7
    few = [{"parameterisation": {"kind": "consistency"}}, {"told": "gap", "process": "flow", "parameterisation": "velocity"}]
    for fields in few:  # models made for few calls say so themselves
        made = parse(DenoiserConfig, {"shape": (2,), "backbone": {"kind": "points", "width": 8}, **fields}).build().eval()
        assert (fewstep.sample(made, 3).cost.calls, fewstep.sample(made, 3, steps=2).cost.calls) == (3, 6)
        assert fewstep.sample(made, 3, solver="heun").cost.calls == 3 * 35
    with pytest.raises(ValueError, match="solver"):
        fewstep.sample(model, solver="nothing")
