"""Mixed precision (arXiv:1710.03740): what underflows, what loss scaling saves, and torch's rules for the scale."""

import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from train_toy import ROWS, ToyData, ToyModel, ToyObjective, plan, trainer

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import CounterRng, Rng
from fewstep.training.checkpoint import read
from fewstep.training.health import Diverged
from fewstep.training.optim import AdamWConfig
from fewstep.training.plan import Plan
from fewstep.training.precision import BF16, FP16, FP32, LossScale, Precision, Rounded

_HALVES = (torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulate on every machine: native fp16 is slow on some."""
    monkeypatch.setattr("fewstep.training.precision.arithmetic", lambda dtype, device: dtype == torch.float32)


def test_the_scale_follows_torchs_grad_scaler(seed: int) -> None:
    """The same scale and the same skipped steps as `torch.amp.GradScaler` on 3000 steps with random overflows."""
    chance = random.Random(seed)
    theirs = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=7)
    ours = LossScale(65536.0, 2.0, 0.5, 7)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1e-6)
    for _ in range(3000):
        overflow = chance.random() < 0.1
        assert ours.value == theirs.get_scale()
        theirs.scale(weight.sum()).backward()
        assert weight.grad is not None
        if overflow:
            weight.grad[0] = chance.choice([float("inf"), float("nan")])
        before = weight.detach().clone()
        theirs.step(optimizer)
        theirs.update()
        assert torch.equal(weight, before) == overflow
        ours.update(overflow)
        weight.grad = None
    assert FP16().scale().state_dict() == {"value": 65536.0, "clean": 0}
    defaults = torch.amp.GradScaler("cpu").state_dict()
    settings = FP16()
    assert (settings.init_scale, settings.growth, settings.backoff, settings.interval) == (
        defaults["scale"],
        defaults["growth_factor"],
        defaults["backoff_factor"],
        defaults["growth_interval"],
    )


def test_fp16_flushes_what_is_at_most_two_to_the_minus_25() -> None:
    tiny = torch.tensor([2.0**-24, 2.0**-25 * 1.001, 2.0**-25, 2.0**-26])
    with Rounded(torch.float16):
        rounded = tiny[:, None] @ torch.ones(1, 1)
    assert rounded.flatten().tolist() == [2.0**-24, 2.0**-24, 0.0, 0.0]


@pytest.mark.parametrize("dtype", _HALVES)
def test_emulated_matmuls_equal_rounded_operands_summed_in_fp32(dtype: torch.dtype, seed: int) -> None:
    """Forwards and backwards, against the definition; and nothing but matmuls is touched."""
    generator = torch.Generator().manual_seed(seed)
    x, w, b, up = (torch.randn(*shape, generator=generator) for shape in ((6, 5), (4, 5), (4,), (6, 4)))
    x.requires_grad_(), w.requires_grad_(), b.requires_grad_()

    def r(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).float()

    with Rounded(dtype):
        y = nn.functional.linear(x, w, b)
        outside = x * 3
    torch.testing.assert_close(y, r(r(x) @ r(w).T + r(b)), rtol=0, atol=0)
    assert torch.equal(outside, x * 3)
    with Rounded(dtype):
        y.backward(up)
    torch.testing.assert_close(x.grad, r(r(up) @ r(w)), rtol=0, atol=0)
    torch.testing.assert_close(w.grad, r(r(up).T @ r(x)), rtol=0, atol=0)
    torch.testing.assert_close(b.grad, up.sum(0))


@pytest.mark.parametrize("dtype", _HALVES)
def test_emulation_errs_as_much_as_native_autocast(dtype: torch.dtype, seed: int) -> None:
    """Attention between two projections: the relative error against fp32 agrees with native autocast's within a factor of 1.5."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(2, 4, 48, 16, generator=generator).requires_grad_() for _ in range(3)]
    leaves.append(torch.randn(16, 16, generator=generator).requires_grad_())

    def gradients(forward: Callable[[], object], backward: Callable[[], object]) -> list[Tensor]:
        q, k, v, w = leaves
        with forward():  # type: ignore[attr-defined]
            loss = (scaled_dot_product_attention(q @ w, k, v, is_causal=True) @ w).float().square().mean()
        with backward():  # type: ignore[attr-defined]
            return list(torch.autograd.grad(loss, leaves))

    nothing = torch.enable_grad
    exact = gradients(nothing, nothing)
    native = gradients(lambda: torch.autocast("cpu", dtype), nothing)
    emulated = gradients(lambda: Rounded(dtype), lambda: Rounded(dtype))
    for true, theirs, ours in zip(exact, native, emulated, strict=True):
        error, expected = ((other - true).norm() / true.norm() for other in (ours, theirs))
        assert expected / 1.5 < error < expected * 1.5


_UNSCALED = FP16(init_scale=1.0, growth=1.0)
_SMALL = 5e-6  # a factor on the loss, after which much of the gradient lies below 2^-25


def _gradients(precision: Precision, seed: int) -> list[Tensor]:
    model, rng, scale = ToyModel(seed, dropout=0.0), CounterRng.seeded(range(ROWS)), precision.scale()
    with precision.context(_CPU):
        loss = ToyObjective(factor=_SMALL).loss(model, ToyData(seed).batch(0), rng).value
    with precision.backward(_CPU):
        (loss * (scale.value if scale else 1.0)).backward()
    return [param.grad for param in model.parameters() if param.grad is not None]


def test_without_scaling_half_of_the_tensors_lose_gradients(seed: int, emulated: None) -> None:
    """Unscaled fp16 loses a quarter of the gradient or more on at least half of the tensors; scaled fp16 and bf16 lose under 1%.

    Lost is an entry that is zero and is not in fp32: the embeddings of tokens absent from the batch have no gradient at all.
    """
    reference = _gradients(FP32(), seed)
    present = [grad != 0 for grad in reference]

    def lost(precision: Precision) -> list[Tensor]:
        return [(grad == 0) & there for grad, there in zip(_gradients(precision, seed), present, strict=True)]

    shares = [float(gone.sum() / there.sum()) for gone, there in zip(lost(_UNSCALED), present, strict=True)]
    assert sum(share >= 0.25 for share in shares) >= len(shares) / 2
    for precision in (BF16(), FP16()):
        assert sum(int(gone.sum()) for gone in lost(precision)) < 0.01 * sum(int(there.sum()) for there in present)


def test_scaled_fp16_and_bf16_follow_fp32_within_one_percent(tmp_path: Path, seed: int, emulated: None) -> None:
    """Final training loss over 150 steps of a small loss; without scaling fp16 ends at least 10% worse."""

    def end(name: str, precision: Precision) -> float:
        base = plan(150, clip=0, divergence=0, validate_every=0, log_every=50)
        settings = Plan(AdamWConfig(lr=1e-2, eps=1e-15), base.schedule, precision, base.budget, base.run)
        return trainer(tmp_path / name, seed, settings, objective=ToyObjective(factor=_SMALL)).run().loss

    reference = end("fp32", FP32())
    assert end("fp16", FP16()) == pytest.approx(reference, rel=0.01)
    assert end("bf16", BF16()) == pytest.approx(reference, rel=0.01)
    assert end("unscaled", _UNSCALED) > 1.1 * reference


class Seen(ToyObjective):
    """Keeps the weights of the head as each step found them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        self.weights.append(model.get_parameter("head.weight").detach().clone())
        return super().loss(model, batch, rng)


class Steady(Seen):
    """A loss whose gradient is 1 in every weight of the head, always."""

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        super().loss(model, batch, rng)
        head = model.get_submodule("head")
        return Loss(head(torch.ones(1, 24)).sum(), 1, {})


def _from_far_too_high(directory: Path, seed: int, objective: Seen) -> tuple[list[dict[str, Any]], list[bool], dict[str, float]]:
    """30 steps from a scale of 2^26: their records, whether each but the last moved the weights, the scale at the end."""
    base = plan(30, log_every=1, validate_every=0)
    settings = Plan(base.optim, base.schedule, FP16(init_scale=2.0**26), base.budget, base.run)
    summary = trainer(directory, seed, settings, objective=objective).run()
    records = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    moved = [not torch.equal(*pair) for pair in pairwise(objective.weights)]
    return [record for record in records if record["group"] == "train"], moved, read(summary.checkpoint).state["scale"]


def test_an_overflow_skips_the_step_and_halves_the_scale(tmp_path: Path, seed: int, emulated: None) -> None:
    """Each step whose gradients overflow, and no other: the first ones, and whenever gradients grow again."""
    objective = Seen()
    records, moved, scale = _from_far_too_high(tmp_path, seed, objective)
    fits = [math.isfinite(float(record["grad_norm"])) for record in records]
    assert len(fits) == 30 and not fits[0] and sum(fits) > 10
    assert moved == fits[:-1]
    assert objective.steps == sum(fits), "a skipped step is no step for the objective"
    for step, record in enumerate(records, 1):
        skipped = fits[:step].count(False)
        assert record["skipped"] == skipped and record["loss_scale"] == 2.0 ** (26 - skipped)
    assert scale == {"value": records[-1]["loss_scale"], "clean": [*reversed(fits), False].index(False)}


def test_training_goes_on_once_gradients_fit(tmp_path: Path, seed: int, emulated: None) -> None:
    """A gradient of 1 fits below 2^16, the first power of two that fp16 does not have: eleven halvings, each costing a step."""
    objective = Steady()
    records, moved, scale = _from_far_too_high(tmp_path, seed, objective)
    assert [record["loss_scale"] for record in records] == [2.0 ** (26 - min(step, 11)) for step in range(1, 31)]
    assert [record["skipped"] for record in records] == [min(step, 11) for step in range(1, 31)]
    assert moved == [False] * 11 + [True] * 18 and objective.steps == 19
    assert scale == {"value": 2.0**15, "clean": 19}


def test_overflow_at_every_scale_stops_the_run(tmp_path: Path, seed: int) -> None:
    model = ToyModel(seed)
    model.head.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(Diverged, match=r"step 30: loss scale=3.05e-05: fp16 gradients overflow at any; use precision=bf16"):
        trainer(tmp_path, seed, plan(100, precision="fp16"), model=model).run()
