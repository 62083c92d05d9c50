"""The race from prompts to page: everybody under the same conditions, every number written down, nothing fetched."""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from raced import files, near_draft, prompts, small_model
from rich.console import Console

from fewstep.core.event import Cost
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.laws import SamplingConfig
from fewstep.nn.packed import pack
from fewstep.report.contest import PLAIN, Contestant, Lap, Ours, RaceConfig, Record, compete, entrants
from fewstep.report.costs import draft_cost, machine_costs, weight_bytes
from fewstep.report.demo import demonstrate
from fewstep.report.peers import transformers_peers
from fewstep.report.prompts import Prompt, held_out_prompts, prompts_for, read_prompts, write_held_out
from fewstep.report.race import Race, quality, race_decode, race_decode_model
from fewstep.report.svg import Mark, scatter
from fewstep.training.data import TextConfig

SHORT = RaceConfig(count=3, max_new_tokens=8, rounds=2, batch=2, peers=False)


@pytest.fixture
def console(tmp_path: Path) -> Console:
    return Console(file=(tmp_path / "terminal.txt").open("w", encoding="utf-8"), width=160)


def test_a_race_keeps_its_books(tmp_path: Path, console: Console) -> None:
    race = race_decode(small_model(), prompts(4), SHORT, tmp_path / "race", name="tiny", console=console)
    record = json.loads((tmp_path / "race" / "race.json").read_text(encoding="utf-8"))
    assert record == race.as_dict()
    rows = {row["name"]: row for row in record["entries"]}
    assert list(rows) == [PLAIN, "ngram", "retrieval", "mtp chain", "mtp tree 2-1-1", "mtp tree 3-2-1"]
    for name, row in rows.items():
        assert row["tokens"] == 3 * 8
        assert row["prefill_calls"] == 3
        assert len(row["seconds"]) == SHORT.rounds and min(row["seconds"]) > 0
        emitted = sum(count * (accepted + 1) for accepted, count in enumerate(row["accepted"]))
        assert emitted == row["tokens"] - row["prefill_calls"], "every call emits its accepted drafts and one token"
        assert row["tokens_per_call"] * row["calls_per_token"] == pytest.approx(1)
        assert row["draft_calls_per_call"] == (3 if name.startswith("mtp") else 0)
        assert row["identical"] == 3
    assert rows[PLAIN]["tokens_per_call"] == 1 and rows[PLAIN]["calls"] == 3 * 7
    assert len({round(row["quality"]["mean"], 4) for row in rows.values()}) == 1, "lossless"


def test_drafters_run_under_another_verification_too(tmp_path: Path, console: Console) -> None:
    for kind, label in (("block", "block"), ("typical", "typical (lossy)")):
        config = RaceConfig(**{**dict(SHORT), "drafters": ("mtp chain",), "temperature": 1.0, "verification": kind})
        race = race_decode(small_model(), prompts(), config, tmp_path / kind, console=console)
        names = [row["name"] for row in race.as_dict()["entries"]]
        assert names == [PLAIN, "mtp chain", f"mtp chain, {label}"]
        page = (tmp_path / kind / "race.html").read_text(encoding="utf-8")
        assert ("keep another law" in page) == (kind == "typical") == ("(lossy)" in page)


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path, console: Console) -> None:
    hostile = "<script>alert(1)</script>"
    config = SHORT.model_copy(update={"temperature": 1.0})
    race = race_decode(small_model(), prompts(), config, tmp_path, name=hostile, console=console)
    assert all(row["identical"] is None and row["tokens"] == 3 * 8 for row in race.as_dict()["entries"])
    page = (tmp_path / "race.html").read_text(encoding="utf-8")
    assert hostile not in page and "&lt;script&gt;" in page
    assert not re.search(r"<script|<link|<img|\bsrc=|\bhref=|url\(|@import", page)
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(charts) == 4
    for chart in charts:
        title, description = chart[0], chart[1]
        assert title.tag.endswith("title") and title.text and description.tag.endswith("desc") and description.text
    assert page.count("mtp tree 3-2-1") >= 4, "in each chart and in the table"
    alone = ElementTree.fromstring((tmp_path / "quality.svg").read_text(encoding="utf-8"))
    assert alone[0].tag.endswith("style") and "--ours" in (alone[0].text or "")


def test_the_command_takes_a_file_of_prompts(tmp_path: Path, console: Console) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"name": "mine", "prompt": "def f(x):\n", "reference": ""}) + "\n\n", encoding="utf-8")
    config = SHORT.model_copy(update={"drafters": ("ngram",)})
    race = race_decode_model(small_model(), config, tmp_path / "out", path, console=console)
    assert isinstance(race, Race) and [entry.record.name for entry in race.entries] == [PLAIN, "ngram"]
    assert (tmp_path / "out" / "race.html").is_file()


def test_drafters_are_chosen_by_entrant_by_kind_and_with_a_path(tmp_path: Path) -> None:
    network = small_model().network
    assert list(entrants(network, ("mtp",))) == [PLAIN, "mtp chain", "mtp tree 2-1-1", "mtp tree 3-2-1"]
    assert list(entrants(network, ("mtp tree 2-1-1", "ngram"))) == [PLAIN, "mtp tree 2-1-1", "ngram"]
    assert entrants(network, (f"draft_model={tmp_path}",))["draft model"].model_dump()["path"] == str(tmp_path)
    assert list(entrants(small_model(heads=False).network)) == [PLAIN, "ngram", "retrieval"]
    with pytest.raises(ValueError, match=r"drafters='ngarm': .*did you mean 'ngram'"):
        entrants(network, ("ngarm",))


class Runner:
    """A contestant that notes when it ran."""

    library = "fewstep"

    def __init__(self, name: str, diary: list[str]) -> None:
        self.name, self.diary = name, diary

    def run(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Lap:
        assert len(prompts) == len(seeds)
        self.diary.append(self.name)
        return Lap([[len(p), s] for p, s in zip(prompts, seeds, strict=True)], Cost(calls=len(prompts), tokens=2 * len(prompts)))


def test_who_starts_changes_and_all_run_equally_often() -> None:
    diary: list[str] = []
    runners: list[Contestant] = [Runner(name, diary) for name in "abc"]
    records = compete(runners, [[1], [1, 2], [3], [4]], RaceConfig(rounds=3, batch=2, seed=7))
    assert diary[:3] == ["a", "b", "c"], "a batch each to warm up"
    turns = ["".join(diary[i : i + 3]) for i in range(3, len(diary), 3)]
    assert len(turns) == 3 * 2 and {"".join(sorted(turn)) for turn in turns} == {"abc"}
    assert [sum(turn[0] == name for turn in turns) for name in "abc"] == [2, 2, 2]
    assert all(record.lap.tokens == [[1, 7], [2, 8], [1, 9], [1, 10]] for record in records), "the first round, in order"


def test_speeds_are_compared_round_by_round() -> None:
    lap = Lap([[1, 2], [3, 4]], Cost(tokens=40))
    plain, fast = (Record("x", "fewstep", lap, seconds, (1.0, 1.0, 1.0)) for seconds in ((4.0, 9.0, 6.0), (2.0, 3.0, 4.0)))
    assert fast.tokens_per_second.median == 40 / 3 and fast.tokens_per_second.high == 20
    speed = fast.speed_over(plain)
    assert (speed.low, speed.median, speed.high) == (1.5, 2.0, 3.0)
    assert fast.decoding_speed_over(plain).median == 3.0
    assert fast.identical_to(plain) == 2


def test_quality_is_the_targets_own_probability() -> None:
    model, prompt, output = small_model(), [5, 6, 7], [8, 9]
    law = model.logits(torch.tensor([prompt + output]))[0].double().log_softmax(-1)
    expected = (law[2, 8] + law[3, 9]) / 2 / torch.tensor(2.0).log()
    found = quality(model, [prompt, prompt], [output, output])
    assert found.mean == pytest.approx(float(expected), abs=1e-4) and found.error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_bytes_are_those_of_the_modules_that_ran(packed: bool) -> None:
    network = small_model().network
    if packed:
        pack(network)
    machine = machine_costs(network, [1, 2, 3], sizes=(1, 4))
    head = network.head.weight.nbytes
    assert machine.weight_bytes == weight_bytes(network.blocks) + weight_bytes(network.norm) + head
    assert set(machine.verification) == {1, 4} and machine.verification[1] == 1.0
    drafter = MultiTokenConfig(branching=(1, 1)).build(network, lambda path: network)
    cost = draft_cost(network, drafter, [[1, 2, 3]], 1.0, SamplingConfig())
    assert cost.bytes == sum(weight_bytes(stage) for stage in list(network.extra["mtp"].stages)[:2]) + 2 * head
    assert cost.byte_ratio == cost.bytes / machine.weight_bytes


def test_held_out_prompts_are_lines_of_held_out_files_used_once(tmp_path: Path, seed: int) -> None:
    model = small_model(files(tmp_path / "data"))
    tokenizer = model.tokenizer
    assert tokenizer is not None
    corpus = TextConfig(paths=(tmp_path / "data",), held_out=0.2).build()
    texts = {document.name: document.text for document in corpus.documents("validation")}
    found = held_out_prompts(corpus, tokenizer, count=9, seed=seed)
    assert found == held_out_prompts(corpus, tokenizer, count=9, seed=seed) and len(found) == 9
    assert {_place(prompt)[0] for prompt in found} == set(texts), "one of each file before two of any"
    for prompt in found:
        name, line = _place(prompt)
        start = sum(len(text) + 1 for text in texts[name].split("\n")[: line - 1])
        assert texts[name][start:].startswith(prompt.prompt + prompt.reference)
        assert prompt.prompt.endswith("\n") and 80 <= len(tokenizer.encode(prompt.prompt)) <= 160
    spans = sorted((*_place(prompt), (prompt.prompt + prompt.reference).count("\n")) for prompt in found)
    for (file, line, length), (other, next_line, _) in pairwise(spans):
        assert file != other or line + length <= next_line, "no text twice"


def _place(prompt: Prompt) -> tuple[str, int]:
    name, _, line = prompt.name.rpartition(":")
    return name, int(line)


def test_prompts_are_those_beside_the_model_else_its_recipes(tmp_path: Path) -> None:
    model = small_model(files(tmp_path / "data"))
    assert model.tokenizer is not None
    cut = prompts_for(tmp_path, model, count=5)
    assert len(cut) == 5
    write_held_out(tmp_path, TextConfig(paths=(tmp_path / "data",), held_out=0.2), model.tokenizer, count=5)
    assert prompts_for(tmp_path, small_model(), count=5) == cut
    hashes = json.loads((tmp_path / "files.json").read_text(encoding="utf-8"))
    assert len(hashes["train"]) + len(hashes["validation"]) == 12 and not hashes["train"].keys() & hashes["validation"].keys()
    with pytest.raises(ValueError, match=r"prompts: no prompts.jsonl beside 'nowhere'"):
        prompts_for("nowhere", small_model())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "empty"),
        ('{"name": "a", "prompt": "b"}\n', "prompts.jsonl:1': not a JSON object with name, prompt, reference"),
        ('{"name": "a", "prompt": "b", "reference": ""}\n[1]\n', "prompts.jsonl:2'"),
    ],
)
def test_bad_prompts_are_refused_in_one_line(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


def test_names_in_a_chart_do_not_cover_each_other() -> None:
    marks = [Mark(f"contestant {i}", 0.5 + 0.001 * i, -1.1, -0.9, "ours", -1.0) for i in range(8)]
    chart = ElementTree.fromstring(scatter("t", "d", marks, "x", "y", 1.0))
    names = [text for text in chart.iter("{http://www.w3.org/2000/svg}text") if (text.text or "").startswith("contestant")]
    places = [(float(text.attrib["x"]), float(text.attrib["y"])) for text in names]
    width = 6.9 * len("contestant 0")
    assert len(places) == 8
    for i, (x, y) in enumerate(places):
        assert all(abs(x - other_x) >= width - 0.2 or abs(y - other_y) >= 15.8 for other_x, other_y in places[i + 1 :])


def test_the_demo_proves_and_races(tmp_path: Path, console: Console) -> None:
    race = SHORT.model_copy(update={"drafters": ("ngram",)})
    assert demonstrate(small_model(), prompts(2), tmp_path / "demo", "tiny", console, race)
    console.file.flush()
    told = (tmp_path / "terminal.txt").read_text(encoding="utf-8")
    assert told.count("identical 64 of 64 tokens equal") == 2
    assert "tokens per call" in told and str((tmp_path / "demo" / "race.html").resolve()) in told
    assert "\x1b" not in told, "plain text where there is no terminal"


@pytest.mark.claims
def test_transformers_continues_with_the_same_tokens(tmp_path: Path) -> None:
    model = small_model()
    assert model.tokenizer is not None
    ids = [model.tokenizer.encode(prompt.prompt) for prompt in prompts()]
    config = RaceConfig(max_new_tokens=16, rounds=1)
    plain = Ours(PLAIN, model.network, entrants(model.network)[PLAIN].build(model.network, lambda path: model.network), config)
    peers = transformers_peers(model, near_draft(model), config, tmp_path)
    records = compete([plain, *peers], ids, config)
    assert [record.name for record in records] == [PLAIN, "generate", "prompt lookup", "assisted"]
    for record in records[1:]:
        assert record.lap.tokens == records[0].lap.tokens
    assert records[1].lap.cost.calls == records[0].lap.cost.calls == 3 * 15
    assert records[3].lap.cost.calls < 3 * 15 and records[3].lap.cost.draft_calls > 0


def test_a_model_without_a_tokenizer_is_refused(console: Console) -> None:
    model = small_model()
    model.tokenizer = None
    with pytest.raises(ValueError, match="model='model': has no tokenizer"):
        race_decode(model, [Prompt("a", "b", "")], SHORT, console=console)
