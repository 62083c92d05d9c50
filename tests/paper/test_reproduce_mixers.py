"""The reproductions of mixers with a matrix state: what they measure is what they say, and every criterion is found."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from fewstep.core.random import CounterRng
from fewstep.nn.mixers import MIXERS
from fewstep.nn.mixers.gated_deltanet import GatedDeltaNetConfig
from fewstep.nn.mixers.performer import Kernel
from fewstep.report.claims import CLAIMS, performer, recall, transnormer
from fewstep.report.claims.claim import Effort, Finding
from fewstep.report.claims.recall import Lists
from fewstep.report.claims.tasks import Answers, answered
from fewstep.training.objectives.next_token import IGNORED


def findings(name: str, directory: Path) -> dict[str, Finding]:
    """Of a claim that reads no model, with hardly any effort and a seed of its own; all of its criteria, in their order."""
    bench: Any = SimpleNamespace(effort=Effort(draws=1000, steps=4), scratch=directory, console=Console(quiet=True))
    found = list(CLAIMS[name].measure(bench))
    assert [finding.criterion for finding in found] == list(CLAIMS[name].criteria)
    assert all(finding.value is not None and finding.how for finding in found)
    return {finding.criterion.name: finding for finding in found}


def test_performer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(performer, "_COUNTS", (16, 64))
    found = findings("performer", tmp_path)
    for name in ("positive-follows-theory", "trigonometric-follows-theory", "positive-wins-with-few-features"):
        assert found[name].verdict == "reproduced"
    wins = found["positive-wins-everywhere"]
    assert cast(float, wins.value) == min(wins.numbers.values())
    assert all((ratio < 1) == (name in wins.how) for name, ratio in wins.numbers.items())


@pytest.mark.parametrize("kernel", ["positive", "trigonometric"])
def test_theory_tells_aligned_from_opposed(kernel: Kernel, seed: int) -> None:
    """One kind of features is exact for opposed vectors, the other for equal ones; and measured errors say so."""
    x = torch.nn.functional.normalize(torch.randn(2, 16, dtype=torch.float64), dim=-1)
    exact, other = (-x, x) if kernel == "positive" else (x, -x)
    assert performer.theory(x, exact, kernel).abs().max() < 1e-12 < 1 < performer.theory(x, other, kernel).min()
    rng = CounterRng.seeded([seed])
    wrong = performer.errors_of(x, other, rng, 16, 200, kernel, orthogonal=False)
    assert performer.errors_of(x, exact, rng, 16, 200, kernel, orthogonal=False).max() < 1e-12 < wrong.min()


def test_transnormer(tmp_path: Path) -> None:
    found = findings("transnormer", tmp_path)
    assert found["a-denominator-has-no-bound"].verdict == found["a-norm-has-one"].verdict == "reproduced"
    assert found["a-denominator-has-no-bound"].value == pytest.approx(1e6, rel=1e-6)


@pytest.mark.parametrize("norm", [True, False])
def test_the_largest_gradient_by_differences(norm: bool) -> None:
    scores, values, upstream = torch.rand(5, 5).double() + 0.5, torch.randn(5, 3).double(), torch.randn(5, 3).double()

    def loss(scores: torch.Tensor) -> torch.Tensor:
        sums = scores.tril() @ values
        if norm:
            return (upstream * sums / (sums.square().mean(1, keepdim=True) + 1e-6).sqrt()).sum()
        return (upstream * sums / scores.tril().sum(1, keepdim=True)).sum()

    exact = torch.autograd.functional.jacobian(loss, scores)
    largest = float(exact.abs().max())
    assert transnormer.largest_gradient(scores, values, upstream, norm=norm) == pytest.approx(largest, rel=1e-9)


def test_lists_ask_for_each_key_once(seed: int) -> None:
    lists = Lists(seed, rows=20, pairs=5, length=19, vocab=24)
    batch = lists.batch(3)
    labels = batch.extra["labels"]
    for tokens, asked in zip(batch.tokens.tolist(), labels.tolist(), strict=True):
        pairs = dict(zip(tokens[:10:2], tokens[1:10:2], strict=True))
        assert len(pairs) == 5 and max(pairs) < 12 <= min(pairs.values())
        assert asked[:10] == [IGNORED] * 10
        found = [(token, value) for token, value in zip(tokens, asked, strict=True) if value != IGNORED]
        assert sorted(found) == sorted(pairs.items())
    assert torch.equal(lists.batch(3).tokens, batch.tokens) and not torch.equal(lists.batch(4).tokens, batch.tokens)


class Reader(torch.nn.Module):
    """It looks up in the text what stood behind each token, and says so with certainty; or, forgetful, one kind always."""

    def __init__(self, forgetful: bool = False) -> None:
        super().__init__()
        self.forgetful = forgetful

    def forward(self, tokens: torch.Tensor) -> Any:
        before = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).tril(-1)
        first = before.to(torch.uint8).argmax(2)
        found = tokens.gather(1, (first + 1).clamp(max=tokens.shape[1] - 1))
        said = torch.where(before.any(2) & (not self.forgetful), found, 0)
        return SimpleNamespace(final=100.0 * torch.nn.functional.one_hot(said, 64))

    def unembed(self, h: torch.Tensor) -> torch.Tensor:
        return h


def test_who_looks_keys_up_answers_all() -> None:
    loss = Answers().loss(Reader(), Lists(0, rows=6).batch(0), CounterRng.seeded([0]))
    assert loss.units == 48 and float(loss.value) < 1e-6 and float(loss.metrics["accuracy"]) == 1
    assert answered(Reader(), Lists(1)) == 1 and answered(Reader(forgetful=True), Lists(1)) == 0


def test_recall(tmp_path: Path) -> None:
    found = findings("recall", tmp_path)
    assert all(-1 <= cast(float, finding.value) <= 1 for finding in found.values())
    sizes = [int(name.split()[0]) for name in found["recall-grows-with-the-state"].numbers]
    assert [size / sizes[0] for size in sizes] == [1, 8, 32]
    assert recall.numbers_of(GatedDeltaNetConfig()) == sizes[1], "the delta rule's rival holds as much"


def test_named_claims_can_be_measured() -> None:
    named = {claim for config in MIXERS.values() for claim in config.claims}
    assert named <= set(CLAIMS)
    for claim, mixers in {
        "performer": {"performer"},
        "transnormer": {"transnormer"},
        "recall": {"attention", "mamba2", "gated_deltanet"},
    }.items():
        assert {kind for kind, config in MIXERS.items() if claim in config.claims} == mixers
