"""Speculation on recurrent models: which model is which, what their states weigh, and every criterion found on tiny ones."""

from pathlib import Path
from typing import Any

import pytest
from raced import files, prompts, small_model
from rich.console import Console

from fewstep.core.recipe import parse
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.models.model import Model
from fewstep.recipes import load_recipe
from fewstep.report.claims import CLAIMS
from fewstep.report.claims.claim import Bench, Effort
from fewstep.report.claims.recurrent_speculation import SUBJECTS, at_hand, name_of, state_bytes


def network(*mixers: Any, depth: int = 2) -> Decoder:
    fields = {"vocab": 300, "width": 32, "depth": depth, "query_heads": 2, "hidden": 48, "init_std": 0.3, "max_positions": 512}
    return parse(DecoderConfig, {**fields, "mixers": mixers, "heads": [{"kind": "mtp_sequential", "depth": 3}]}).build().eval()


def bench(model: Model, folder: Path, name: str = "model") -> Bench:
    effort = Effort(model=str(folder / name), count=2, max_new_tokens=12, rounds=1)
    return Bench(model, None, prompts(2), effort, folder / "scratch", Console(quiet=True))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return files(tmp_path / "data")


def test_a_model_is_known_by_its_mixers() -> None:
    assert name_of(network("mamba2")) == "mamba2"
    assert name_of(network("linear")) == "linear"
    assert name_of(network("mamba2", "attention")) == "hybrid"
    assert name_of(network("attention")) == "attention"
    assert name_of(network("mamba2", "linear")) == ""


def test_the_shipped_recipes_are_the_subjects() -> None:
    for subject in SUBJECTS:
        assert name_of(load_recipe(subject.recipe)["model"].build()) == subject.name  # type: ignore[attr-defined]


def test_a_pending_tree_adds_inputs_and_no_states() -> None:
    """Linear attention keeps, per head of width E, E (E + 1) numbers, and per pending token q, k, v and the turned q and k."""
    heads, width, size = 2, 32, 16
    one = 4 * heads * size * (size + 1)
    pending, apart = state_bytes(network("linear", depth=3), 7)
    assert apart == 3 * 7 * one
    assert pending == 3 * (one + 7 * 4 * 5 * width)


def test_a_cache_of_keys_does_not_count() -> None:
    pure, hybrid = network("linear", depth=1), network("linear", "attention")
    assert state_bytes(hybrid, 16) == state_bytes(pure, 16)


def test_every_criterion_is_found(data: Path, tmp_path: Path) -> None:
    """The bench's own model, one beside it, and none at all."""
    tokenizer, recipe = small_model(data).tokenizer, small_model(data).recipe
    Model(network("linear"), tokenizer, recipe).save(tmp_path / "code-linear")
    setting = bench(Model(network("mamba2", "attention"), tokenizer, recipe), tmp_path)
    claim = CLAIMS["recurrent-speculation"]
    findings = list(claim.measure(setting))
    assert tuple(finding.criterion for finding in findings) == claim.criteria
    values = {finding.criterion.name: finding.value for finding in findings}
    assert {name for name, value in values.items() if value is None} == {"mamba2-speed", "mamba2-identical", "mamba2-memory"}
    assert values["hybrid-identical"] == values["linear-identical"] == 1.0
    missing = next(finding for finding in findings if finding.value is None)
    assert "fewstep train code-mamba2" in missing.how and missing.verdict == "not measured"


def test_a_model_of_another_kind_is_not_taken_for_it(data: Path, tmp_path: Path) -> None:
    other = small_model(data)
    other.save(tmp_path / "code-mamba2")
    assert at_hand(SUBJECTS[0], bench(other, tmp_path)) is None
