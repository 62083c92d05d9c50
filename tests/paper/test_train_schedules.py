"""Published schedules, at their published points."""

import math
from itertools import pairwise

import pytest

from fewstep.training.schedule import SCHEDULES, Cosine, MultiStep, WarmupStableDecay


def test_deepseek_multi_step() -> None:
    """arXiv:2401.02954, section 2.3: 2000 warm-up steps; 31.6% of the peak from 80% of the tokens, 10% from 90%."""
    schedule = MultiStep()
    total = 100_000
    at = {step: schedule.factor(step, step / total) for step in (0, 999, 1999, 2000, 79_999, 80_000, 89_999, 90_000, 99_999)}
    assert at[0] == pytest.approx(1 / 2000)
    assert at[999] == pytest.approx(0.5)
    assert at[1999] == at[2000] == at[79_999] == 1.0
    assert at[80_000] == at[89_999] == 0.316
    assert at[90_000] == at[99_999] == 0.1
    assert math.sqrt(0.1) == pytest.approx(0.316, abs=5e-4), "equal ratios at both drops"


def test_cosine_of_sgdr() -> None:
    """arXiv:1608.03983, equation 5: eta_min + (eta_max - eta_min) (1 + cos(pi t / T)) / 2."""
    schedule = Cosine(warmup=0, floor=0.1)
    for progress, expected in ((0.0, 1.0), (1 / 3, 0.1 + 0.9 * 0.75), (0.5, 0.55), (2 / 3, 0.1 + 0.9 * 0.25), (1.0, 0.1)):
        assert schedule.factor(10**6, progress) == pytest.approx(expected)


def test_warm_up_stable_decay() -> None:
    """arXiv:2405.18392, section 3: constant, then linear to zero over the last 20% of the steps."""
    schedule = WarmupStableDecay(warmup=10, share=0.2)
    total = 1000
    factors = [schedule.factor(step, step / total) for step in range(total)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:801] == pytest.approx([1.0] * 791)
    assert factors[900] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(1 / 200)
    assert all(later < earlier for earlier, later in pairwise(factors[801:]))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_short_run_warms_up_and_anneals_too(kind: str) -> None:
    """The warm-up takes at most a tenth of the budget, however many steps it asks for."""
    schedule = SCHEDULES[kind](warmup=2000)
    factors = [schedule.factor(step, step / 50) for step in range(50)]
    assert max(factors) == pytest.approx(1.0, abs=0.03)
    assert factors.index(max(factors)) == 5
    assert factors[-1] < 0.2
    assert SCHEDULES[kind](warmup=2000, warmup_share=1.0).factor(10, 0.005) < 0.01, "share 1 is the paper's rule"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"milestones": (0.8,)}, r"milestones=\(0.8,\): needs one entry per factor \(2\)"),
        ({"milestones": (0.9, 0.8)}, r"milestones=\(0.9, 0.8\): must rise strictly inside \(0, 1\)"),
    ],
)
def test_bad_milestones_are_refused(fields: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiStep(**fields)  # type: ignore[arg-type]
