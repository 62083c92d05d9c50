"""Reflow: the pairs that a teacher makes, the straight lines refitted on them, and how straight a path is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.decode.denoise import denoise, sample
from fewstep.diffusion.grids import UniformConfig
from fewstep.diffusion.processes import PROCESSES, EDMConfig, FlowConfig, VPConfig, translate
from fewstep.diffusion.solvers.ode import DEISConfig, EulerConfig
from fewstep.diffusion.straightness import straightness
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.training.data.coupling import CouplingConfig, Teacher, couple
from fewstep.training.objectives.denoising import DenoisingConfig

MEAN, DEVIATION = 0.5, 0.3
WHOLE = {"kind": "uniform", "most": 1e300}  # from t = 1 to t = 0


def model(seed: int = 0, classes: int = 0, scale: float = 1.0) -> Denoiser:
    torch.manual_seed(seed)
    config = {"backbone": {"kind": "points", "width": 8}, "process": "flow", "parameterisation": "velocity", "scale": scale}
    made = parse(DenoiserConfig, {**config, "shape": (1,), "classes": classes}).build().double()
    with torch.no_grad():
        made.backbone.out.weight.normal_(std=0.1)  # type: ignore[operator, union-attr]
    return made


def moving(velocity: Any) -> Denoiser:
    """A model of the velocity v(x, t)."""
    made = model()

    def network(x: Tensor, t: Tensor, label: Any = None, told: Any = None) -> tuple[Tensor, None]:
        return velocity(x, t[:, None]), None

    made.network = network  # type: ignore[method-assign]
    return made


def of_a_gaussian(x: Tensor, t: Tensor) -> Tensor:
    """eps - x_0 in expectation, for data N(MEAN, DEVIATION^2)."""
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    return (t - (1 - t) * DEVIATION**2) / variance * (x - (1 - t) * MEAN) - MEAN


def of_its_pairs(x: Tensor, t: Tensor) -> Tensor:
    """eps - x_0 where x_0 = MEAN + DEVIATION eps, along the straight lines between them."""
    eps = (x - (1 - t) * MEAN) / ((1 - t) * DEVIATION + t)
    return eps - (MEAN + DEVIATION * eps)


def rows(seed: int, count: int) -> CounterRng:
    return CounterRng.seeded(range(seed, seed + count))


def test_pairs_are_where_the_ode_of_a_gaussian_leads(seed: int) -> None:
    pairs = Teacher(parse(CouplingConfig, {"steps": 60, "grid": WHOLE, "seed": seed}), moving(of_a_gaussian))(torch.arange(50))
    eps = pairs.extra["eps"]
    assert float(((pairs.extra["x"] - MEAN) / eps - DEVIATION).abs().max()) < 2e-3  # the ODE is linear: whatever eps is
    assert float(eps.std()) > 0.3


def test_what_is_refitted_is_straight(seed: int) -> None:
    """Lines between the pairs never cross: the exact velocity has no error left, its paths are straight, one step is exact."""
    teacher = Teacher(parse(CouplingConfig, {"steps": 200, "grid": WHOLE, "seed": seed}), moving(of_a_gaussian))
    student, pairs = moving(of_its_pairs), teacher(torch.arange(64))
    losses = []
    for pairing, network in (("given", student), ("independent", moving(of_a_gaussian))):
        aim = parse(DenoisingConfig, {"pairing": pairing, "times": "uniform"}).build()
        losses.append(float(aim.loss(network, pairs, rows(seed, 64)).value))
    assert losses[0] < 1e-5 < 0.01 < losses[1]
    flow, eps = FlowConfig(), pairs.extra["eps"]
    for grid in (torch.tensor([1.0, 0.0]).double(), UniformConfig(most=1e300).build(flow, 7)):
        path = [event.payload.x for event in denoise(student.denoiser(), flow, EulerConfig().build(), grid, eps, rows(0, 64))]
        assert float(straightness(flow, grid, path).max()) < 1e-20
        torch.testing.assert_close(path[-1], MEAN + DEVIATION * eps, rtol=1e-9, atol=1e-12)
    before = UniformConfig(most=1e300).build(flow, 40)
    bent = moving(of_a_gaussian).denoiser()
    path = [event.payload.x for event in denoise(bent, flow, EulerConfig().build(), before, eps, rows(0, 64))]
    assert float(straightness(flow, before, path).mean()) > 0.01


@pytest.mark.parametrize("process", ["flow", "edm", "vp"])
def test_the_straightness_of_a_gaussians_paths(process: str, seed: int) -> None:
    """Its path is x_t = (1 - t) MEAN + s(t) e with s^2 = (1 - t)^2 DEVIATION^2 + t^2: the variance of ds/dt, on any process."""
    own, flow, eps = PROCESSES[process](), FlowConfig(), rows(seed, 5).normal(1)
    grid = UniformConfig(most=30.0, least=0.01, to_zero=False).build(flow, 200)
    grid = own.time(flow.sigma(grid) / flow.alpha(grid))
    denoiser = translate(moving(of_a_gaussian).denoiser(), flow, own)
    clock = own.sigma(grid) / (own.sigma(grid) + own.alpha(grid))
    s = torch.sqrt((1 - clock) ** 2 * DEVIATION**2 + clock**2)
    start = ((1 - clock[0]) * MEAN + s[0] * eps) * (own.alpha(grid[0]) + own.sigma(grid[0]))
    path = [event.payload.x for event in denoise(denoiser, own, DEISConfig().build(), grid, start, rows(0, 5))]
    whole = clock[0] - clock[-1]
    t = torch.linspace(float(clock[-1]), float(clock[0]), 20001, dtype=torch.float64)
    rate = (t - (1 - t) * DEVIATION**2) / torch.sqrt((1 - t) ** 2 * DEVIATION**2 + t**2)
    wanted = (whole * eps[:, 0]) ** 2 * rate.var()
    torch.testing.assert_close(straightness(own, grid, path), wanted, rtol=5e-3, atol=1e-6)


def test_a_straight_path_at_even_speed_has_none_and_a_path_of_another_length_is_refused() -> None:
    edm, flow = EDMConfig(), FlowConfig()
    t = torch.tensor([0.9, 0.5, 0.2, 0.1]).double()
    lines = (1 - t)[:, None, None] * torch.tensor([[2.0, 1.0]]) + t[:, None, None] * torch.tensor([[0.3, -1.0]])
    assert float(straightness(flow, t, list(lines))) < 1e-25
    assert float(straightness(edm, t, list(lines))) < 1e-25  # x / (alpha + sigma) is on the same lines
    assert float(straightness(VPConfig(), t, list(lines))) > 1e-3
    with pytest.raises(ValueError, match=r"^path: 3 places[^\n]*; [^\n]*$"):
        straightness(flow, t, list(lines)[:3])


SMALL = {"count": 10, "held_out": 3, "shard": 4, "steps": 3}


def test_kept_pairs_are_those_made_anew(tmp_path: Path, seed: int) -> None:
    """Whether they were kept, interrupted, damaged or never stored; a longer coupling takes up a shorter one."""
    teacher = model(seed, classes=3, scale=2.0)
    config = parse(CouplingConfig, {**SMALL, "seed": seed})

    def interrupted(made: int, total: int) -> None:
        if made == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        couple(config, teacher, tmp_path, interrupted)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    written = [file.stat().st_mtime_ns for file in files]
    files[0].write_bytes(files[0].read_bytes()[:-1])
    seen: list[int] = []
    kept = couple(config, teacher, tmp_path, lambda made, total: seen.append(made))
    assert seen == [4, 8, 12, 13] and files[1].stat().st_mtime_ns == written[1] and files[0].stat().st_mtime_ns != written[0]
    fresh = couple(config.model_copy(update={"count": 0}), teacher, tmp_path)
    assert kept.shape == fresh.shape == (1,) and kept.context == 3
    for one, other in zip(kept.validation(2), fresh.validation(2), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.extra.keys() == {"eps", "x", "c"}
        for name in one.extra:
            torch.testing.assert_close(one.extra[name], other.extra[name], rtol=1e-12, atol=1e-12)
    batches = [kept.train(5, seed).batch(step) for step in range(4)]
    assert sorted(_numbers(batches[:2])) == list(range(3, 13))
    assert _numbers(batches[2:]) != _numbers(batches[:2]) and _numbers([fresh.train(5, seed).batch(1)]) == list(range(8, 13))
    own = Teacher(config, teacher)(batches[3].tokens[:, 0])
    torch.testing.assert_close(own.extra["x"], batches[3].extra["x"], rtol=1e-12, atol=1e-12)
    longer = couple(config.model_copy(update={"count": 13}), teacher, tmp_path)
    assert len(sorted(tmp_path.rglob("*.safetensors"))) == 4 and _numbers(longer.validation(9)) == [0, 1, 2]


def _numbers(batches: Any) -> list[int]:
    return [int(number) for batch in batches for number in batch.tokens[:, 0]]


def test_pairs_belong_to_their_teacher_and_settings(seed: int) -> None:
    config = parse(CouplingConfig, SMALL)
    identities = {
        Teacher(settings, teacher).identity
        for teacher in (model(seed), model(seed + 1))
        for settings in (config, config.model_copy(update={"steps": 4}), config.model_copy(update={"seed": 1}))
    }
    assert len(identities) == 6
    assert Teacher(config.model_copy(update={"count": 99}), model(seed)).identity in identities


def test_classes_are_asked_for_and_told(seed: int) -> None:
    """Pair n is of class n modulo their number, as the teacher samples it."""
    teacher, config = model(seed, classes=3, scale=2.0), parse(CouplingConfig, {**SMALL, "grid": WHOLE})
    pairs = Teacher(config, teacher)(torch.arange(7))
    label = pairs.extra["c"].argmax(1)
    assert label.tolist() == [0, 1, 2, 0, 1, 2, 0]
    grid = UniformConfig(most=1e300).build(teacher.process, 3)
    x = sample(teacher.denoiser(label), teacher.process, DEISConfig().build(), grid, pairs.extra["eps"], rows(0, 7)).payload.x
    torch.testing.assert_close(pairs.extra["x"], 2 * x)


def test_what_is_no_coupling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data='coupling': [^\n]*; [^\n]*$"):
        CouplingConfig().build()
    with pytest.raises(ValueError, match=r"^data.solver='churn': [^\n]*; [^\n]*$"):
        Teacher(parse(CouplingConfig, {"solver": "churn"}), model())
    with pytest.raises(ValueError, match=r"^run.batch=11: [^\n]*; [^\n]*$"):
        couple(parse(CouplingConfig, SMALL), model(), tmp_path).train(11, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^coupling=[^\n]*; [^\n]*$"):
        couple(parse(CouplingConfig, SMALL), model(), tmp_path / "file")
