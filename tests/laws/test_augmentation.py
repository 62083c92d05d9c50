"""Augmented images: what the numbers say was done, that zeros mean nothing was, and that samples are told zeros."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.training.objectives.augmentation import augment


def rows(seed: int, count: int) -> CounterRng:
    return CounterRng.seeded([seed]).fork(torch.zeros(count, dtype=torch.int64)).at(torch.arange(count))


def images(seed: int, count: int, height: int = 6, width: int = 8) -> Tensor:
    return rows(seed, count).split("x").normal(2, height, width)


def test_zeros_mean_that_nothing_was_done(seed: int) -> None:
    x = images(seed, 400)
    moved, told = augment(x, 0.15, rows(seed, 400))
    still = (told == 0).all(1)
    assert told.shape == (400, 9) and abs(float(still.double().mean()) - 0.85**6) < 6 * math.sqrt(0.25 / 400)
    assert torch.equal(moved[still], x[still])
    assert bool(((moved - x).flatten(1).abs().amax(1) > 1e-6)[~still].all())
    unmoved, nothing = augment(x, 0.0, rows(seed, 400))
    assert torch.equal(unmoved, x) and not bool(nothing.any())


def test_flips_are_flips(seed: int) -> None:
    x = images(seed, 3000)
    moved, told = augment(x, 0.3, rows(seed, 3000))
    flips, others = told[:, :2] != 0, told[:, 2:].any(1)
    for wanted, axes in (((True, False), [3]), ((False, True), [2]), ((True, True), [2, 3])):
        only = (flips == torch.tensor(wanted)).all(1) & ~others
        assert int(only.sum()) > 10
        torch.testing.assert_close(moved[only], x[only].flip(axes), rtol=1e-9, atol=1e-9)


def test_the_numbers_determine_what_was_done(seed: int) -> None:
    """A smooth image, moved, is the image at the places that the numbers name; turns keep lengths in pixels, not in sides."""
    height, width, count = 24, 32, 60
    across, down = torch.meshgrid(torch.arange(width).double(), torch.arange(height).double(), indexing="xy")
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2]).double()

    def picture(places: Tensor) -> Tensor:
        """[..., 2] pixels from the middle -> a smooth bump beside it, which bilinear sampling hardly blurs."""
        return torch.exp(-((places - torch.tensor([3.0, 2.0])) / torch.tensor([6.0, 5.0])).square().sum(-1) / 2)

    places = torch.stack((across, down), -1) - centre
    moved, told = augment(picture(places).expand(count, 1, height, width), 0.5, rows(seed, count))
    near = places.square().sum(-1).sqrt() < 6
    for image, numbers in zip(moved, told, strict=True):
        scale, cos, sin, along = 2 ** -numbers[2], 1 + numbers[3], numbers[4], numbers[5:7]
        strength = along.norm()
        axis = along / strength.clamp(min=1e-9)
        stretched = places + (2**-strength - 1) * (places @ axis)[..., None] * axis
        turned = torch.stack(
            (cos * stretched[..., 0] - sin * stretched[..., 1], sin * stretched[..., 0] + cos * stretched[..., 1]), -1
        )
        old = (1 - 2 * numbers[:2]) * scale * turned + numbers[7:] * torch.tensor([width, height])
        inside = near & (old.abs() < centre).all(-1)
        torch.testing.assert_close(image[0][inside], picture(old)[inside], rtol=0, atol=0.02)


def test_samples_are_told_zeros(seed: int) -> None:
    """A network that only repeats what it is told says nothing when it denoises."""
    config = {"shape": (1, 4, 4), "told": "augmentation", "backbone": {"kind": "points", "width": 8}}
    model: Denoiser = parse(DenoiserConfig, config).build()
    seen: list[Tensor | None] = []
    inner = model.network

    def network(
        x: Tensor, c_noise: Tensor, label: Tensor | None = None, told: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        seen.append(told)
        return inner(x, c_noise, label, told)

    model.network = network  # type: ignore[method-assign]
    model(torch.randn(2, 1, 4, 4), torch.tensor([0.5, 0.1]))
    assert seen == [None]


def test_what_is_no_image_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"^objective.augmented: [^\n]*; [^\n]*$"):
        augment(torch.randn(3, 2), 0.1, rows(seed, 3))
