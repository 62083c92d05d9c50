"""The laws of a flow as a density: it integrates to 1, its samples are its own, units and bad input are told."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.models.flow import Flow, FlowConfig
from fewstep.nn.bijections import BIJECTIONS
from fewstep.training.objectives.likelihood import LikelihoodConfig

SMALL: dict[str, dict[str, Any]] = {  # a kind that is not named here is built with its defaults
    "realnvp": {"layers": 3},
    "glow": {"steps": 2},
    "continuous": {"hidden": 8},
    "tarflow": {"flows": 2, "width": 8, "heads": 2},
}


def flow(kind: str = "nsf", **fields: Any) -> Flow:
    """With weights unlike those it begins with."""
    part = {"kind": kind, **SMALL.get(kind, {})}
    made = parse(FlowConfig, {"bijections": [part], "standardise": False, **fields}).build().double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def grid(reach: float, cells: int) -> tuple[Tensor, float]:
    """The middles [N,2] of the squares of a board, and their area."""
    side = 2 * reach / cells
    middles = torch.arange(cells, dtype=torch.float64).add(0.5).mul(side) - reach
    return torch.cartesian_prod(middles, middles), side * side


@pytest.mark.parametrize("base", ["gaussian", "logistic"])
@pytest.mark.parametrize("kind", BIJECTIONS)
def test_the_density_integrates_to_one(kind: str, base: str) -> None:
    reach = 9.0 if base == "gaussian" else 24.0
    points, area = grid(reach, 120)
    model = flow(kind, base=base, context=1)
    with torch.no_grad():
        total = area * model.log_prob(points, torch.full((len(points), 1), 0.5, dtype=torch.float64)).exp().sum()
    assert abs(float(total) - 1) < 0.02


@pytest.mark.parametrize("kind", BIJECTIONS)
def test_a_sample_is_that_of_its_row(kind: str, seed: int) -> None:
    model = flow(kind, context=2, noise=0.1 if kind == "tarflow" else 0.0)
    rng, c = CounterRng.seeded(range(seed, seed + 4)), torch.randn(4, 2, dtype=torch.float64)
    together = model.sample(rng, c)
    for row in range(4):
        alone = model.sample(rng.fork(torch.tensor([row])), c[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-10, atol=1e-10)
    assert together.std(0).min() > 0
    assert (model.sample(rng, c + 1) - together).abs().max() > 1e-6
    torch.testing.assert_close(model.sample(rng, c), together, rtol=0, atol=0)


@pytest.mark.parametrize("base", ["gaussian", "logistic"])
def test_temperature_scales_the_latents(base: str, seed: int) -> None:
    model, rng = flow(base=base), CounterRng.seeded(range(seed, seed + 6))
    latents = {heat: model.encode(model.sample(rng, temperature=heat))[0] for heat in (0.0, 0.5, 1.0)}
    torch.testing.assert_close(latents[0.5], 0.5 * latents[1.0], rtol=0, atol=1e-9)
    torch.testing.assert_close(latents[0.0], torch.zeros(6, 2, dtype=torch.float64), rtol=0, atol=1e-9)
    for heat in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^temperature=[^\n]*; [^\n]*$"):
            model.sample(rng, temperature=heat)


@pytest.mark.parametrize("base", ["gaussian", "logistic"])
def test_latents_follow_the_base_law(base: str, seed: int) -> None:
    """Mean and variance within five standard errors, and the share below 0.5 too."""
    model, count = flow(base=base), 4000
    z = model.encode(model.sample(CounterRng.seeded(range(seed, seed + count))))[0].flatten()
    variance, kurtosis = (1.0, 3.0) if base == "gaussian" else (math.pi**2 / 3, 4.2)
    share = 0.5 * (1 + math.erf(0.5 / math.sqrt(2))) if base == "gaussian" else 1 / (1 + math.exp(-0.5))
    n = 2 * count
    assert abs(float(z.mean())) < 5 * math.sqrt(variance / n)
    assert abs(float(z.square().mean()) - variance) < 5 * variance * math.sqrt((kurtosis - 1) / n)
    assert abs(float((z < 0.5).double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / n)


def test_bits_per_dimension_have_no_offset(seed: int) -> None:
    """A flow that is the uniform law on 0 .. 255 scores 8 bits: the logit of a uniform number is logistic."""
    config = {"shape": (1, 2, 2), "levels": 256, "logit": 1e-9, "base": "logistic", "standardise": False}
    model = parse(FlowConfig, {**config, "bijections": ["nice"]}).build().double().eval()
    rng = CounterRng.seeded(range(seed, seed + 50))
    x = (256 * rng.split("x").uniform(1, 2, 2)).floor()
    torch.testing.assert_close(model.bits_per_dim(x, rng=rng), torch.full((50,), 8.0, dtype=torch.float64), rtol=0, atol=1e-4)
    sample = model.sample(rng)
    assert torch.equal(sample, sample.floor()) and sample.min() >= 0 and sample.max() <= 255


@pytest.mark.parametrize("fields", [{"levels": 17}, {"levels": 17, "logit": 0.05}, {"logit": 0.05}, {}])
def test_what_stands_between_data_and_flow_is_in_the_density(fields: dict[str, Any], seed: int) -> None:
    model = flow("nsf_ar", shape=(3,), **fields)
    top = fields.get("levels", 0) or 1
    x = top * CounterRng.seeded([seed, seed + 1]).uniform(3)
    jacobian = torch.autograd.functional.jacobian(lambda rows: model.encode(rows)[0].sum(0), x).transpose(0, 1)
    z, log_det = model.encode(x)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.decode(z), x, rtol=0, atol=1e-9)


def test_the_objective_is_the_mean_surprise(seed: int) -> None:
    rng, c = CounterRng.seeded(range(seed, seed + 5)), torch.randn(5, 2, dtype=torch.float64)
    x = torch.randint(17, (5, 1, 2, 2)).double()
    model, objective = flow("maf", shape=(1, 2, 2), context=2, levels=17), LikelihoodConfig().build()
    loss = objective.loss(model, Batch(torch.arange(5)[:, None], extra={"x": x, "c": c}), rng)
    torch.testing.assert_close(loss.value, -model.log_prob(model.corrupted(x, rng), c).mean(), rtol=0, atol=0)
    torch.testing.assert_close(loss.metrics["bits_per_dim"], model.bits_per_dim(x, c, rng).mean(), rtol=1e-12, atol=0)
    assert loss.units == 5
    with pytest.raises(ValueError, match=r"^batch: no 'x'; [^\n]*$"):
        objective.loss(model, Batch(torch.zeros(2, 3, dtype=torch.int64)), rng)
    objective.load_state_dict(objective.state_dict())
    with pytest.raises(ValueError, match=r"^objective state [^\n]*; [^\n]*$"):
        objective.load_state_dict({"steps": 1})


def test_denoising_a_gaussian_is_its_posterior_mean() -> None:
    """A flow that is N(m, s^2) exactly: the clean row given a noisy one has the mean of two Gaussians' product."""
    model = parse(FlowConfig, {"bijections": ["nice"], "standardise": False, "noise": 0.5}).build().double().eval()
    with torch.no_grad():
        scale: Any = dict(model.named_parameters())["bijection.layers.0.layers.4.log_scale"]
        scale.fill_(-math.log(2.0))  # noisy rows are N(0, 4), so clean ones N(0, 3.75)
    x = torch.randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(model.denoise(x), x * 3.75 / 4, rtol=0, atol=1e-12)


def test_a_flow_survives_its_directory(tmp_path: Path) -> None:
    model = flow("glow", shape=(1, 4, 4), context=3).float()
    model.save(tmp_path)
    again = Flow.load(tmp_path)
    x, c = torch.randn(2, 1, 4, 4), torch.randn(2, 3)
    assert torch.equal(again.log_prob(x, c), model.log_prob(x, c)) and again.config == model.config
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no safetensors file"):
        Flow.load(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_named(value: float, seed: int) -> None:
    model, x = flow(context=1), torch.zeros(3, 2, dtype=torch.float64)
    c = x[:, :1].clone()
    x[1, 0] = value
    with pytest.raises(ValueError, match=rf"^x: row 1 holds {value}, [^\n]*; correct the data$"):
        model.log_prob(x, c)
    with pytest.raises(ValueError, match=rf"^z: row 1 holds {value}, [^\n]*$"):
        model.decode(x, c)
    c[2] = value
    with pytest.raises(ValueError, match=rf"^c: row 2 holds {value}, [^\n]*$"):
        model.log_prob(torch.zeros_like(x), c)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"^log_prob: row 0 holds nan, [^\n]*; the weights have diverged[^\n]*$"):
        model.log_prob(torch.zeros_like(x), torch.zeros_like(c))
    with pytest.raises(ValueError, match=r"^sample: row 0 holds nan, [^\n]*$"):
        model.sample(CounterRng.seeded([seed]), c[:1])


def test_bad_rows_are_refused(seed: int) -> None:
    model, rng = flow(context=2), CounterRng.seeded([seed])
    with pytest.raises(ValueError, match=r"^c: shape None, expected \(3, 2\); [^\n]*$"):
        model.log_prob(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"^c: shape \(1, 2\), expected None; [^\n]*$"):
        flow().sample(rng, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"^x: rows of shape \(3,\), expected \(2,\); [^\n]*$"):
        flow().log_prob(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"^z: rows of shape \(3,\), expected \(2,\); [^\n]*$"):
        flow().decode(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"^x: row 1 leaves \[0, 1\][^\n]*; [^\n]*$"):
        flow(logit=0.1).log_prob(torch.tensor([[0.0, 1.0], [0.5, 1.5]], dtype=torch.float64))
    for wrong in (0.5, -1.0, 4.0):
        with pytest.raises(ValueError, match=r"^x: row 0 has a value that is no whole number from 0 to 3; [^\n]*$"):
            flow(levels=4).bits_per_dim(torch.tensor([[1.0, wrong]], dtype=torch.float64), rng=rng)
    with pytest.raises(ValueError, match=r"^rng=None: [^\n]*; [^\n]*$"):
        flow(levels=4).bits_per_dim(torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"bijections": []}, r"^bijections=\(\): empty; "),
        ({"bijections": ["nfs"]}, r"^bijections\.0='nfs': not known; did you mean 'nsf'\?"),
        ({"shape": ()}, r"^shape=\(\): no elements; "),
        ({"levels": 4, "noise": 0.1}, r"^noise=0\.1: [^\n]*; "),
        ({"logit": 0.5}, r"^logit=0\.5: "),
    ],
)
def test_a_bad_config_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as refusal:
        parse(FlowConfig, fields)
    assert "\n" not in str(refusal.value)
