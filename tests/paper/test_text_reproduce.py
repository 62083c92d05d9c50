"""The claims about text without left-to-right: what their measures are, and the whole of each at a size that takes a moment."""

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from raced import files
from rich.console import Console

from fewstep.report.claims import CLAIMS, block_cache, reversal, trained_text
from fewstep.report.claims.claim import Effort
from fewstep.report.claims.sampler_trap import Toy
from fewstep.report.text_cells import exact


def bench(folder: Path, **fields: Any) -> Any:
    effort = Effort(draws=1000, **{"rounds": 1, **fields})
    return SimpleNamespace(effort=effort, scratch=folder, kept=None, console=Console(file=io.StringIO()))


def whole(name: str, folder: Path, **fields: Any) -> dict[str, float]:
    """The value of every criterion of a claim."""
    found = list(CLAIMS[name].measure(bench(folder, **fields)))
    assert tuple(finding.criterion for finding in found) == CLAIMS[name].criteria
    assert all(finding.value is not None and math.isfinite(finding.value) for finding in found)
    return {finding.criterion.name: float(finding.value or 0) for finding in found}


def test_the_trap_is_seen_and_the_law_is_kept(seed: int, tmp_path: Path) -> None:
    found = whole("sampler-trap", tmp_path, seed=seed % 1000)
    assert found["greedy"] == 1 and found["published-rule"] > found["ranked-by-law"]


def test_the_toy_predicts_by_bayes_rule(seed: int) -> None:
    toy = Toy.drawn(seed)
    assert float(toy.law.sum()) == pytest.approx(1)
    found = toy.predict(torch.tensor([[2, 3, 3, 3], [0, 1, 2, 3]]), torch.ones(2))
    begins = toy.law[toy.states[:, 0] == 2]
    second = torch.stack([begins[toy.states[toy.states[:, 0] == 2][:, 1] == token].sum() for token in range(3)])
    torch.testing.assert_close(found[0, 1, :3], second / begins.sum())
    last = torch.stack([toy.law[toy.shares(torch.tensor([[0, 1, 2, token]])).bool()].squeeze() for token in range(3)])
    torch.testing.assert_close(found[1, 3, :3], last / last.sum())
    assert found[0, 0].tolist() == pytest.approx([0, 0, 1, 0]) and toy.off(toy.states[:1]) == pytest.approx(1 - float(toy.law[0]))


def test_the_claim_of_reversal(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reversal, "_PAIRS", 4)
    found = whole("reversal", tmp_path, steps=2, seed=seed % 1000)
    assert all(0 <= share <= 1 for share in found.values())


def test_pairs_have_no_name_twice(seed: int) -> None:
    pairs = reversal.Pairs.drawn(seed)
    names = {tuple(name) for name in [*pairs.left, *pairs.right]}
    assert len(names) == 2 * len(pairs.rows) == 200 and pairs.rows.shape[1] == 7
    assert bool((pairs.batch(3).tokens == pairs.batch(3).tokens).all()) and len(pairs.batch(3).tokens) == 32


def test_ranking_finds_what_a_network_has_learnt(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose likelihoods are a table of the pairs ranks all of them."""
    pairs = reversal.Pairs.drawn(seed)
    known = {tuple(row) for row in pairs.rows.tolist()}

    def table(network: Any, batch: Any) -> Any:
        return SimpleNamespace(nats=torch.tensor([0.0 if tuple(row) in known else 1.0 for row in batch.tokens.tolist()]))

    monkeypatch.setattr(reversal, "exact", table)
    assert reversal._ranked(None, pairs) == 1  # type: ignore[arg-type]
    assert callable(exact)


def test_the_claim_of_the_cache(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_LENGTH": 40, "_PROMPT": 8, "_ROWS": 2, "_RAGGED": 5}.items():
        monkeypatch.setattr(block_cache, name, value)
    found = whole("block-cache", tmp_path, seed=seed % 1000)
    assert found["cache"] > 0 and found["batch"] > 0
    model = block_cache.drawn(0)
    rows = block_cache.ragged(model, 2)
    assert [len(row) for row in rows] == [40, 35] and [row.count(None) for row in rows] == [32, 27]
    assert all(token is None or token < 2048 for row in rows for token in row), "no given token is the mask"


@pytest.mark.parametrize("name", ["diffusion-order", "stratified-count"])
def test_the_claims_of_objectives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each at two steps on a few files, which tells nothing but that it runs, a seed at a time, and goes on where it was."""
    monkeypatch.setattr("fewstep.recipes.run.cache_directory", lambda: tmp_path / "cache")
    data = {"kind": "text", "paths": [str(files(tmp_path / "texts", lines=20))], "held_out": 0.2}
    tiny = {"vocab": 300, "width": 32, "depth": 1, "batch": 2, "length": 32, "prompt": 16, "windows": 2, "draws": 1, "repeats": 2}
    monkeypatch.setattr(trained_text, "SIZES", {**tiny, "data": data})
    first = whole(name, tmp_path, steps=2)
    assert whole(name, tmp_path, steps=2) == first
    assert {path.name for path in tmp_path.glob("*-steps-seed-*")} == (
        {"2-steps-seed-0"} if name == "diffusion-order" else {"1-steps-seed-0", "2-steps-seed-0"}
    )
