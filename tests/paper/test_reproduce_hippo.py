"""HiPPO's claim: the signals, the errors that are compared, and the whole of it on a few of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewstep.report.claims import CLAIMS
from fewstep.report.claims.claim import Effort
from fewstep.report.claims.hippo import error_of_fit, error_of_legs, error_of_legt, signals


def test_a_signal_is_a_sum_of_eight_sines() -> None:
    f = signals(3, 4000, 1)
    spectrum = torch.fft.rfft(f).abs()
    loud = spectrum > 1e-6 * spectrum.max()
    assert loud.nonzero()[:, 1].view(3, 8).tolist() == [list(range(1, 9))] * 3
    assert torch.equal(signals(3, 4000, 1), f) and not torch.equal(signals(3, 4000, 2), f)
    torch.testing.assert_close(signals(3, 400, 1), f.unfold(1, 10, 10).mean(-1), rtol=0, atol=0.02)  # only slower


def test_no_polynomial_fits_better_than_the_best(seed: int) -> None:
    f = signals(2, 200, seed)
    for order in (8, 24):
        assert error_of_fit(f, order) <= error_of_legs(f, order, "zoh") <= 1.2 * error_of_fit(f, order) + 0.02
    assert error_of_fit(f, 24) < error_of_fit(f, 8)
    assert error_of_legt(f, 24, 50) < error_of_legs(f, 8)


def test_the_whole_claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fewstep.report.claims.hippo._SAMPLES", 60)
    monkeypatch.setattr("fewstep.report.claims.hippo._CYCLES", 2)
    claim, bench = CLAIMS["hippo"], SimpleNamespace(effort=Effort(count=2))
    many: Any = bench
    found = list(claim.measure(many))
    assert tuple(finding.criterion for finding in found) == claim.criteria
    assert all(finding.value is not None and finding.value > 0 for finding in found)
