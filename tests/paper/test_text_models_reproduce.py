"""The claims that measure finished text models: how gaps, points and drafts are counted, and each claim on a model of no size."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from raced import files, small_model, source
from rich.console import Console
from torch import nn

from fewstep.core.event import Cost
from fewstep.core.recipe import resolve
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import decode
from fewstep.models.model import Model
from fewstep.nn import kernels
from fewstep.recipes import load_recipe
from fewstep.recipes.converting import masked
from fewstep.report.claims import CLAIMS, block_drafts, conversion, infilling
from fewstep.report.claims.at_hand import at_hand, encoded
from fewstep.report.claims.claim import Bench, Effort, Finding
from fewstep.report.claims.dflash import race_dflash
from fewstep.report.claims.parallel_decoding import best_of
from fewstep.report.contest import PLAIN, Lap, RaceConfig, Record
from fewstep.report.prompts import Prompt
from fewstep.training.data import DATA, BPEConfig

_BLOCK = {"kind": "block", "size": 4}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A model of random weights, held-out text, and an empty folder for models made from it."""
    kernels.available()  # compiled before the cache moves
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = small_model(files(tmp_path / "data"))
    model.save(tmp_path / "model")
    texts = [source(name * 4, 8) for name in "vwxyz"]
    prompts = [Prompt(f"{i}.py:1", text[:200], text[200:]) for i, text in enumerate(texts)]
    effort = Effort(
        model=str(tmp_path / "model"), heads=str(tmp_path / "heads"), count=len(texts), max_new_tokens=8, rounds=1, seconds=0.3
    )
    return Bench(model, None, prompts, effort, tmp_path, Console(quiet=True))


def converted(bench: Bench, name: str, objective: dict[str, Any]) -> Model:
    """The bench's model with a mask token, put among its heads as if it had been trained."""
    model = Model(masked(bench.model.network), bench.model.tokenizer, {**bench.model.recipe, "objective": objective})
    model.save(Path(bench.effort.heads) / name)
    return model


def measured(name: str, bench: Bench) -> dict[str, Finding]:
    found = list(CLAIMS[name].measure(bench))
    assert tuple(one.criterion for one in found) == CLAIMS[name].criteria
    return {one.criterion.name: one for one in found}


def test_a_gap_is_eight_characters_between_tokens(bench: Bench, seed: int) -> None:
    tokenizer = bench.model.tokenizer
    assert tokenizer is not None
    texts = [prompt.prompt + prompt.reference for prompt in bench.prompts]
    gaps = infilling.chosen(tokenizer, texts, seed)
    assert gaps == infilling.chosen(tokenizer, texts, seed) and len(gaps) == len(texts)
    for gap, text in zip(gaps, texts, strict=True):
        parts = gap.tokens[: gap.first], gap.tokens[gap.first : gap.end], gap.tokens[gap.end :]
        left, within, right = map(tokenizer.decode, parts)
        assert left + within + right == text and within == gap.text and len(within) == 8
        assert min(gap.first, len(gap.tokens) - gap.end) >= 32
        assert [i for i, token in enumerate(gap.row) if token is None] == list(range(gap.first, gap.end))


def test_a_gap_never_begins_or_ends_within_a_character(seed: int) -> None:
    tokenizer = BPEConfig(vocab=260).build(["abc"])  # bytes: every letter below is two tokens
    (gap,) = infilling.chosen(tokenizer, ["äöü" * 40], seed)
    assert gap.end - gap.first == 16 and len(gap.text) == 8 and "\ufffd" not in gap.text
    assert tokenizer.decode(gap.tokens[gap.first : gap.end]) == gap.text
    with pytest.raises(ValueError, match=r"prompts: none has a gap") as refusal:
        infilling.chosen(tokenizer, ["too short"], seed)
    assert "\n" not in str(refusal.value)


def test_characters_are_counted_place_by_place() -> None:
    assert infilling.characters(["abcd", "ab", "abcdef"], ["abcd", "abcd", "xbcd"]) == pytest.approx(9 / 12)


def test_infilling_counts_what_either_model_fills(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    converted(bench, "masked", {"kind": "masked"})

    def right(model: Model, gaps: Any) -> list[list[int]]:
        return [gap.tokens[gap.first : gap.end] for gap in gaps]

    def wrong(model: Model, gaps: Any) -> list[list[int]]:
        return [tokens if i < 2 else tokens[::-1] + tokens for i, tokens in enumerate(right(model, gaps))]

    monkeypatch.setattr(infilling, "filled", right)
    monkeypatch.setattr(infilling, "went_on", wrong)
    found = measured("infilling", bench)["exact"]
    assert found.value == pytest.approx(5 / 2) and found.verdict == "reproduced"
    assert found.numbers["only masked"] == 3 and found.numbers["only autoregressive"] == 0
    monkeypatch.setattr(infilling, "went_on", lambda model, gaps: [[] for _ in gaps])
    assert measured("infilling", bench)["exact"].verdict == "not measured"


def test_both_models_fill_whole_gaps(bench: Bench, seed: int) -> None:
    model = converted(bench, "masked", {"kind": "masked"})
    assert model.tokenizer is not None
    gaps = infilling.chosen(model.tokenizer, [prompt.prompt + prompt.reference for prompt in bench.prompts], seed)
    for tokens in (infilling.filled(model, gaps), infilling.went_on(bench.model, gaps)):
        assert [len(one) for one in tokens] == [gap.end - gap.first for gap in gaps]
    first = gaps[0]
    logits = bench.model.logits(torch.tensor([first.tokens[: first.first]]))[0, -1]
    assert float(logits[infilling.went_on(bench.model, gaps)[0][0]]) == pytest.approx(float(logits.max()), abs=1e-3)


def test_only_points_that_keep_the_entropy_count() -> None:
    curve = [
        {"tokens_per_call": 1.2, "entropy_ratio": 1.0},
        {"tokens_per_call": 2.1, "entropy_ratio": 0.8},
        {"tokens_per_call": 3.5, "entropy_ratio": 0.79},
    ]
    assert best_of(curve) == curve[1] and best_of(curve[2:]) is None


def test_the_claim_of_parallel_decoding(bench: Bench) -> None:
    nn.init.constant_(cast(torch.Tensor, bench.model.network.norm.weight), 0.05)  # flat laws: no text repeats one token
    converted(bench, "block", _BLOCK)
    findings = measured("parallel-decoding", bench)
    assert set(findings) == {"tokens-per-call", "greedy-tokens-per-call"}
    for found in findings.values():
        curve = found.numbers["curve"]
        assert [point["threshold"] for point in curve] == [0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
        assert all(1 <= point["tokens_per_call"] <= 4 and point["entropy_ratio"] > 0 for point in curve)
        assert all({"judge", "entropy", "distinct"} <= point.keys() for point in (*curve, found.numbers["autoregressive"]))
        assert found.value in {0.0, *(point["tokens_per_call"] for point in curve)}
    sampled, greedy = (findings[name].numbers["autoregressive"] for name in ("tokens-per-call", "greedy-tokens-per-call"))
    assert sampled["entropy"] > greedy["entropy"]


def record(name: str, tokens_per_call: int, seconds: float, texts: list[list[int]]) -> Record:
    cost = Cost(calls=10, tokens=10 * tokens_per_call)
    return Record(name, "fewstep", Lap(texts, cost), (seconds,), (0.0,))


def test_what_a_race_says_of_block_drafts() -> None:
    texts = [[1, 2], [3, 4]]
    plain = record(PLAIN, 1, 2.0, texts)
    names = [f"{name} {way}" for name in ("block", "block-quarter") for way in ("chain", "tree", "in steps")]
    race = {one: record(one, 1 + i % 3, 2.0 / (1 + i), texts) for i, one in enumerate(names)}
    race["block tree"] = replace(race["block tree"], lap=Lap([[1, 2], [3, 5]], race["block tree"].lap.cost))
    told = {"block": "as large", "block-quarter": "small"}
    found = {one.criterion.name: one for one in block_drafts.findings({PLAIN: plain, **race}, told)}
    assert found["tokens-per-call"].value == found["quarter-tokens-per-call"].value == 3
    assert found["quarter-speed"].value == pytest.approx(6) and "block-quarter in steps" in found["quarter-speed"].how
    assert found["identical"].value == 0.5 and "block tree" in found["identical"].how


def test_the_claim_of_block_drafts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("block", "block-quarter"):
        converted(bench, name, _BLOCK)
    found = measured("block-drafts", replace(bench, effort=bench.effort.model_copy(update={"count": 2})))
    assert found["identical"].value == 1.0
    assert found["over-dflash"].verdict == "not measured" and "fewstep[peers]" in found["over-dflash"].how
    race = found["tokens-per-call"].numbers
    ways = [f"{name} {way}" for name in ("block", "block-quarter") for way in ("chain", "tree", "in steps")]
    assert set(race) == {PLAIN, "ngram", "mtp chain", "mtp tree 2-1-1", "mtp tree 3-2-1", *ways}
    assert all(1 <= race[way]["tokens_per_call"] <= 4 and race[way]["draft_calls"] > 0 for way in ways)
    assert race["block tree"]["draft_calls"] <= race["block tree"]["calls"], "one evaluation a draft"


def test_block_drafts_beside_what_raced_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """DFlash runs once, the others for every round: its tokens are compared, never its seconds."""
    for name in ("block", "block-quarter"):
        converted(bench, name, _BLOCK)

    def alone(bench: Bench, ids: Any, config: RaceConfig) -> Record:
        return record("dflash", 2, 1.0, [[0] * 8 for _ in ids])

    monkeypatch.setattr(block_drafts, "race_dflash", alone)
    effort = bench.effort.model_copy(update={"count": 2, "rounds": 2})
    found = measured("block-drafts", replace(bench, effort=effort))
    race = found["tokens-per-call"].numbers
    best = max(race[f"block {way}"]["tokens_per_call"] for way in ("chain", "tree", "in steps"))
    assert found["over-dflash"].value == pytest.approx(best / 2)
    assert found["over-dflash"].numbers["tokens_per_call"] == 2


@pytest.mark.claims
def test_dflash_learns_and_changes_no_token(bench: Bench) -> None:
    """transformers' loop with a drafter trained for a moment: the text of plain decoding."""
    pytest.importorskip("transformers.models.muse_glimmer_assistant")
    short = replace(bench, effort=bench.effort.model_copy(update={"count": 2, "seconds": 2.0}))
    ids, config = encoded(short), RaceConfig(max_new_tokens=8, rounds=1)
    found = race_dflash(short, ids, config)
    plain = decode(
        bench.model.network, SilentConfig().build(bench.model.network, lambda path: bench.model.network), ids, config.settings
    )
    assert found.lap.tokens == [row.tokens for row in plain]
    assert found.lap.cost.draft_calls > 0 and (Path(short.effort.heads) / "dflash").is_dir()
    assert race_dflash(replace(short, scratch=bench.scratch / "other"), ids, config).lap.tokens == found.lap.tokens


def test_a_conversion_is_trained_once_and_its_tokens_are_known(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_TOKENS": 1, "_LENGTH": 32, "_DRAWS": 1, "_REPEATS": 2}.items():
        monkeypatch.setattr(conversion, name, value)
    found = measured("conversion", bench)["bits"]
    assert found.value is not None and math.isfinite(found.value) and found.numbers["tokens"] == 8 * 384
    assert found.numbers["block, error"] > 0
    assert {path.name for path in Path(bench.effort.heads).iterdir()} == {"convert10"}
    again = at_hand(bench, "convert10", "code-block-from-nano", tokens=1)
    assert again.tokens == found.numbers["tokens"] and again.block == 4


def test_more_or_unknown_training_is_no_conversion_by_a_tenth(bench: Bench) -> None:
    converted(bench, "convert10", _BLOCK)
    unknown = measured("conversion", bench)["bits"]
    assert unknown.verdict == "not measured" and "training unknown" in unknown.how


def test_what_a_model_wrote_is_learnt_by_a_block_model(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench's model writes, on pieces of its own data, and is what the other begins as."""
    seen: dict[str, Any] = {}

    def stopped(recipe: str, fields: dict[str, Any], **_: Any) -> Any:
        seen.update(fields)
        raise ValueError("far enough")

    monkeypatch.setattr("fewstep.report.claims.at_hand.train", stopped)
    with pytest.raises(ValueError, match="far enough"):
        at_hand(bench, "block", "code-block-distilled")
    loaded = load_recipe("code-block-distilled", seen)
    assert loaded["data"].model_dump()["writer"] == bench.effort.model == loaded["model"].model_dump()["start"]
    assert cast(Any, loaded["data"]).prompts == resolve(cast(Any, bench.model.recipe["data"]), DATA, "data")


def test_a_model_of_other_tokens_is_refused(bench: Bench) -> None:
    other = Model(masked(bench.model.network), BPEConfig(vocab=300).build(["another text " * 9]), bench.model.recipe)
    other.save(Path(bench.effort.heads) / "block")
    with pytest.raises(ValueError, match=r"heads=.*block has another tokenizer") as refusal:
        at_hand(bench, "block", "code-block-distilled")
    assert "\n" not in str(refusal.value)
    converted(bench, "whole", {"kind": "masked"})
    with pytest.raises(ValueError, match=r"objective='masked'; give one trained by block"):
        _ = at_hand(bench, "whole", "code-masked-from-nano").block


def test_the_recipes_are_what_the_claims_say() -> None:
    nano, draft = (load_recipe(name)["model"] for name in ("code-nano", "code-block-draft"))
    small, large = (sum(p.numel() for p in config.build().parameters()) for config in (draft, nano))  # type: ignore[attr-defined]
    assert 0.2 <= small / large <= 0.3
    assert load_recipe("code-masked-from-nano")["objective"].kind == "masked"
    assert load_recipe("code-block-distilled")["data"].model_dump()["temperature"] == 0.5
    assert load_recipe("code-block-draft")["objective"].model_dump()["size"] == 8
