"""The reproduction of speculative sampling: its arithmetic against independent computations, its verdicts on planted results."""

import json
import math
from pathlib import Path

import pytest
import torch
from raced import near_draft, prompts, small_model
from rich.console import Console
from scipy.stats import chisquare

from fewstep.report.claims import CLAIMS
from fewstep.report.claims.claim import Bench, Criterion, Effort, Finding, Report
from fewstep.report.claims.speculative_sampling import (
    acceptance,
    chi_square,
    enumerated,
    expected_tokens,
    whole_calls,
)
from fewstep.report.contest import Lap


def test_the_formula_is_the_papers() -> None:
    """arXiv 2211.17192, table 1: a = 0.8 and g = 5 make 3.69 tokens a call; a = 0.6 and g = 2 make 1.96."""
    assert expected_tokens(0.8, 5) == pytest.approx(3.69, abs=0.005)
    assert expected_tokens(0.6, 2) == pytest.approx(1.96, abs=0.005)
    assert expected_tokens(1.0, 4) == 5.0 and expected_tokens(0.0, 4) == 1.0


def test_chi_square_is_scipys(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    law = torch.rand(30, generator=generator).double() + 0.2
    law /= law.sum()
    counts = torch.bincount(torch.multinomial(law, 5000, replacement=True, generator=generator), minlength=30).double()
    p, statistic, freedom = chi_square(counts, law)
    theirs = chisquare(counts, law * 5000)
    assert freedom == 29 and statistic == pytest.approx(theirs.statistic) and p == pytest.approx(theirs.pvalue)
    assert chi_square(counts, law.roll(1))[0] < 1e-6, "another law"
    pooled = torch.cat([law * 0.999, torch.full((10,), 1e-4)])
    assert chi_square(torch.cat([counts, torch.zeros(10)]), pooled)[2] == 30, "rare cells count as one"


def test_the_enumerated_law_is_the_product_of_the_models_laws() -> None:
    model = small_model(heads=False)
    law = enumerated(model.network, (3, 5), 1)
    assert torch.allclose(law, model.logits(torch.tensor([[3, 5]]))[0, -1].double().softmax(-1), atol=1e-6)


def test_acceptance_is_certain_for_the_model_itself_and_less_for_another() -> None:
    model = small_model(heads=False)
    text = [[1, 2, 3], [4, 5]]
    assert acceptance(model, model, text, text) == pytest.approx(1.0)
    assert acceptance(model, small_model(heads=False), text, text) < 0.9


def test_only_whole_trees_count() -> None:
    mean, error, calls = whole_calls(Lap(accepted=[3, 0, 1, 0], drafted=[3, 3, 2, 3]), 3)
    assert (mean, calls) == (2.0, 3)
    assert error == pytest.approx(math.sqrt(3) / math.sqrt(3))


def test_every_criterion_is_found_and_written_down(tmp_path: Path) -> None:
    model, claim = small_model(heads=False), CLAIMS["speculative-sampling"]
    effort = Effort(count=2, max_new_tokens=12, rounds=1, draws=1000)
    bench = Bench(model, near_draft(model), prompts(), effort, tmp_path, Console(quiet=True))
    report = Report(claim, tuple(claim.measure(bench)), {})
    assert tuple(finding.criterion for finding in report.findings) == claim.criteria
    law, tokens, pair, speed = report.findings
    assert law.verdict == tokens.verdict == "reproduced", "a false alarm of at most 1e-4"
    assert pair.value is not None and 0 < pair.numbers["a"] < 1
    assert speed.value is not None and set(speed.numbers["call_seconds"]) == {"1", "2", "3", "5"}
    record = report.as_dict()
    assert json.loads(json.dumps(record)) == record
    assert [finding["threshold"] for finding in record["findings"]] == [1e-4, 4.5, 0.10, 0.15]
    assert record["name"] == "speculative-sampling" and record["summary"]


def test_a_negative_result_is_a_verdict() -> None:
    claim = CLAIMS["speculative-sampling"]
    lower, upper = Criterion("a", "", "", "at least", 2.0), Criterion("b", "", "", "at most", 0.1)
    good, bad, nothing = Finding(lower, 2.0, ""), Finding(upper, 0.2, ""), Finding(upper, None, "no model")
    assert (good.verdict, bad.verdict, nothing.verdict) == ("reproduced", "not reproduced", "not measured")
    assert Finding(lower, math.nan, "").verdict == Finding(upper, math.nan, "").verdict == "not reproduced"
    assert Report(claim, (good, nothing), {}).verdict == "reproduced"
    assert Report(claim, (good, bad), {}).verdict == "not reproduced"
    assert Report(claim, (nothing,), {}).verdict == "not measured"
