"""The claim of the solvers' orders: what it measures here, and that it runs without `diffusers`."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from fewstep.report.claims.claim import Effort
from fewstep.report.claims.solver_order import CLAIM


def test_the_whole_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.report.claims.solver_order._ROWS", 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    bench: Any = SimpleNamespace(effort=Effort())
    found = list(CLAIM.measure(bench))
    assert tuple(finding.criterion for finding in found) == CLAIM.criteria
    assert [finding.verdict for finding in found[:4]] == ["reproduced"] * 4
    assert {finding.verdict for finding in found[4:]} == {"not measured"}
