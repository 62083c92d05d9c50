"""What the trainer promises about a step: accumulation, clipping, averages, budgets, validation, and when it stops."""

import io
import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from train_toy import ROWS, VOCAB, ToyData, ToyModel, ToyObjective, plan, trainer

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import CounterRng, Rng
from fewstep.core.recipe import Recipe
from fewstep.training.average import WeightAverage
from fewstep.training.checkpoint import WEIGHTS, read
from fewstep.training.health import Diverged, Watch
from fewstep.training.log import Log
from fewstep.training.optim import OPTIMS
from fewstep.training.plan import BUDGETS, RUNS, Budget, Plan, Used
from fewstep.training.precision import PRECISIONS
from fewstep.training.schedule import SCHEDULES


def _records(directory: Path, group: str) -> list[dict[str, Any]]:
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["group"] == group]


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_accumulation_equals_the_big_batch(optim: str, tmp_path: Path, seed: int) -> None:
    """Micro-batches count in proportion to the tokens they score, and draws belong to samples, not to batches."""
    ends = []
    for rows, accumulate in ((8, 1), (2, 4), (1, 8)):
        model = ToyModel(seed, dropout=0.0).double()
        settings = plan(5, optim, accumulate=accumulate, clip=0.5)
        data = ToyData(seed, rows=rows, padded=True)
        summary = trainer(tmp_path / f"{accumulate}", seed, settings, model=model, data=data).run()
        ends.append((load_file(summary.checkpoint / WEIGHTS), summary))
    (whole, one), *split = ends
    start = ToyModel(seed).double().state_dict()
    assert any((whole[name] - start[name]).abs().max() > 1e-3 for name in whole)
    tolerance = 1e-10 if optim == "adamw" else 1e-4  # Newton-Schulz runs in fp32 or bf16
    for weights, summary in split:
        assert summary.loss == pytest.approx(one.loss, rel=1e-6)
        assert summary.used.tokens == one.used.tokens
        for name in whole:
            torch.testing.assert_close(weights[name], whole[name], rtol=tolerance, atol=tolerance)


def test_unweighted_accumulation_would_differ(seed: int) -> None:
    """The law above can fail: the micro-batches of its data score different numbers of tokens."""
    data = ToyData(seed, rows=1, padded=True)
    units = {int((data.batch(index).segments[0] >= 0).sum()) for index in range(8)}  # type: ignore[index]
    assert len(units) > 1


def test_clipping_bounds_the_step(tmp_path: Path, seed: int) -> None:
    """With plain gradients far above `clip`, the update equals that of gradients scaled to norm `clip`."""
    seen: list[float] = []

    class Spy(ToyObjective):
        def after_step(self, model: nn.Module) -> None:
            seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))

    trainer(tmp_path, seed, plan(5, clip=0.01, log_every=1), objective=Spy()).run()
    logged = [record["grad_norm"] for record in _records(tmp_path, "train")]
    assert min(logged) > 0.01, "the log tells the norm before clipping"
    assert seen == pytest.approx([0.01] * 5, rel=1e-5)


def test_recomputing_activations_changes_no_bit(tmp_path: Path, seed: int) -> None:
    for precision in ("fp32", "bf16"):
        ends = []
        for recompute in (False, True):
            settings = plan(4, precision=precision, recompute=recompute)
            summary = trainer(tmp_path / f"{precision}{recompute}", seed, settings).run()
            ends.append(load_file(summary.checkpoint / WEIGHTS))
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(ValueError, match=r"run.recompute=True: Linear cannot recompute its activations; set it to false"):
        trainer(tmp_path / "x", seed, plan(4, recompute=True), model=nn.Linear(2, 2))


def test_the_average_follows_its_formula(seed: int) -> None:
    model = ToyModel(seed)
    average = WeightAverage(model, decay=0.9)
    expected = model.head.weight.detach().double().clone()
    generator = torch.Generator().manual_seed(seed)
    for step in range(150):
        with torch.no_grad():
            model.head.weight.add_(torch.randn(VOCAB, 24, generator=generator))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.head.weight.detach().double()
    torch.testing.assert_close(average.tensors()["head.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    raw = model.head.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.head.weight.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.head.weight, raw)


def test_validation_and_saved_weights_are_the_average(tmp_path: Path, seed: int) -> None:
    model, objective = ToyModel(seed), ToyObjective(corrupted=0.0)
    summary = trainer(tmp_path, seed, plan(10, ema=0.9, validate_every=5), model=model, objective=objective).run()
    stored = read(summary.checkpoint)
    assert torch.equal(stored.tensors["model.head.weight"], model.head.weight)
    assert not torch.equal(stored.weights["head.weight"], model.head.weight)
    shipped = ToyModel(seed)
    shipped.load_state_dict(dict(stored.weights))
    loss = objective.loss(shipped.eval(), ToyData(seed).batch(10**6), CounterRng.seeded([0] * ROWS)).value.item()
    assert summary.validation["loss"] == pytest.approx(loss, rel=1e-6)
    assert summary.validation["bits_per_byte"] == pytest.approx(loss / math.log(2) / 2.0, rel=1e-6)
    assert objective.last == summary.validation
    assert [record["step"] for record in _records(tmp_path, "validation")] == [5, 10]


def test_frozen_parameters_stay(tmp_path: Path, seed: int) -> None:
    model = ToyModel(seed)
    model.embedding.requires_grad_(False)
    before = model.embedding.weight.clone()
    trainer(tmp_path, seed, plan(5, ema=0.9), model=model).run()
    assert torch.equal(model.embedding.weight, before)
    with pytest.raises(ValueError, match="no parameter requires a gradient; unfreeze"):
        OPTIMS["adamw"]().build(model.requires_grad_(False))


@pytest.mark.parametrize(
    ("limits", "used", "progress"),
    [
        ({"steps": 10}, Used(5, 999, 999.0), 0.5),
        ({"tokens": 1000}, Used(5, 250, 999.0), 0.25),
        ({"seconds": 60.0, "steps": 1000}, Used(10, 1, 45.0), 0.75),
        ({}, Used(10, 1, 45.0), 0.01),
    ],
)
def test_budget_progress_is_the_limit_nearest_to_its_end(limits: dict[str, float], used: Used, progress: float) -> None:
    assert Budget(**limits).progress(used) == pytest.approx(progress)


def test_a_run_limited_by_seconds_anneals(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()  # a clock on which every step takes a tenth of a second
    monkeypatch.setattr("fewstep.training.trainer.time", SimpleNamespace(perf_counter=lambda: next(ticks) / 10))
    settings = plan(1, log_every=1)
    timed = Plan(settings.optim, SCHEDULES["wsd"](share=1.0), settings.precision, Budget(seconds=0.5), settings.run)
    summary = trainer(tmp_path, seed, timed).run()
    rates = [record["lr"] for record in _records(tmp_path, "train")]
    assert summary.used == Used(5, summary.used.tokens, pytest.approx(0.5)) and len(rates) == 5
    assert rates[-1] < 0.5 * max(rates)


class _Scripted(ToyObjective):
    """A loss with a gradient, whose value is shifted to what the script says."""

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.script, self.count = script, 0

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        loss = super().loss(model, batch, rng)
        self.count += 1
        return Loss(loss.value - loss.value.detach() + self.script(self.count - 1), loss.units, loss.metrics)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_no_number_stops_the_run(bad: float, precision: str, tmp_path: Path, seed: int) -> None:
    objective, model = _Scripted(lambda step: bad if step == 7 else 2.0), ToyModel(seed)
    with pytest.raises(Diverged, match=rf"^step 7: loss={bad}: .*lower optim.lr; checkpoints kept: 4$") as caught:
        trainer(tmp_path, seed, plan(20, precision=precision, checkpoint_steps=4), objective=objective, model=model).run()
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)
    assert all(bool(param.isfinite().all()) for param in model.parameters()), "the bad step touched no weight"
    assert read(tmp_path / "checkpoints" / "step-00000004").step == 4
    assert "loss=" in _records(tmp_path, "notice")[-1]["text"]


def test_a_gradient_that_is_no_number_stops_an_fp32_run(tmp_path: Path, seed: int) -> None:
    model = ToyModel(seed)
    model.head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(Diverged, match=r"^step 0: gradient norm=(nan|inf): .*checkpoints kept: none yet$"):
        trainer(tmp_path, seed, plan(5), model=model).run()


def test_a_diverging_loss_stops_the_run_and_keeps_the_good_checkpoint(tmp_path: Path, seed: int) -> None:
    objective = _Scripted(lambda step: max(6 - step / 20, 2.0) if step < 120 else 2 + (step - 120) / 5)
    with pytest.raises(Diverged, match=r"median loss=.* up from its best 2: training diverges; .*run\.divergence=0"):
        trainer(tmp_path, seed, plan(400, checkpoint_steps=10, keep=2, validate_every=0), objective=objective).run()
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())
    assert len(kept) == 2 and kept[0] >= 110
    assert objective.script(kept[0]) < 6, "no checkpoint of the ruin replaced the good ones"
    objective = _Scripted(lambda step: 2 + step / 5)
    assert trainer(tmp_path / "off", seed, plan(130, divergence=0, validate_every=0), objective=objective).run().used.steps == 130


def _stop(losses: list[float], cut: int = -1) -> int | None:
    """The step at which a watch stops, if it does; at step `cut` it is written to JSON and read again."""
    watch = Watch(0.5)
    for step, loss in enumerate(losses):
        if step == cut:
            state = json.loads(json.dumps(watch.state_dict()))
            watch = Watch(0.5)
            watch.load_state_dict(state)
        try:
            watch.observe(step, loss)
        except Diverged:
            return step
    return None


def test_noise_and_slow_starts_are_no_divergence(seed: int) -> None:
    """Falling losses with noise, losses around zero, single spikes: none stops. A false alarm is a 10-sigma event."""
    chance = random.Random(seed)
    shapes = {
        "falling": lambda step: 8 * math.exp(-step / 200) + chance.gauss(2, 0.3),
        "around zero": lambda step: chance.gauss(0, 1),
        "negative": lambda step: -step / 100 + chance.gauss(0, 0.5),
        "spiky": lambda step: chance.gauss(2, 0.2) + (500.0 if step % 300 == 200 else 0.0),
    }
    for name, shape in shapes.items():
        assert _stop([shape(step) for step in range(1000)]) is None, name


def test_watch_survives_a_checkpoint(seed: int) -> None:
    chance = random.Random(seed)
    losses = [8 * math.exp(-step / 50) + chance.gauss(2, 0.3) for step in range(200)] + [2 + step / 3 for step in range(100)]

    end = _stop(losses)
    assert end is not None and end > 200
    assert _stop(losses, cut=100) == _stop(losses, cut=205) == end


def test_a_batch_with_nothing_to_score_is_refused(tmp_path: Path, seed: int) -> None:
    class Empty(ToyData):
        def batch(self, step: int) -> Batch:
            batch = super().batch(step)
            return Batch(batch.tokens, torch.full_like(batch.tokens, -1)) if step >= 4 else batch

    settings = plan(5, accumulate=2)
    with pytest.raises(ValueError, match="step 2: batch has nothing to score; check the segments"):
        trainer(tmp_path / "all", seed, settings, data=Empty(seed)).run()

    class Half(Empty):
        def batch(self, step: int) -> Batch:
            return super().batch(step if step % 2 else 0)

    assert trainer(tmp_path / "half", seed, settings, data=Half(seed)).run().used.steps == 5


def test_the_log_drops_what_a_dead_run_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    for step in (5, 10, 15):
        log.write(step, "train", {"loss": 1.0 / step, "odd": math.nan})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    log = Log(tmp_path, 10)
    log.write(15, "train", {"loss": 9.0})
    log.close()
    assert [(record["step"], record["loss"]) for record in _records(tmp_path, "train")] == [(5, 0.2), (10, 0.1), (15, 9.0)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_emulated_arithmetic_is_told_once(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.training.precision.arithmetic", lambda dtype, device: False)
    out = io.StringIO()
    trainer(tmp_path, seed, plan(3, precision="fp16"), console=Console(file=out)).run()
    assert out.getvalue().count("precision=fp16: no such arithmetic on this CPU") == 1
    assert len(_records(tmp_path, "notice")) == 1
    with pytest.raises(ValueError, match=r"run\.compile=True: cannot trace precision=fp16"):
        trainer(tmp_path / "c", seed, plan(3, precision="fp16", compile=True))


def test_the_bar_tells_loss_rate_and_time_left(tmp_path: Path, seed: int) -> None:
    out = io.StringIO()
    trainer(tmp_path, seed, plan(20), console=Console(file=out, force_terminal=True, width=120)).run()
    assert "loss" in out.getvalue() and "tokens/s" in out.getvalue() and "left" in out.getvalue()


def test_extra_files_travel_with_the_weights(tmp_path: Path, seed: int) -> None:
    summary = trainer(tmp_path, seed, plan(3), extra={"recipe.json": '{"name": "toy"}'}).run()
    assert json.loads((summary.checkpoint / "recipe.json").read_text()) == {"name": "toy"}


def test_a_plan_is_read_from_a_recipe() -> None:
    registries = {"optim": OPTIMS, "schedule": SCHEDULES, "precision": PRECISIONS, "budget": BUDGETS, "run": RUNS}
    values = {"optim": {"kind": "muon", "lr": 0.01}, "budget": {"seconds": 60}}
    recipe = Recipe.from_values("toy", values, registries=registries)
    read_back = Plan.of(recipe)
    assert (
        read_back.optim == OPTIMS["muon"](lr=0.01) and read_back.budget == Budget(seconds=60) and read_back.run == RUNS["run"]()
    )
    with pytest.raises(ValueError, match=r"precision=None: expected Precision"):
        Plan.of(Recipe(name="toy", sections={name: section for name, section in recipe.sections.items() if name != "precision"}))


@pytest.mark.parametrize("registry", [OPTIMS, SCHEDULES, PRECISIONS, BUDGETS, RUNS])
def test_every_registered_config_has_defaults_and_survives_json(registry: Any) -> None:
    for kind, config in registry.items():
        made = config()
        assert made.kind == kind
        assert config.model_validate(json.loads(made.model_dump_json())) == made
