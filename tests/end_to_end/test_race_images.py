"""The race of images from options to page: shared networks, floors, what is kept and resumed, refusals, and a whole page."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fewstep import cli
from fewstep.core.recipe import parse
from fewstep.decode.arrays import sample
from fewstep.hub.arrays import load_arrays
from fewstep.report import images_methods, images_race
from fewstep.report.images_cells import Setup, reference
from fewstep.report.images_methods import GROUNDS, METHODS, TRAININGS, Ground, recipe_of
from fewstep.report.images_page import page
from fewstep.report.images_race import QUICK, ImageRaceConfig, race_images, race_images_here
from fewstep.training.data.drawings import GlyphsConfig
from fewstep.training.data.points import DENSITIES

SVG = "{http://www.w3.org/2000/svg}"
TINY: dict[str, Any] = {"share": 0.0005, "count": 64, "seeds": 2, "rungs": 2, "rows": 2, "workers": 1}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Images that need no further package, networks of a few units, and a cache of the test's own."""
    for name in ("_POINT_STEPS", "_IMAGE_STEPS"):
        monkeypatch.setattr(f"fewstep.report.images_cells.{name}", 6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    glyphs = GlyphsConfig(characters="01", count=80, size=8, held_out=0.3)
    digits, points = GROUNDS["digits"], GROUNDS["moons"]
    shared = {"levels": 256, "centre": 128.0, "scale": 128.0, "data": glyphs}
    noisy, backbone = (
        glyphs.model_copy(update={"dequantised": True}),
        {"kind": "unet", "width": 8, "multiples": [1], "attention": 0},
    )
    small = {name: {"hidden": 8} for name in ("nice", "maf", "realnvp", "glow", "nsf")}
    images = _with(digits, **shared, noisy=noisy, backbone=backbone, sizes=small)
    plane = _with(points, backbone={"kind": "points", "width": 8, "depth": 1})
    for module in ("images_cells", "images_methods", "images_page", "images_race", "images_pictures"):
        monkeypatch.setattr(f"fewstep.report.{module}.GROUNDS", {"moons": plane, "digits": images})


def _with(place: Ground, **fields: Any) -> Ground:
    kept = {name: getattr(place, name) for name in Ground.__dataclass_fields__}
    pace = {name: type(kept[name])(kept[name].steps, 8, 1e-3, 1.0) for name in ("denoiser", "flow")}
    return Ground(**{**kept, **pace, **fields})


def console() -> Console:
    return Console(file=io.StringIO(), width=160)


def config(**fields: Any) -> ImageRaceConfig:
    return parse(ImageRaceConfig, {**TINY, **fields})


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "race.json").read_text(encoding="utf-8"))


def test_a_race_writes_a_whole_page_and_every_number(tmp_path: Path) -> None:
    out, told = tmp_path / "race", console()
    methods = ("edm-ddim", "edm-heun", "vp-em", "fm-euler", "nice")
    race = race_images_here(config(methods=methods), out, told)
    found = record(out)
    assert found == json.loads(json.dumps(race.as_dict())) and found["left_out"] == []
    places = ("moons", "digits")
    assert [floor["ground"] for floor in found["floors"]] == list(places)
    networks = {(row["ground"], row["training"]) for row in found["trainings"]}
    assert networks == {(place, name) for place in places for name in ("edm", "vp", "fm", "nice")}, "methods share networks"
    cells = {(cell["ground"], cell["method"], cell["steps"]): cell for cell in found["cells"]}
    assert set(cells) == {(place, name, k) for place in places for name in methods for k in METHODS[name].steps[:2]}
    for (place, name, steps), cell in cells.items():
        calls = 1 if name == "nice" else 2 * steps - 1 if name == "edm-heun" else steps
        assert cell["calls"] == calls and 0 < cell["seconds"]["low"] <= cell["seconds"]["median"] <= cell["seconds"]["high"]
        measures = {"energy", "mmd"} | ({"frechet", "precision", "recall", "copying"} if place == "digits" else set())
        assert set(cell["scores"]) == measures
        assert all(score["low"] <= score["median"] <= score["high"] for score in cell["scores"].values())
    for row in found["trainings"]:
        assert row["nll"]["unit"] == ("nats" if row["ground"] == "moons" else "bits/dim")
        assert row["nll"]["error"] > 0 and (row["nll"]["how"] == "exact") == (row["training"] == "nice")
        assert (row["nll"]["step_error"] > 0) == (row["training"] != "nice")
        assert (row["nll"]["gap"] is None) == (row["ground"] == "digits")
        if row["ground"] == "moons":
            entropy, error = DENSITIES["moons"].entropy(128), row["nll"]["error"] + row["nll"]["gap_error"]
            assert row["nll"]["gap"] == pytest.approx(row["nll"]["value"] - entropy, abs=6 * error + 0.01)
    html = (out / "race.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|\bhref=|url\(|@import|\bsrc=(?!\"data:image/png;base64,)", html)
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    assert len(charts) == 3 * len(places)
    for chart in charts:
        assert chart[0].tag == f"{SVG}title" and chart[0].text and chart[1].tag == f"{SVG}desc" and chart[1].text
        written = [text.text for text in chart.iter(f"{SVG}text")]
        assert {"NICE"} <= set(written)
    pictures = re.findall(r"src=\"data:image/png;base64,([^\"]+)\"", html)
    assert len(pictures) == len(places) * (1 + 2 * len(methods) - 1), "a flow has no way"
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            image.load()
    assert "<strong>Quick.</strong> Networks had 0.05% of their full training" in html
    assert "EDM, Heun" in told.file.getvalue()  # type: ignore[attr-defined]


def test_a_killed_race_goes_on_and_a_further_method_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, done = ("fm-euler", "nice"), list[str]()
    asked = config(methods=names, grounds=("moons",))
    real = images_race.race

    def killed(setup: Setup, place: str, method: str, steps: int) -> dict[str, Any]:
        done.append(f"{method}/{steps}")
        if len(done) == 2:
            raise KeyboardInterrupt
        return real(setup, place, method, steps)

    monkeypatch.setattr(images_race, "race", killed)
    with pytest.raises(KeyboardInterrupt):
        race_images(asked, tmp_path, console=console())
    before = record(tmp_path)
    assert len(before["cells"]) == 1 and len(before["trainings"]) == 2
    monkeypatch.setattr(images_race, "learn", None)  # nothing is trained again
    race_images(asked, tmp_path, console=console())
    after = record(tmp_path)
    assert after["trainings"] == before["trainings"] and after["floors"] == before["floors"]
    assert before["cells"][0] in after["cells"] and len(after["cells"]) == 3 and len(done) == 4
    race_images(config(methods=("fm-heun",), grounds=("moons",)), tmp_path, console=console())
    joined = record(tmp_path)
    assert [cell for cell in joined["cells"] if cell["method"] != "fm-heun"] == after["cells"]
    assert sum(cell["method"] == "fm-heun" for cell in joined["cells"]) == 2
    assert joined["trainings"] == before["trainings"]


def test_another_race_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    asked = {"methods": ("nice",), "grounds": ("moons",)}
    race_images(config(**asked), tmp_path, console=console())
    first = (tmp_path / "race.json").read_text()
    with pytest.raises(ValueError, match=r"^out='[^\n]*': holds a race with seed=0; race so again, or choose another folder$"):
        race_images(config(**asked, seed=1), tmp_path, console=console())
    assert (tmp_path / "race.json").read_text() == first
    (tmp_path / "race.json").write_text(first[:100])
    with pytest.raises(ValueError, match=r"^out='[^\n]*': race\.json is damaged \([^\n]*\); "):
        race_images(config(**asked), tmp_path, console=console())


def test_out_of_time_is_left_out_and_done_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"methods": ("nice",), "grounds": ("moons",)}
    race_images(config(**asked, minutes=1e-9), tmp_path, console=console())
    left = record(tmp_path)
    assert [row["piece"] for row in left["left_out"]] == ["moons", "moons/nice", "moons/nice/1"] and not left["cells"]
    assert "no time was left" in (tmp_path / "race.html").read_text()
    race_images(config(**asked), tmp_path, console=console())
    done = record(tmp_path)
    assert done["left_out"] == [] and len(done["cells"]) == 1


def test_what_a_piece_refuses_is_told_and_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: Any) -> dict[str, Any]:
        raise ValueError("the weights have diverged")

    monkeypatch.setattr(images_race, "race", refused)
    found = race_images(config(methods=("nice",), grounds=("moons",)), tmp_path, console=console()).as_dict()
    assert found["left_out"] == [{"piece": "moons/nice/1", "reason": "the weights have diverged"}]
    assert "the weights have diverged" in page(found, tmp_path)


def test_pieces_follow_the_seed_and_nothing_else(tmp_path: Path) -> None:
    asked = {"methods": ("edm-ddim", "vp-em"), "grounds": ("moons",), "rungs": 1}
    one, two, other = (
        race_images(config(**asked, seed=seed), tmp_path / name, console=console()).as_dict()
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    )

    def scores(found: dict[str, Any]) -> list[Any]:
        return [cell["scores"] for cell in found["cells"]] + [row["nll"]["value"] for row in found["trainings"]]

    assert scores(one) == scores(two)
    assert all(mine != theirs for mine, theirs in zip(scores(one), scores(other), strict=True))


def test_held_out_rows_are_no_training_rows_and_floors_compare_equal_counts(tmp_path: Path) -> None:
    setup = config().setup(tmp_path)
    held = reference(setup, "digits")
    assert len(held.data) + len(held.new) == 80
    assert not {row.numpy().tobytes() for row in held.data} & {row.numpy().tobytes() for row in held.new}
    found = held.scores(held.new.view(-1, *held.shape))
    assert found["copying"] == 1.0
    copies = held.scores(held.data[: len(held.new)].view(-1, *held.shape))
    assert copies["copying"] == 0 and copies["frechet"] >= 0


def brief(ground: str, training: str, folder: Path) -> Any:
    """The recipe of one step, with a teacher that has taken none."""
    teacher = TRAININGS[training].teacher
    if teacher:
        brief(ground, teacher, folder)["model"].build().save(folder / teacher)
    return recipe_of(ground, training, 1e-9, 9.0, 0, folder / teacher if teacher else None)


def test_every_method_has_a_network_a_recipe_and_a_request(tmp_path: Path) -> None:
    """The tables fit together: whatever is a line of them can be trained and sampled."""
    assert len(METHODS) >= 12 and len({method.title for method in METHODS.values()}) == len(METHODS)
    for name, method in METHODS.items():
        assert TRAININGS[method.training].kind in ("denoiser", "flow") and list(method.steps) == sorted(set(method.steps)), name
        for steps in method.steps:
            asked = method.config(steps, 3, 0, 3)
            if TRAININGS[method.training].kind == "denoiser":
                recipe = brief("moons", method.training, tmp_path)
                network = recipe["model"].build().eval()
                assert recipe["budget"].steps == 1
                if steps == method.steps[0]:
                    assert sample(network, asked).x.isfinite().all(), name


def test_networks_for_few_calls_join_and_find_their_teachers(tmp_path: Path) -> None:
    """A race of flow matching goes on with them: it trains the teacher that is not there yet, and these after it."""
    few, told = ("reflow", "consistency", "mean-flow"), console()
    race_images(config(methods=("fm-euler",), grounds=("moons",)), tmp_path, console=console())
    before = record(tmp_path)
    race_images_here(config(methods=few, grounds=("moons",)), tmp_path, told)
    after = record(tmp_path)
    assert after["left_out"] == [] and [row for row in after["trainings"] if row["training"] == "fm"] == before["trainings"]
    nll = {row["training"]: row["nll"] for row in after["trainings"]}
    assert set(nll) == {"fm", "edm", *few}, "one teacher was there, the other is trained though nobody samples it"
    assert nll["consistency"] is nll["mean-flow"] is None and nll["reflow"]["error"] > 0
    calls = {(cell["method"], cell["steps"]): cell["calls"] for cell in after["cells"] if cell["method"] in few}
    assert calls == {(name, steps): steps for name in few for steps in (1, 2)}
    html, printed = (tmp_path / "race.html").read_text(), told.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"Mean flow</th><td>Two moons</td>(<td>\d+</td>){3}(<td>-</td>){3}</tr>", html)
    assert len(re.findall(r'<g class="few">', html)) == 2 * len(few), "a line in each of two charts"
    assert re.search(r"moons/consistency: \d+ steps in \d+ s$", printed, re.MULTILINE)


def test_students_begin_as_their_teachers_and_read_what_teaches_them(tmp_path: Path) -> None:
    place = images_methods.GROUNDS["digits"]
    recipes = {name: brief("digits", name, tmp_path) for name in ("reflow", "consistency", "mean-flow")}
    for name, other in (("reflow", {}), ("consistency", {"parameterisation": "consistency"})):
        teacher, student = load_arrays(tmp_path / TRAININGS[name].teacher), recipes[name]["model"].build()
        assert all(torch.equal(mine, own) for mine, own in zip(student.parameters(), teacher.parameters(), strict=True))
        kept, changed = (model.config.model_dump(exclude=set(other)) for model in (teacher, student))
        assert kept == changed and all(getattr(student.config, field).kind == kind for field, kind in other.items())
    pairs = recipes["reflow"]["data"]
    assert (pairs.kind, recipes["reflow"]["objective"].pairing) == ("coupling", "given")
    assert pairs.count == place.denoiser.batch, "as many as a batch at least"
    assert recipe_of("digits", "reflow", 1.0, 9.0, 0, tmp_path)["data"].model_dump()["count"] == place.pairs
    assert recipes["consistency"]["data"] == recipes["mean-flow"]["data"] == place.noisy
    network = recipes["mean-flow"]["model"]
    assert (network.told, network.backbone.turns, network.backbone.width) == ("gap", 2, place.backbone["width"])


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    """Spawned processes know the tables as they are written, so these pieces are of full-sized networks, hardly trained."""
    if torch.get_num_threads() > 1:
        pytest.skip("for one thread each")
    asked = config(methods=("nice",), grounds=("moons",), workers=2)
    found = race_images(asked, tmp_path, console=console()).as_dict()
    assert found["left_out"] == [] and len(found["cells"]) == 1
    assert load_arrays(tmp_path / "runs" / "moons-nice").config.shape == (2,)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--method", "edm-huen"], "methods='edm-huen': not known; did you mean 'edm-heun'?"),
        (["--ground", "moon"], "grounds='moon': not known; did you mean 'moons'?"),
        (["--set", "share=0"], "share=0"),
        (["--set", "minutes=nan"], "minutes="),
        (["--set", "hours=1"], "hours: no such field"),
    ],
)
def test_bad_options_are_refused_in_one_line(option: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["race", "images", "--out", str(tmp_path / "out"), *option])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_quick_is_quicker_in_every_respect() -> None:
    full, quick = ImageRaceConfig(), parse(ImageRaceConfig, QUICK)
    for name in QUICK:
        assert getattr(quick, name) < getattr(full, name), name
    assert quick.minutes <= 15 and full.minutes <= 60 and full.workers == quick.workers == 2
