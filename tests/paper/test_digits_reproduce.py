"""The claims about digits in few calls: the rule of enough calls, who is asked, and the whole of each with a tiny teacher."""

import io
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fewstep.core.random import CounterRng
from fewstep.decode.arrays import SampleConfig, sample
from fewstep.diffusion.grids import KarrasConfig
from fewstep.diffusion.solvers.consistency import ConsistencySamplerConfig
from fewstep.hub.arrays import load_arrays
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.nn.backbones.unet import UNetConfig
from fewstep.recipes import load_recipe
from fewstep.recipes.run import train
from fewstep.report.claims import CLAIMS, digits, digits_calls, few_step_digits
from fewstep.report.claims.claim import Effort
from fewstep.report.claims.digits_calls import Contest, least
from fewstep.report.claims.digits_entrants import COUNTS, Entrant, here, of_diffusers
from fewstep.report.quality_features import classifier_of

SHAPE = (1, 8, 8)


def bench(folder: Path, **fields: Any) -> Any:
    console = Console(file=io.StringIO())
    return SimpleNamespace(effort=Effort(**fields), scratch=folder / "scratch", kept=folder / "kept", console=console)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A small network like the shipped one, with weights by chance."""
    shipped = load_arrays(digits.TEACHER).config
    assert isinstance(shipped, DenoiserConfig)
    model = shipped.model_copy(update={"backbone": UNetConfig(width=8)}).build()
    with torch.no_grad():
        model.backbone.out.weight.normal_(std=0.1)  # type: ignore[operator, union-attr]
    model.save(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def brief(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claims with that teacher, two steps of training, and a judge to whom the mean of the pixels is everything."""
    changes = {"model.teacher": str(teacher), "budget.steps": 2, "run.batch": 4, "run.validate_every": 0}
    monkeypatch.setattr(few_step_digits, "train", lambda name, **told: train(name, changes, **told))
    judge = SimpleNamespace(count=3, held_out=torch.ones(2, *SHAPE), frechet=lambda x: 1 + float(x.abs().mean()))
    judge.scores = lambda x: {"frechet": judge.frechet(x), "precision": 0.5, "recall": 0.5, "copying": 1.0}
    for module in (few_step_digits, digits_calls):
        monkeypatch.setattr(module, "Digits", lambda seed: judge)
        monkeypatch.setattr(module, "load_arrays", lambda source: load_arrays(teacher if source == digits.TEACHER else source))


def test_enough_calls_are_the_least_from_which_on_all_are_enough(seed: int) -> None:
    counts = tuple(range(3, 17))
    for first in (*counts, 99):
        expected = None if first > counts[-1] else first
        assert least(lambda count, first=first: count >= first, counts, 100) == expected  # type: ignore[misc]
    assert least(lambda count: count >= 6 and count != 7, counts, 100) == 8, "what lies before a failure is not enough"
    assert least(lambda count: True, counts, 7) == 3 and least(lambda count: True, counts, 3) is None
    assert least(lambda count: count < 10, counts, 10) is None, "the next larger one fails"
    for row in CounterRng.seeded(range(seed, seed + 50)).uniform(len(counts)):
        enough, asked = dict(zip(counts, (row < 0.8).tolist(), strict=True)), set[int]()
        found = least(lambda count, told=enough, to=asked: to.add(count) or told[count], counts, 100)  # type: ignore[misc]
        assert found is None or all(enough[count] for count in asked if count >= found)


def test_the_fewest_calls_are_those_of_the_best_entrant(brief: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def entrant(name: str, calls_needed: int, noisy: bool = False) -> Entrant:
        def draw(model: Denoiser, noise: Tensor, seed: int, calls: int) -> Tensor:
            asked.append((name, calls, seed))
            off = 0.0 if calls >= calls_needed else 1.0
            return torch.full_like(noise, torch.nan if noisy else 1 + off)

        return Entrant(name, draw)

    monkeypatch.setattr(digits_calls, "sampled", lambda solver, grid, model, noise, seed, calls: torch.ones_like(noise))
    model: Any = SimpleNamespace(shape=SHAPE, unnormed=lambda x: x)
    contest = Contest(bench(tmp_path, rounds=3), digits_calls.Digits(0), model)
    assert contest.fewest([entrant("nan", 4, noisy=True), entrant("slow", 16), entrant("fast", 7), entrant("late", 12)]) == (
        7,
        "fast",
    )
    assert contest.whole == [2.0, 2.0, 2.0] and contest.ratios["nan"] == {COUNTS[-1]: [torch.inf]}
    assert contest.ratios["late"] == {6: [1.5]}, "who is not enough with less than the best so far is asked once"
    assert contest.ratios["fast"][7] == [1.0] * 3 and contest.ratios["fast"][6] == [1.5]
    assert len(asked) == len(set(asked)), "nothing is measured twice"
    assert contest.fewest([entrant("never", 99)]) == (200, "none of them")


def test_every_entrant_makes_the_calls_it_is_asked_for(teacher: Path, seed: int) -> None:
    model, seen = load_arrays(teacher), []
    assert isinstance(model, Denoiser)
    model.backbone.register_forward_hook(lambda *call: seen.append(1))
    noise = CounterRng.seeded([seed, seed + 1]).normal(*SHAPE).float()
    for entrant in here() + of_diffusers():
        seen.clear()
        x = entrant.draw(model, noise, seed, entrant.counts[1])
        assert x.shape == noise.shape and bool(x.isfinite().all()), entrant.name
        assert len(seen) == entrant.counts[1], entrant.name


@pytest.mark.claims
def test_schedulers_of_diffusers_are_driven_as_ours_are(seed: int) -> None:
    """Where both have a method, on the shipped model: the same images."""
    pytest.importorskip("diffusers")
    model = load_arrays(digits.TEACHER)
    assert isinstance(model, Denoiser)
    noise = CounterRng.seeded(range(seed, seed + 4)).normal(*SHAPE).float()
    entrants = {entrant.name: entrant for entrant in here() + of_diffusers()}
    native = "EDMDPMSolverMultistepScheduler solver_order=2 sigma_schedule="
    for mine, theirs, calls in (
        ("Heun, Karras grid", "HeunDiscreteScheduler, Karras grid", 15),
        ("UniPC-2, exponential grid", "UniPCMultistepScheduler solver_order=2, exponential grid", 16),
        ("DPM-Solver++ 2M, Karras grid", f"{native}karras, own grid", 16),
        ("DPM-Solver++ 2M, exponential grid", f"{native}exponential, own grid", 16),
        ("DEIS-3, Karras grid to 0.002", "DEISMultistepScheduler solver_order=3 lower_order_final=False, Karras grid", 16),
    ):
        ours, other = (entrants[name].draw(model, noise, seed, calls) for name in (mine, theirs))
        print(f"{theirs}: {float((ours - other).abs().max()):.1e}")
        assert float((ours - other).abs().max()) < 1e-3, theirs


def test_a_student_of_digits_is_distilled_and_sampled_in_one_call(brief: None, teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assert load_recipe(few_step_digits.RECIPE)["model"].teacher == digits.TEACHER  # type: ignore[attr-defined]
    student = few_step_digits.taught(bench(tmp_path))
    again = few_step_digits.taught(bench(tmp_path))  # it is at hand, and is not trained on
    assert isinstance(student, Denoiser) and student.parameterisation.kind == "consistency" and student.classes == 10
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    moved = [
        float((a - b).detach().abs().max()) for a, b in zip(student.parameters(), load_arrays(teacher).parameters(), strict=True)
    ]
    assert 0 < max(moved) < 0.1
    ask = partial(SampleConfig, count=4, solver=ConsistencySamplerConfig(), grid=KarrasConfig(least=1.2))
    once, twice = (sample(student, ask(steps=steps)) for steps in (1, 2))
    assert (once.cost.calls, twice.cost.calls) == (4, 8) and once.x.shape == (4, *SHAPE)
    assert bool(once.x.isfinite().all()) and not torch.allclose(once.x, twice.x)


def test_the_whole_claim_of_a_student(brief: None, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    claim = CLAIMS["few-step-digits"]
    found = list(claim.measure(bench(tmp_path, rounds=2)))
    assert tuple(finding.criterion for finding in found) == claim.criteria
    assert all(finding.value is not None and 0 < finding.value < torch.inf for finding in found)
    numbers = found[0].numbers
    assert (
        set(numbers["teacher"]) >= {"DEIS-3, Karras grid", "UniPC-3, Karras grid"} and numbers["held-out digits"]["frechet"] == 2
    )
    best = min(scores["frechet"]["median"] for scores in numbers["teacher"].values())
    assert found[0].value == pytest.approx(numbers["student"]["frechet"]["median"] / best)


@pytest.mark.parametrize("peers", [1, 0])
def test_the_whole_claim_of_calls(peers: int, brief: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(digits_calls, "_MANY", 8)
    monkeypatch.setattr(digits_calls, "here", lambda: here()[2:4])
    monkeypatch.setattr(digits_calls, "of_diffusers", lambda: here()[4:5] * peers)
    claim = CLAIMS["digits-calls"]
    found = list(claim.measure(bench(tmp_path, rounds=1)))
    assert tuple(finding.criterion for finding in found) == claim.criteria
    assert all((finding.value is not None) == bool(peers) for finding in found)
    if not peers:
        assert "pip install diffusers" in found[0].how


def test_digits_are_held_against_those_of_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(digits, "classifier_of", partial(classifier_of, steps=1, cache=tmp_path))
    judge = digits.Digits(0)
    few = judge.held_out[:64]
    assert judge.count + len(judge.held_out) == 1797 and judge.frechet(few) > 0
    found = judge.scores(few)
    assert found["frechet"] == pytest.approx(judge.frechet(few)) and found["copying"] > 0.5
