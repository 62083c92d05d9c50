"""The reproduction of multi-token prediction: how acceptance is counted, and every criterion met or missed on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from raced import files, prompts, small_model
from rich.console import Console

from fewstep.decode.drafters.mtp import MultiTokenConfig, ParallelDrafter
from fewstep.nn.heads import ParallelHeads
from fewstep.report.claims import CLAIMS
from fewstep.report.claims.claim import Bench, Effort
from fewstep.report.claims.mtp import acceptance_by_depth
from fewstep.report.claims.tuning import trained_draft, trained_parallel_heads
from fewstep.report.contest import Lap
from fewstep.report.reproduce import reproduce


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = small_model(files(tmp_path / "data"))
    effort = Effort(count=2, max_new_tokens=12, rounds=1, draws=1000, seconds=0.5)
    return Bench(model, None, prompts(), effort, tmp_path / "scratch", Console(quiet=True))


def test_acceptance_counts_drafts_that_were_made() -> None:
    """arXiv 2404.19737 counts accepted of suggested tokens: a tree cut short by the end suggests fewer."""
    lap = Lap(accepted=[3, 1, 0, 1, 0], drafted=[3, 3, 3, 1, 0])
    assert acceptance_by_depth(lap) == [3 / 4, 1 / 3, 1 / 3]
    assert acceptance_by_depth(Lap()) == []


def test_parallel_heads_start_from_the_trunk_and_leave_it_alone(bench: Bench) -> None:
    before = {name: value.clone() for name, value in bench.model.network.state_dict().items()}
    trained = trained_parallel_heads(bench)
    heads = trained.network.heads["mtp"]
    assert isinstance(heads, ParallelHeads) and heads.depth == 3
    for name, value in trained.network.state_dict().items():
        if not name.startswith("extra."):
            assert torch.equal(value, before[name]), name
    last = bench.model.network.blocks[-1].state_dict()
    changed = [not torch.equal(value, last[name]) for name, value in heads.block(1).state_dict().items()]
    assert any(changed), "trained"
    assert isinstance(MultiTokenConfig().build(trained.network, lambda path: trained.network), ParallelDrafter)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(trained.logits(ids), bench.model.logits(ids), atol=1e-4), "the same model"


def test_a_draft_model_is_a_part_of_its_target(bench: Bench) -> None:
    draft = trained_draft(bench, depth=1)
    assert draft.network.depth == 1 and not draft.network.heads and draft.network.vocab == bench.model.network.vocab
    assert draft.dtype == bench.model.dtype


def test_every_criterion_is_found(bench: Bench) -> None:
    claim = CLAIMS["mtp"]
    findings = list(claim.measure(bench))
    assert tuple(finding.criterion for finding in findings) == claim.criteria
    by_name = {finding.criterion.name: finding for finding in findings}
    assert by_name["identical"].value == by_name["parallel-identical"].value == 1.0
    assert by_name["tokens-per-call"].verdict == "not reproduced", "random weights"
    assert by_name["second-token"].value == by_name["accepted-of-3"].numbers["by_depth"][0]
    assert all(finding.value is not None for finding in findings)


def test_reproduce_prints_and_writes(bench: Bench, tmp_path: Path) -> None:
    bench.model.save(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "count": 2, "max_new_tokens": 12, "rounds": 1, "seconds": 0.5}
    console = Console(file=(tmp_path / "terminal.txt").open("w", encoding="utf-8"), width=140)
    report = reproduce("mtp", options, directory=tmp_path / "out", console=console)
    record = json.loads((tmp_path / "out" / "reproduce-mtp.json").read_text(encoding="utf-8"))
    assert record == json.loads(json.dumps(report.as_dict()))
    assert record["setting"]["seconds"] == 0.5 and record["setting"]["count"] == 2
    console.file.flush()
    told = (tmp_path / "terminal.txt").read_text(encoding="utf-8")
    assert "accepted-of-3" in told and "at least 2.5" in told and "recalled]" in told


def test_unknown_claims_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"claim='mpt': not known; did you mean 'mtp'"):
        reproduce("mpt")
    with pytest.raises(ValueError, match=r"second: no such field; did you mean 'seconds'"):
        reproduce("mtp", {"second": 1})
