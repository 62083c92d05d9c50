"""Spec-Bench's table: what a grid says of each claim, every drafter in it on a tiny model, and heads found or trained."""

import json
from pathlib import Path
from typing import Any

import pytest
from raced import files, prompts, source
from rich.console import Console

from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.drafters.block_diffusion import BlockDiffusionConfig
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model
from fewstep.nn import kernels
from fewstep.nn.eagle import Eagle3HeadsConfig, EagleHeadsConfig
from fewstep.nn.heads import SequentialHeadsConfig
from fewstep.nn.medusa import HydraHeadsConfig, MedusaHeadsConfig
from fewstep.report.claims import CLAIMS
from fewstep.report.claims.claim import Bench, Effort, Finding
from fewstep.report.claims.spec_bench import METHODS, contestants, findings, in_order
from fewstep.report.claims.tuning import heads_at_hand
from fewstep.report.contest import PLAIN
from fewstep.report.grid import Grid
from fewstep.report.systems import ROOMS
from fewstep.training.data.bpe import BPEConfig

CLAIM = CLAIMS["spec-bench"]


def whole_model(data: Path | None = None) -> Model:
    """Random weights and random heads of every kind, three blocks deep, so that there is something to tap."""
    heads = (SequentialHeadsConfig(depth=3), MedusaHeadsConfig(), HydraHeadsConfig(), EagleHeadsConfig(), Eagle3HeadsConfig())
    config = DecoderConfig(vocab=300, width=32, depth=3, query_heads=2, hidden=48, heads=heads, init_std=0.3, max_positions=512)
    recipe = {} if data is None else {"data": {"kind": "text", "paths": [str(data)], "held_out": 0.2}}
    return Model(config.build(), BPEConfig(vocab=300).build([source("train", 40)]), recipe)


def row(tokens: float, speed: float, identical: int = 4) -> dict[str, Any]:
    spread = {"median": speed, "low": speed, "high": speed}
    return {
        "tokens_per_call": tokens,
        "speed_over_plain": spread,
        "seconds": [1 / speed],
        "identical": identical,
        "prefill_calls": 4,
    }


def planted(**other: dict[str, Any]) -> Grid:
    """A grid in which every method does exactly what is claimed of it."""
    papers = {name: row(said.threshold, fast.threshold) for name, said, fast in METHODS}
    cell = {PLAIN: row(1, 1), **papers, **other}
    return Grid({(0.0, 1): cell, (1.0, 1): cell, (0.0, 4): dict(cell)})


def verdicts(grid: Grid) -> dict[str, Finding]:
    found = list(findings(grid, ""))
    assert tuple(one.criterion for one in found) == CLAIM.criteria
    return {one.criterion.name: one for one in found}


def test_the_papers_own_numbers_keep_their_claims() -> None:
    found = verdicts(planted())
    missed = {name for name, one in found.items() if one.verdict != "reproduced"}
    assert missed == {"eagle3-over-eagle2", "eagle2-over-eagle", "hydra-over-medusa"}, "Spec-Bench found less than the papers say"
    assert found["eagle3-over-eagle2"].value == pytest.approx(3.02 / 2.46)


def test_what_falls_short_is_not_reproduced() -> None:
    found = verdicts(planted(medusa=row(2.38, 1.79), hydra=row(1.6, 3.0)))
    assert found["medusa-tokens"].verdict == found["medusa-speed"].verdict == found["hydra-tokens"].verdict == "not reproduced"
    assert found["hydra-speed"].verdict == found["hydra-over-medusa"].verdict == "reproduced"
    assert found["order-by-tokens"].value == pytest.approx(8 / 10), "hydra below medusa and prompt lookup"
    assert found["order-by-speed"].value == pytest.approx(9 / 10), "hydra above eagle2"


def test_one_prompt_that_differs_in_one_race_is_told() -> None:
    grid = planted()
    cell = {**grid.cells[0.0, 4], "eagle": row(3.64, 2.16, identical=3)}
    found = verdicts(Grid({**grid.cells, (0.0, 4): cell}))["identical"]
    assert found.value == 3 / 4 and "eagle, batch 4" in found.how


def test_without_a_corpus_its_method_is_not_measured() -> None:
    grid = planted()
    cells = {key: {name: one for name, one in cell.items() if name != "retrieval corpus"} for key, cell in grid.cells.items()}
    found = verdicts(Grid(cells))
    for name in ("retrieval-corpus-tokens", "retrieval-corpus-speed"):
        assert found[name].verdict == "not measured" and "fewstep corpus" in found[name].how


def test_every_claim_that_a_technique_names_can_be_measured() -> None:
    named = {claim for registry in ROOMS.values() for config in registry.values() for claim in config.claims}
    assert named <= set(CLAIMS)


def test_order_is_counted_by_pairs() -> None:
    assert in_order([3, 2, 1]) == 1 and in_order([1, 2, 3]) == 0 and in_order([2, 2, 1]) == pytest.approx(2 / 3)


def test_every_drafter_races_and_every_criterion_is_found(tmp_path: Path) -> None:
    model = whole_model()
    model.save(tmp_path / "draft")
    effort = Effort(draft=str(tmp_path / "draft"), count=2, max_new_tokens=4, rounds=1)
    bench = Bench(model, None, prompts(2), effort, tmp_path / "scratch", Console(quiet=True), tmp_path / "kept")
    found = list(CLAIM.measure(bench))
    assert tuple(one.criterion for one in found) == CLAIM.criteria
    by_name = {one.criterion.name: one for one in found}
    assert by_name["identical"].value == 1.0
    assert by_name["retrieval-corpus-speed"].value is None and by_name["eagle3-tokens"].value >= 1
    cells = by_name["order-by-tokens"].numbers
    assert cells == json.loads(json.dumps(cells)) and len(cells) == 2 * 3
    drafting = {config.kind for config in contestants(bench).values()}
    assert drafting == set(DRAFTERS) - {BlockDiffusionConfig.kind}, "every drafter takes part that Spec-Bench knows"
    assert len(list((tmp_path / "kept").glob("*.json"))) == 2 * 3


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A model that may be trained further, and an empty folder for its heads."""
    kernels.available()  # compiled before the cache moves
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = whole_model(files(tmp_path / "data"))
    model.save(tmp_path / "model")
    effort = Effort(model=str(tmp_path / "model"), heads=str(tmp_path / "heads"), seconds=0.3)
    return Bench(model, None, (), effort, tmp_path / "scratch", Console(quiet=True))


def test_heads_are_found_or_trained_or_waited_for(bench: Bench, tmp_path: Path) -> None:
    assert heads_at_hand(bench, "eagle3") == "", "the model's own"
    del bench.model.network.extra["medusa"], bench.model.network.extra["hydra"]
    path = heads_at_hand(bench, "medusa")
    assert path == str(tmp_path / "heads" / "medusa")
    written = (tmp_path / "heads" / "medusa" / "heads.safetensors").stat().st_mtime_ns
    assert heads_at_hand(bench, "medusa") == path
    assert (tmp_path / "heads" / "medusa" / "heads.safetensors").stat().st_mtime_ns == written, "not trained again"
    (tmp_path / "heads" / "hydra").mkdir()
    with pytest.raises(ValueError, match=r"heads=.*hydra holds a run that has not ended; wait for it") as refusal:
        heads_at_hand(bench, "hydra")
    assert "\n" not in str(refusal.value)


def test_a_draft_model_and_a_corpus_are_kept_among_the_heads(bench: Bench, tmp_path: Path) -> None:
    corpus, draft = tmp_path / "heads" / "retrieval", tmp_path / "heads" / "draft_model"
    assert "retrieval corpus" not in contestants(bench)
    written = (draft / "weights.safetensors").stat().st_mtime_ns
    corpus.mkdir()
    found = {name: config.model_dump().get("path") for name, config in contestants(bench).items()}
    assert found["retrieval corpus"] == str(corpus) and found["draft model"] == str(draft)
    assert (draft / "weights.safetensors").stat().st_mtime_ns == written, "not trained again"
