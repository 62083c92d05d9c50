"""The claim of flows' likelihoods: the gap it measures, and the whole of it on a few steps."""

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fewstep.models.flow import FlowConfig
from fewstep.nn.bijections.nice import NICEConfig
from fewstep.report.claims import CLAIMS
from fewstep.report.claims.claim import Effort
from fewstep.report.claims.flow_likelihood import gap
from fewstep.training.data.points import DENSITIES


def test_the_gap_is_the_divergence(seed: int) -> None:
    """Of a Gaussian from the uniform law on a board: E[x^2 / 2] + ln 2 pi - ln 8 in nats, as E[x^2] is 4/3 in each direction."""
    flow = FlowConfig(bijections=(NICEConfig(layers=1),), standardise=False).build().double().eval()
    wasted, error = gap(flow, DENSITIES["checkerboard"], 4000, seed)
    assert abs(wasted - (4 / 3 + math.log(2 * math.pi) - math.log(8))) < 5.5 * error
    assert 0 < error < 0.05


def test_the_whole_claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fewstep.report.claims.flow_likelihood._STEPS", 2)
    monkeypatch.setattr("fewstep.report.claims.flow_likelihood._BATCH", 16)
    bench: Any = SimpleNamespace(effort=Effort(draws=1000), scratch=tmp_path, console=Console(file=io.StringIO()))
    found = list(CLAIMS["flow-likelihood"].measure(bench))
    assert tuple(finding.criterion for finding in found) == CLAIMS["flow-likelihood"].criteria
    assert all(finding.value is not None and finding.value > 0 for finding in found)
    assert not torch.tensor([finding.value for finding in found]).isnan().any()
