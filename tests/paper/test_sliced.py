"""Sliced score matching on a Gaussian, whose score is known: what it is least for, what it equals, which form varies less."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.diffusion.parameterisations import Point
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.training.objectives.sliced import SlicedConfig

MEAN, DEVIATION = 0.3, 0.7
MODELS = [("ve", "score"), ("ve", "eps"), ("vp", "v"), ("edm", "edm")]


def rows(seed: int, count: int) -> CounterRng:
    return CounterRng.seeded([seed]).fork(torch.zeros(count, dtype=torch.int64)).at(torch.arange(count))


def gaussian(process: str, parameterisation: str, shift: float = 0.0, scale: float = 0.0) -> Denoiser:
    """The exact denoiser of data N(MEAN, DEVIATION^2), its score grown by a share `scale` and shifted by `shift` deviations."""
    config = {"backbone": {"kind": "points", "width": 8}, "process": process, "parameterisation": parameterisation}
    built = parse(DenoiserConfig, config).build().double()

    def denoiser(label: Tensor | None = None) -> Any:
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = built.process.alpha(t)[:, None], built.process.sigma(t)[:, None]
            spread = torch.hypot(alpha * DEVIATION, sigma)
            score = -(1 + scale) * (x - alpha * MEAN) / spread**2 + shift / spread
            return (x + sigma**2 * score) / alpha

        return denoise

    built.denoiser = denoiser  # type: ignore[method-assign, assignment]
    return built


def data(count: int, seed: int) -> Batch:
    x = MEAN + DEVIATION * rows(seed, count).split("x").normal(2)
    return Batch(torch.arange(count)[:, None], extra={"x": x})


@pytest.mark.parametrize("form", ["plain", "reduced"])
@pytest.mark.parametrize(("process", "parameterisation"), MODELS)
def test_the_minimiser_on_a_gaussian_is_its_score(process: str, parameterisation: str, form: str, seed: int) -> None:
    """A score shifted or scaled costs more, as a square does, and by as much as denoising score matching says."""
    count, aim = 4000, parse(SlicedConfig, {"form": form, "times": "uniform"}).build()

    def sliced(**off: float) -> float:
        return float(aim.loss(gaussian(process, parameterisation, **off), data(count, seed), rows(seed, count)).value.detach())

    for name in ("shift", "scale"):
        less, least, more = (sliced(**{name: by}) for by in (-0.4, 0.0, 0.4))
        assert less > least < more
        slope, bend = (more - less) / 0.8, (more + less - 2 * least) / 0.16
        assert abs(slope) < 0.3 * bend


def denoising(model: Denoiser, count: int, seed: int) -> float:
    """The weighted error of the model's output, by the parameterisation's own example."""
    process, means, rng = model.process, model.parameterisation, rows(seed, count)
    at = Point(process, SlicedConfig(times="uniform").drawn(process, rng.split("time").uniform()))
    example = means.example(process, data(count, seed).extra["x"], at.t, process.noise((2,), rng.split("noise")))
    c_skip, c_out = (c[:, None] for c in means.unmix(at))
    output = (model(example.x_t, at.t) - c_skip * example.x_t) / c_out
    return float((example.weight * (output - example.target).square().mean(1)).mean())


@pytest.mark.parametrize(("process", "parameterisation"), MODELS)
def test_what_it_loses_is_what_denoising_loses(process: str, parameterisation: str, seed: int) -> None:
    """Two scores differ by the same in both losses, in expectation, so that the weights are the parameterisation's."""
    count, aim = 20_000, SlicedConfig(times="uniform").build()
    exact, off = gaussian(process, parameterisation), gaussian(process, parameterisation, shift=1.5)
    lost = [float(aim.loss(model, data(count, seed), rows(seed, count)).value.detach()) for model in (exact, off)]
    wanted = denoising(off, count, seed) - denoising(exact, count, seed)
    assert lost[1] - lost[0] == pytest.approx(wanted, rel=0.1)


def test_the_reduced_form_varies_less(seed: int) -> None:
    """On an isotropic Gaussian the reduced form does not depend on the signs of a direction at all."""
    model, found = gaussian("ve", "score"), dict[str, Tensor]()
    for form in ("plain", "reduced"):
        aim = parse(SlicedConfig, {"form": form, "times": "uniform"}).build()
        probed = [_Probed(rows(seed, 8), n) for n in range(12)]
        found[form] = torch.stack([aim.loss(model, data(8, seed), rng).value.detach() for rng in probed])  # type: ignore[arg-type]
    assert float(found["reduced"].std()) < 1e-9 * float(found["plain"].std())
    assert float(found["plain"].mean()) != float(found["reduced"].mean())


class _Probed:
    """Draws whose directions alone are others."""

    def __init__(self, inner: CounterRng, number: int) -> None:
        self._inner, self._number = inner, number

    def split(self, stream: str) -> CounterRng:
        own = self._inner.split(stream)
        return own.at(1000 + self._number) if stream == "probe" else own
