"""The race of language models from options to page: equal training, three-part quality, what is kept and resumed, refusals."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from raced import files, small_model
from rich.console import Console
from typer.testing import CliRunner

from fewstep import cli
from fewstep.core.recipe import parse
from fewstep.report import text_race
from fewstep.report.text_cells import Setup, bits, judged
from fewstep.report.text_methods import METHODS, TRAININGS, TextRaceConfig, recipe_of
from fewstep.report.text_race import QUICK, race_text, race_text_here

SVG = "{http://www.w3.org/2000/svg}"
SMALL: dict[str, Any] = {
    "vocab": 300,
    "width": 32,
    "depth": 1,
    "tokens": 640,
    "batch": 2,
    "length": 32,
    "prompt": 16,
    "windows": 3,
    "draws": 2,
    "repeats": 2,
    "count": 3,
    "together": 2,
    "rungs": 2,
}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings of a race that takes a moment, with data, a judge and a cache of the test's own."""
    monkeypatch.setattr("fewstep.recipes.run.cache_directory", lambda: tmp_path / "cache")
    data = files(tmp_path / "texts", lines=30)
    small_model(heads=False).save(tmp_path / "judge")
    return {**SMALL, "data": {"kind": "text", "paths": [str(data)], "held_out": 0.2}, "judge": str(tmp_path / "judge")}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "race.json").read_text(encoding="utf-8"))


def test_a_race_writes_a_whole_page_and_every_number(asked: dict[str, Any], tmp_path: Path) -> None:
    out, told = tmp_path / "race", quiet()
    methods = ("ar", "mtp", "llada", "sedd-uniform", "block-1", "block-4-sure")
    race = race_text_here(parse(TextRaceConfig, {**asked, "methods": methods}), out, told)
    found = record(out)
    assert found == json.loads(json.dumps(race.as_dict())) and found["left_out"] == []
    assert [row["training"] for row in found["trainings"]] == ["ar", "mtp", "llada", "sedd-uniform", "block-1", "block-4"]
    assert {row["tokens"] for row in found["trainings"]} == {640}, "everybody learns from as much"
    for row in found["trainings"]:
        known = row["training"] in ("ar", "mtp", "block-1")
        assert row["bits"]["exact"] == known and (row["bits"]["error"] == 0) == known and row["bits"]["spread"] > 0
        assert all(math.isfinite(point["bits"]) for point in row["curve"])
    cells = {(cell["method"], cell["rung"]): cell for cell in found["cells"]}
    assert list(cells) == [(name, rung) for name in methods for rung in METHODS[name].rungs[:2]]
    for (name, _), cell in cells.items():
        assert cell["seconds"] > 0 and cell["judge"]["value"] > 0 and 0 <= cell["entropy"] <= 4, "16 tokens have 4 bits at most"
        assert set(cell["distinct"]) == {"1", "2", "3"} and all(0 < share <= 1 for share in cell["distinct"].values())
        frames = cell["frames"]
        assert len(frames["tokens"]) == 16
        moments = [moment for history in frames["tokens"] for moment, _ in history]
        assert min(moments) >= 1 and max(moments) <= frames["calls"]
        filled = sum(bool(history) for history in frames["tokens"])
        assert filled == 16 or name == "sedd-uniform", "only noise may have been right from the start"
    assert cells["ar", 0]["tokens_per_call"] == 1 and cells["mtp", 2]["tokens_per_call"] >= 1
    assert cells["llada", 2]["tokens_per_call"] == pytest.approx(2 * cells["llada", 1]["tokens_per_call"]) == 2
    assert cells["block-1", 1]["calls"] == 16, "a call finds a token, and reads the one before it into the cache"
    assert set(found["floor"]) == {"judge", "entropy", "distinct"}
    html = (out / "race.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|\bsrc=|\bhref=|url\(|@import", html)
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    assert len(charts) == 1 + 2 + 6
    for chart in charts:
        assert chart[0].tag == f"{SVG}title" and chart[0].text and chart[1].tag == f"{SVG}desc" and chart[1].text
    used = set(re.findall(r"animation-name: ([\w-]+)", html))
    assert used == set(re.findall(r"@keyframes ([\w-]+)", html)), "every moment has its keyframes"
    assert any(name.startswith("from") for name in used), "uniform noise is written over"
    assert html.count("<b ") == 16 * len(methods)
    printed = told.file.getvalue()  # type: ignore[attr-defined]
    assert "Block of 4, threshold" in printed and "left)" in printed and str((out / "race.html").resolve()) in printed


def test_a_killed_race_goes_on_and_a_further_method_joins(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done, real = tmp_path / "race", list[str](), text_race.race

    def killed(setup: Setup, method: str, rung: float) -> dict[str, Any]:
        done.append(f"{method}/{rung:g}")
        if len(done) == 2:
            raise KeyboardInterrupt
        return real(setup, method, rung)

    monkeypatch.setattr(text_race, "race", killed)
    config = parse(TextRaceConfig, {**asked, "methods": ["ar", "block-4"]})
    with pytest.raises(KeyboardInterrupt):
        race_text(config, out, console=quiet())
    before = record(out)
    assert done == ["ar/0", "block-4/1"] and len(before["cells"]) == 1 and len(before["trainings"]) == 2
    race_text(config, out, console=quiet())
    assert done[2:] == ["block-4/1", "block-4/2"]
    race_text(parse(TextRaceConfig, {**asked, "methods": ["block-4-sure"], "rungs": 1}), out, console=quiet())
    after = record(out)
    assert done[4:] == ["block-4-sure/0.9"], "its network is there"
    assert after["trainings"] == before["trainings"] and len(after["cells"]) == 4
    with pytest.raises(ValueError, match="holds a race with seed=0; race so again, or choose another folder"):
        race_text(parse(TextRaceConfig, {**asked, "seed": 1}), out, console=quiet())
    (out / "race.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"race\.json is damaged .*; remove it"):
        race_text(config, out, console=quiet())


def test_what_fails_is_said_and_the_others_go_on(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = text_race.learn

    def learn(setup: Setup, training: str) -> dict[str, Any]:
        if training == "ar":
            raise ValueError("step 3: loss is no number")
        return real(setup, training)

    monkeypatch.setattr(text_race, "learn", learn)
    config = parse(TextRaceConfig, {**asked, "methods": ["ar", "mdlm"], "rungs": 1})
    race_text(config, tmp_path / "race", console=quiet())
    found = record(tmp_path / "race")
    assert {left["piece"] for left in found["left_out"]} == {"ar", "ar/0", "held-out text"}
    assert [cell["method"] for cell in found["cells"]] == ["mdlm"]
    assert "loss is no number" in (tmp_path / "race" / "race.html").read_text(encoding="utf-8")


def test_the_judge_alone_would_be_fooled() -> None:
    """One token over and over: the entropy is 0 and one n-gram in so many is distinct."""
    model = small_model(heads=False)
    assert model.tokenizer is not None
    prompt, same = model.tokenizer.encode("def f(x):"), model.tokenizer.encode(" ")[:1]
    found = judged(model, model, [prompt], [same * 8])
    assert found["entropy"] == 0 and found["distinct"] == {"1": 1 / 8, "2": 1 / 7, "3": 1 / 6}
    ids = model.tokenizer.encode("return x_a * 4")[:8]
    mixed = judged(model, model, [prompt], [ids])
    assert mixed["entropy"] == pytest.approx(math.log2(len(ids))) if len(set(ids)) == len(ids) else mixed["entropy"] > 0
    logits = model.logits(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    nats = -float(logits.gather(1, torch.tensor(ids)[:, None]).sum())
    assert mixed["judge"]["value"] == pytest.approx(nats / math.log(2) / len(model.tokenizer.decode(ids).encode()), rel=1e-4)


def test_bits_of_one_law_agree(seed: int) -> None:
    """A network that sees nothing has one law for every token: all bounds of it are its cross-entropy."""
    torch.manual_seed(seed)
    config = parse(TextRaceConfig, {**SMALL, "draws": 4, "repeats": 4})
    rows, found = torch.randint(0, 300, (3, 32)).tolist(), {}
    for training in ("mdlm", "block-1", "block-4", "sedd"):
        network = recipe_of(config, training)["model"].build()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        found[training] = bits(config, training, network, rows, size=93)
    wanted = 3 * 31 * math.log2(300) / 93
    for training in ("mdlm", "block-1", "block-4"):
        assert found[training]["value"] == pytest.approx(wanted, rel=1e-5), training
    assert abs(found["sedd"]["value"] - wanted) < 7 * found["sedd"]["error"] + 0.01 * wanted, "and but for times below 1e-3"


def test_what_is_equal_is_tokens_or_seconds_and_the_backbone() -> None:
    for fields, tokens, seconds in (({}, 640, None), ({"seconds": 2.0}, None, 2.0)):
        recipes = [recipe_of(parse(TextRaceConfig, {**SMALL, **fields}), name) for name in TRAININGS]
        assert {(r["budget"].tokens, r["budget"].seconds) for r in recipes} == {(tokens, seconds)}  # type: ignore[attr-defined]
        own = {"vocab", "mask_token", "noisy", "heads"}
        rest = [{k: v for k, v in r["model"].model_dump(mode="json").items() if k not in own} for r in recipes]
        assert all(each == rest[0] for each in rest)
        for section in ("data", "tokenizer", "optim", "schedule", "precision", "run"):
            assert all(recipe[section] == recipes[0][section] for recipe in recipes), section


def test_bad_names_are_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    for fields, told in (
        ({"methods": ["blok-4"]}, "methods='blok-4': not known; did you mean 'block-4'?"),
        ({"prompt": 24}, "prompt=24: must be a multiple of 16 below length=32; lower it"),
        ({"tokns": 3}, "tokns: no such field; did you mean 'tokens'?"),
        ({"length": 40}, "length=40"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            parse(TextRaceConfig, {**asked, **fields})
    with pytest.raises(ValueError, match="model='nobody'"):
        race_text(parse(TextRaceConfig, {**asked, "judge": "nobody"}), tmp_path / "race", console=quiet())
    assert not (tmp_path / "race" / "runs").exists(), "refused before anything was trained"
    assert set(QUICK) <= set(TextRaceConfig.model_fields)


def test_the_command(asked: dict[str, Any], tmp_path: Path) -> None:
    fields = {key: value for key, value in asked.items() if key not in ("judge",)}
    options = [part for key, value in fields.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    out = tmp_path / "race"
    given = ["race", "text", "--quick", "--method", "ar", "--judge", asked["judge"], "--out", str(out), *options]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 0, result.output
    assert record(out)["setting"]["methods"] == ["ar"] and "<strong>Quick.</strong>" in (out / "race.html").read_text("utf-8")
