"""The laws of the objectives of denoisers, each enrolled: the loss falls, checkpoints are bit for bit, rows are their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from train_toy import assert_same_end, plan

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.recipes.run import LEARNT_BY
from fewstep.training.objectives import OBJECTIVES
from fewstep.training.trainer import Trainer, Validation

STRAIGHT = {"process": "flow", "parameterisation": "velocity"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the objective's fields and the model's
    "denoising": ({}, {}),
    "denoising-levels": ({"times": "levels"}, {"process": "ve", "parameterisation": {"kind": "eps", "clock": "half-log"}}),
    "denoising-given": ({"pairing": "given", "times": "uniform"}, STRAIGHT),
    "denoising-augmented": ({"augmented": 0.5}, {"told": "augmentation", "shape": (1, 4, 4)}),
    "sliced": ({}, {}),
    "sliced-plain": ({"form": "plain", "law": "gaussian", "probes": 2}, {"process": "ve", "parameterisation": "score"}),
    "variational": ({"steps": 20}, {"process": "vp", "parameterisation": "eps"}),
    "variational-small": ({"steps": 20, "variance": "small", "level": 0.1}, {"process": "vp", "parameterisation": "v"}),
    "variational-hybrid": ({"steps": 20, "loss": "hybrid"}, {"process": "vp", "parameterisation": "eps", "variance": "learned"}),
    "consistency": ({}, {"parameterisation": "consistency"}),
    "consistency-improved": (
        {"times": "log-normal", "distance": "pseudo-huber", "decay": 0.5, "double_every": 10},
        {"parameterisation": "consistency"},
    ),
    "mean-flow": ({"power": 0.0}, {"told": "gap", **STRAIGHT}),
    "mean-flow-weighted": ({"times": "uniform", "power": 0.5}, {"told": "gap", **STRAIGHT}),
}
ROWS = 64


def objective(name: str) -> Any:
    kind = next(kind for kind in OBJECTIVES if name == kind or name.startswith(f"{kind}-"))
    return parse(OBJECTIVES[kind], CASES[name][0]).build()  # type: ignore[attr-defined]


def model(name: str, seed: int) -> Denoiser:
    torch.manual_seed(seed)
    backbone = {"kind": "points", "width": 16, "depth": 1, "turns": 2.0}
    made = parse(DenoiserConfig, {"backbone": backbone, **CASES[name][1]}).build()
    with torch.no_grad():
        made.backbone.out.weight.normal_(std=0.1)  # type: ignore[operator, union-attr]
    return made


def batch(name: str, number: int = 0) -> Batch:
    """Points around two places; for images, a stroke."""
    shape = CASES[name][1].get("shape", (2,))
    numbers = torch.arange(ROWS) + number * ROWS
    rng = CounterRng.seeded(numbers)
    x = 0.2 * rng.normal(*shape).float() + torch.where(numbers % 2 == 0, -1.0, 1.0).view(-1, *(1,) * len(shape))
    eps = rng.split("eps").normal(*shape).float()
    return Batch(numbers[:, None], extra={"x": x, "eps": eps} if "given" in name else {"x": x})


def rows(seed: int, count: int = ROWS) -> CounterRng:
    return CounterRng.seeded(range(seed, seed + count))


def test_every_objective_of_denoisers_has_its_laws() -> None:
    assert {kind for kind in OBJECTIVES for name in CASES if name == kind or name.startswith(f"{kind}-")} == set(
        LEARNT_BY[DenoiserConfig.kind]
    )


@pytest.mark.parametrize("name", CASES)
def test_the_loss_falls(name: str, seed: int) -> None:
    """On one batch with the same draws, in thirty steps; a moving target is held."""
    network, aim = model(name, seed).train(), objective(name)
    aim.after_step(network)
    optimizer, history = torch.optim.Adam(network.parameters(), lr=3e-3), []
    for _ in range(30):
        loss = aim.loss(network, batch(name), rows(seed))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        history.append(float(loss.value.detach()))
    assert history[-1] < history[0]
    assert loss.units == ROWS and all(not metric.requires_grad and metric.dim() == 0 for metric in loss.metrics.values())


class Numbered:
    """Batch n of the data."""

    def __init__(self, name: str) -> None:
        self._name = name

    def batch(self, step: int) -> Batch:
        return batch(self._name, step)


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_ends_as_an_uninterrupted_one(name: str, tmp_path: Path, seed: int) -> None:
    """Bit for bit, the objective's own state included."""

    def run(directory: Path, steps: int, resume: bool = False) -> Any:
        settings = plan(steps, ema=0.9, checkpoint_steps=2, batch=ROWS, validate_every=2)
        validation = Validation([batch(name, 10**6)])
        parts: Any = {"validation": validation, "console": Console(quiet=True)}
        return Trainer(model(name, seed), objective(name), Numbered(name), settings, directory, **parts).run(resume)

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    assert_same_end(run(tmp_path / "parts", 4, resume=True), whole)


@pytest.mark.parametrize("name", CASES)
def test_a_row_draws_for_itself(name: str, seed: int) -> None:
    network, aim, data = model(name, seed).double(), objective(name), batch(name)

    def value(first: int, last: int) -> Tensor:
        some = Batch(data.tokens[first:last], extra={key: part[first:last] for key, part in data.extra.items()})
        found: Tensor = aim.loss(network, some, rows(seed + first, last - first)).value
        return found

    together, alone = value(0, 5), [value(i, i + 1) for i in range(5)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in CASES if "augmented" not in name])
def test_validation_measures_what_is_trained(name: str, seed: int) -> None:
    """The same value without gradients, and in evaluation where no class is withheld and nothing augmented."""
    network, aim = model(name, seed), objective(name)
    trained = aim.loss(network.train(), batch(name), rows(seed)).value
    with torch.no_grad():
        measured = aim.loss(network.eval(), batch(name), rows(seed)).value
    assert trained.requires_grad and not measured.requires_grad
    torch.testing.assert_close(measured, trained.detach())


@pytest.mark.parametrize("name", CASES)
def test_another_objectives_state_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^objective state \['a'\]: [^\n]*$"):
        objective(name).load_state_dict({"a": torch.ones(1)})


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("denoising-augmented", {"told": "nothing"}, "objective.augmented=0.5"),
        ("denoising-augmented", {"shape": (16,)}, "objective.augmented"),
        ("variational-hybrid", {"variance": "fixed"}, "model.variance='fixed'"),
        ("consistency", {"parameterisation": "edm"}, "model.parameterisation='edm'"),
        ("mean-flow", {"told": "nothing"}, "model.told='nothing'"),
        ("mean-flow", {"process": "vp"}, "model.parameterisation='velocity'"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, fields: dict[str, Any], told: str) -> None:
    backbone = {"kind": "points", "width": 16, "depth": 1}
    network = parse(DenoiserConfig, {"backbone": backbone, **CASES[name][1], **fields}).build()
    data = Batch(torch.arange(4)[:, None], extra={"x": torch.randn(4, *network.shape)})
    with pytest.raises(ValueError, match=rf"^{told}[^\n]*; [^\n]*$"):
        objective(name).loss(network, data, rows(0, 4))


def test_pairs_and_solvers_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match=r"^batch: no 'eps'; [^\n]*coupling[^\n]*$"):
        objective("denoising-given").loss(model("denoising-given", 0), batch("denoising"), rows(0))
    with pytest.raises(ValueError, match=r"^objective.solver='churn': [^\n]*; [^\n]*$"):
        parse(OBJECTIVES["consistency"], {"solver": "churn"}).build()  # type: ignore[attr-defined]
