"""The claims about samplers: what their measures are, and the whole of each at a size that takes a moment."""

import io
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fewstep.diffusion.learned import LEAST, MOST, Family, Task, error, mixed
from fewstep.diffusion.processes import EDMConfig
from fewstep.diffusion.solvers.ode import DEISConfig
from fewstep.report.claims import CLAIMS, learned_grid
from fewstep.report.claims.claim import Effort
from fewstep.report.claims.denoisers import arrive
from fewstep.report.claims.heun_rho import needed

PROCESS = EDMConfig()


def bench(folder: Path) -> Any:
    return SimpleNamespace(effort=Effort(draws=1000), scratch=folder, console=Console(file=io.StringIO()))


def own(given: Task, ratios: Tensor) -> Tensor:
    return arrive(given.denoise, PROCESS, DEISConfig().build(), PROCESS.time(ratios), given.x / MOST)


def test_a_peer_is_measured_as_the_learned_grid_is() -> None:
    given = mixed(PROCESS, False, 2000, (Family(),), groups=2, rows=8)
    for _, grid in learned_grid.GRIDS:
        ratios = grid(9)
        assert ratios.shape == (10,) and float(ratios[0]) == pytest.approx(MOST) and float(ratios[-1]) == pytest.approx(LEAST)
        wanted = error(given, PROCESS, DEISConfig().build(), PROCESS.time(ratios))
        assert learned_grid.missed(given, own, ratios) == pytest.approx(wanted, rel=1e-9)
    assert learned_grid.missed(given, lambda given, ratios: given.x * torch.nan, ratios) == torch.inf


@pytest.mark.parametrize("peer", [True, False])
def test_the_claim_of_learned_grids(peer: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(learned_grid, "diffusers_runs", dict)
    monkeypatch.setattr(learned_grid, "azula_runs", lambda: {"azula like ours": own} if peer else {})
    monkeypatch.setattr(learned_grid, "mixed", lambda *setting, rows: mixed(*setting[:-1], groups=2, rows=8))
    found = list(CLAIMS["learned-grid"].measure(bench(tmp_path)))
    assert tuple(finding.criterion for finding in found) == CLAIMS["learned-grid"].criteria
    for finding in found:
        assert (finding.value is not None) == peer
        assert ("not installed: diffusers" if peer else "pip install diffusers azula") in finding.how


def test_the_calls_that_an_error_needs() -> None:
    calls, numbers = needed(lambda calls: 35 / calls, 0.1)
    assert calls == pytest.approx(350) and numbers["560 calls"] == pytest.approx(35 / 560)
    assert needed(lambda calls: 35 / calls, 2.0)[0] == 35
    assert needed(lambda calls: 1.0, 0.1, most=140)[0] == 140


@pytest.mark.parametrize("name", ["ddim", "heun-rho", "churn"])
def test_the_whole_claim(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = f"fewstep.report.claims.{name.replace('-', '_')}"
    small = {
        "ddim": {"_STEPS": 2},
        "churn": {"_BRIEF": 2, "_LONG": 3, "_MANY": 4},
        "heun-rho": {"_STEPS": 2, "_ROWS": 8, "_FINE": 90},
    }
    for field, value in {**small[name], **({} if name == "heun-rho" else {"_MOST": 64})}.items():
        monkeypatch.setattr(f"{module}.{field}", value)
    monkeypatch.setattr("fewstep.report.claims.denoisers._BATCH", 16)
    if name == "heun-rho":
        monkeypatch.setattr(f"{module}.needed", partial(needed, most=70))
    found = list(CLAIMS[name].measure(bench(tmp_path)))
    assert tuple(finding.criterion for finding in found) == CLAIMS[name].criteria
    assert all(finding.value is not None and 0 < finding.value < torch.inf for finding in found)
