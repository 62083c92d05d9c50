"""The race of the mixers from options to page: turns, refusals, what is kept, and charts whose names cover nothing."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fewstep import cli
from fewstep.core.recipe import parse
from fewstep.nn.mixers import MIXERS
from fewstep.report.lines import Line, lines
from fewstep.report.mixer_costs import BOTH_WAYS, SOFTMAX, WORKS, Cell, Mixing, Softmax, alternate, expected, prepared
from fewstep.report.mixer_quality import TASKS, asked
from fewstep.report.mixers import MixerRaceConfig, race_mixers

SVG = "{http://www.w3.org/2000/svg}"
SMALL: dict[str, Any] = {"length": 256, "width": 16, "heads": 2, "rounds": 2, "quality": False}


@pytest.fixture
def console(tmp_path: Path) -> Console:
    return Console(file=(tmp_path / "terminal.txt").open("w", encoding="utf-8"), width=160)


def layer(kind: str, width: int = 16, heads: int = 2, **fields: Any) -> Mixing:
    module = MIXERS[kind](**fields).build(width=width, heads=heads).eval()
    return Mixing(module, list(module.parameters()))


def told(console: Console) -> str:
    console.file.flush()
    return Path(console.file.name).read_text(encoding="utf-8")


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "race.json").read_text(encoding="utf-8"))


def measured(found: dict[str, Any], mixer: str) -> dict[tuple[str, int], list[float]]:
    return {
        (cell["work"], cell["length"]): cell["seconds"] for cell in found["costs"] if cell["mixer"] == mixer and "seconds" in cell
    }


def test_a_race_keeps_its_books(tmp_path: Path, console: Console) -> None:
    config = parse(MixerRaceConfig, {**SMALL, "mixers": ["linear", "attention", "linformer"]})
    race = race_mixers(config, tmp_path / "race", console=console)
    found = record(tmp_path / "race")
    assert found == json.loads(json.dumps(race.as_dict()))
    everything = {(work, length) for work in WORKS for length in (128, 256)}
    for name in (SOFTMAX, "linear", "attention"):
        assert set(measured(found, name)) == everything
    whole = {(work, length) for work in ("forward", "training") for length in (128, 256)}
    assert set(measured(found, "linformer")) == set(measured(found, BOTH_WAYS)) == whole
    for cell in found["costs"]:
        if "reason" in cell:
            assert cell["mixer"] == "linformer" and "choose a causal mixer to decode" in cell["reason"]
            continue
        assert len(cell["seconds"]) == len(cell["softmax_seconds"]) == config.rounds and min(cell["seconds"]) > 0
        tokens = 1 if cell["work"] == "decode" else cell["length"]
        assert cell["tokens_per_second"]["low"] == pytest.approx(tokens / max(cell["seconds"]))
        ratios = [theirs / mine for mine, theirs in zip(cell["seconds"], cell["softmax_seconds"], strict=True)]
        assert [cell["speed_over_softmax"][key] for key in ("low", "high")] == [min(ratios), max(ratios)]
        if cell["mixer"] in (SOFTMAX, BOTH_WAYS):
            assert set(ratios) == {1.0}
    states = {(row["mixer"], row["length"]): row["bytes"] for row in found["states"]}
    assert states[SOFTMAX, 256] == states["attention", 256] == 2 * 256 * 16 * 4 == 2 * states["attention", 128]
    assert states["linear", 256] == states["linear", 128]
    assert not any(mixer in ("linformer", BOTH_WAYS) for mixer, _ in states)
    assert "256 tokens, decode: 3 measured" in told(console)


def test_the_state_is_counted_as_it_is_after_so_many_tokens() -> None:
    for kind in MIXERS:
        raced = layer(kind)
        if raced.causal:
            with torch.inference_mode():
                raced.prefill(torch.randn(1, 40, 16), 0)
            state = raced._state
            assert state is not None and state.nbytes() == raced.state_bytes(40), kind


def test_softmax_attention_is_that_of_the_house_and_its_steps_are_its_whole() -> None:
    """What others are held against computes what it says."""
    softmax, house = Softmax(16, 2, causal=True), MIXERS["attention"]().build(width=16, heads=2)
    x = torch.randn(1, 6, 16)
    with torch.inference_mode():
        house.load_state_dict(softmax.state_dict())
        whole = softmax.whole(x)
        torch.testing.assert_close(whole, Mixing(house, []).whole(x), rtol=0, atol=1e-6)
        softmax.prefill(x[:, :4], 2)
        last = [softmax.step(x[:, i : i + 1]) for i in (4, 5)]
        torch.testing.assert_close(torch.cat(last, 1), whole[:, 4:], rtol=0, atol=1e-6)
        assert not torch.allclose(Softmax(16, 2, causal=False).whole(x), whole, atol=1e-3)


def test_everybody_has_a_turn_and_nobody_always_starts() -> None:
    diary: list[str] = []
    calls = {name: lambda name=name: diary.append(name) for name in "abc"}
    turns: list[str] = []
    seconds = alternate(calls, rounds=3, repeats=2, advance=turns.append)
    assert "".join(turns) == "abcbcacab"
    assert diary == [name for name in turns for _ in range(2)]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_step_is_taken_after_the_prompt_and_within_its_room() -> None:
    for kind in MIXERS:
        raced = layer(kind)
        if raced.causal:
            step = prepared("decode", raced, torch.randn(1, 12, 16), rounds=1)  # one step is taken
            for _ in range(8):
                step()
            state: Any = raced._state
            assert int(state.slots.lengths) == 12 + 1 + 8, kind


def test_time_is_expected_by_a_power_of_the_length() -> None:
    assert expected({}, 512) == 0
    assert expected({128: 1.0}, 512) == 4
    assert expected({128: 1.0, 256: 4.0}, 1024) == pytest.approx(64)
    assert expected({64: 9.0, 128: 1.0, 256: 2.0}, 512) == pytest.approx(4), "the last two tell"
    assert expected({128: 1.0, 256: 64.0}, 512) == pytest.approx(256), "at most a square"
    assert expected({128: 2.0, 256: 1.0}, 512) == 1, "no shorter for more"
    assert expected({1024: 7.0}, 512) == 0


def test_what_would_take_too_long_is_left_out_and_said_so(tmp_path: Path, console: Console) -> None:
    config = parse(MixerRaceConfig, {**SMALL, "mixers": ["linear"], "limit": 1e-9})
    found = race_mixers(config, tmp_path, console=console).as_dict()
    for name in (SOFTMAX, "linear"):
        assert {length for _, length in measured(found, name)} == {128}, "the shortest tells how long others take"
    reasons = {cell["reason"] for cell in found["costs"] if "reason" in cell}
    assert reasons and all(re.fullmatch(r"would take about \d+ s, more than limit=1e-09", reason) for reason in reasons)
    assert "would take about" in (tmp_path / "race.html").read_text(encoding="utf-8")


def test_a_sequence_beyond_a_fixed_length_is_refused_with_the_mixers_reason() -> None:
    raced = layer("linformer", length=64, rank=8)
    with pytest.raises(ValueError, match=r"length=64: a sequence has 128 tokens"):
        prepared("forward", raced, torch.randn(1, 128, 16), rounds=1)


def test_a_killed_race_goes_on_and_a_further_mixer_joins(tmp_path: Path, console: Console) -> None:
    config = {**SMALL, "length": 128}
    race_mixers(parse(MixerRaceConfig, {**config, "mixers": ["linear"]}), tmp_path, console=console)
    first = record(tmp_path)
    race_mixers(parse(MixerRaceConfig, {**config, "mixers": ["linear"]}), tmp_path, console=console)
    assert record(tmp_path) == first, "nothing is measured again"
    race_mixers(parse(MixerRaceConfig, {**config, "length": 256, "mixers": ["retnet"]}), tmp_path, console=console)
    joined = record(tmp_path)
    assert measured(joined, "linear") == measured(first, "linear")
    assert {length for _, length in measured(joined, "retnet")} == {128, 256}
    assert set(joined["setting"]["mixers"]) == {"linear", "retnet"}
    (tmp_path / "race.json").write_text("{", encoding="utf-8")  # cut short: no harm
    race_mixers(parse(MixerRaceConfig, {**config, "mixers": ["linear"], "seed": 1}), tmp_path, console=console)
    assert set(record(tmp_path)["setting"]["mixers"]) == {"linear"}
    race_mixers(parse(MixerRaceConfig, {**config, "mixers": ["retnet"]}), tmp_path, console=console)
    assert set(record(tmp_path)["setting"]["mixers"]) == {"retnet"}, "another seed is another race"


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path, console: Console) -> None:
    config = parse(MixerRaceConfig, {**SMALL, "mixers": ["linear", "gau", "linformer"], "quality": True, "steps": 1})
    race = race_mixers(config, tmp_path, console=console)
    page = (tmp_path / "race.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|<img|\bsrc=|\bhref=|url\(|@import", page)
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(charts) == len(WORKS) + 1 + len(TASKS)
    for chart in charts:
        assert chart[0].tag == f"{SVG}title" and chart[0].text and chart[1].tag == f"{SVG}desc" and chart[1].text
        written = [text.text for text in chart.iter(f"{SVG}text")]
        assert "linear" in written and "gau" in written
    assert "looks both ways and has no cached form" in page, "the reason stands on the page"
    answers = {(answer["mixer"], answer["task"]): answer for answer in race.as_dict()["quality"]}
    assert set(answers) == {(mixer, task) for mixer in config.mixers for task in TASKS}
    for (mixer, _), answer in answers.items():
        assert (answer["share"] is None) == (mixer == "linformer") == bool(answer["reason"])
    console.print(race.table())
    assert re.search(r"linear +\S+ \(\S+\).* \d\.\d\d +\d\.\d\d", told(console)), "a row of the table"


def test_names_beside_lines_do_not_cover_each_other(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for count in (1, 5, 23, 40):
        drawn = [
            Line(f"mixer {i}", [(2.0**x, float(v)) for x, v in enumerate(torch.rand(3, generator=rng) + 0.9)], "fixed")
            for i in range(count)
        ]
        chart = ElementTree.fromstring(lines("t", "d", drawn, "x", "y"))
        names = [text for text in chart.iter(f"{SVG}text") if (text.text or "").startswith("mixer")]
        heights = sorted(float(text.attrib["y"]) for text in names)
        assert len(heights) == count
        assert all(after - before >= 14.8 for before, after in pairwise(heights))
        _, _, width, height = map(float, chart.attrib["viewBox"].split())
        assert heights[0] > 10 and heights[-1] < height - 40, "beside the plot"
        assert all(float(text.attrib["x"]) + 6.9 * len(text.text or "") <= width for text in names)


def test_answers_follow_the_seed() -> None:
    config = MIXERS["linear"]()
    for task in TASKS:
        first, again, other = (asked("linear", config, task, 2, seed) for seed in (3, 3, 4))
        assert first.share == again.share
        assert first.parameters == other.parameters > 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--mixer", "mambo"], "mixers='mambo': not known; did you mean 'mamba'?"),
        (["--length", "1000"], "length=1000: must be 128 doubled some times; give 1024, 2048 or 4096"),
        (["--length", "64"], "length=64: must be 128 doubled some times"),
        (["--rounds", "0"], "rounds=0"),
        (["--heads", "3", "--width", "16", "--mixer", "linear"], "heads=3: must divide width=16"),
        (["--limit", "nan"], "limit="),
    ],
)
def test_bad_options_are_refused_in_one_line(option: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["race", "mixers", "--out", str(tmp_path / "out"), *option])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_cell_survives_its_record() -> None:
    for cell in (
        Cell("linear", "decode", 128, (2.0, 1.0, 4.0), (4.0, 4.0, 4.0)),
        Cell("linear", "decode", 128, reason="too long"),
    ):
        assert Cell.read(json.loads(json.dumps(cell.numbers()))) == cell
    speed = Cell("linear", "decode", 128, (2.0, 1.0, 4.0), (4.0, 4.0, 4.0)).speed_over_softmax
    assert speed is not None and (speed.low, speed.median, speed.high) == (1.0, 2.0, 4.0)
    assert Cell("linear", "decode", 128, (2.0,)).speed_over_softmax is None
