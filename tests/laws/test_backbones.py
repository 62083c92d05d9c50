"""Every backbone for continuous data: what reaches what, what a row depends on, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.recipe import parse
from fewstep.nn.backbones import BACKBONES

SHAPES = {"points": (2,), "unet": (3, 8, 8), "dit": (3, 8, 8)}
SMALL: dict[str, dict[str, Any]] = {
    "points": {"width": 16},
    "unet": {"width": 8, "attention": 0},
    "dit": {"width": 16, "depth": 2, "query_heads": 2, "hidden": 24},
}
DITS: dict[str, dict[str, Any]] = {
    "attention": {},
    "linear": {"mixers": ["linear"]},
    "mamba": {"mixers": ["mamba"]},
    "hybrid": {"mixers": ["mamba2", "attention"], "depth": 4},
    "trainable": {"position": {"kind": "trainable"}},
    "alibi": {"position": "alibi"},
    "mixed": {"position": "rope_mixed"},
}
CASES = [*((name, {}) for name in BACKBONES), *(("dit", fields) for fields in DITS.values() if fields)]
IDS = [*BACKBONES, *(f"dit-{name}" for name, fields in DITS.items() if fields)]


def made(name: str, fields: dict[str, Any], seed: int, classes: int = 3, *more: int) -> torch.nn.Module:
    """A small backbone in float64 with no weight left at zero."""
    torch.manual_seed(seed)
    network: torch.nn.Module = parse(BACKBONES[name], {**SMALL[name], **fields}).build(SHAPES[name], classes, *more)  # type: ignore[attr-defined]
    network = network.double()
    with torch.no_grad():
        for weight in network.parameters():
            if not weight.any():
                weight.normal_(std=0.3)
    return network


def inputs(name: str, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, *SHAPES[name]).double(), torch.randn(batch).double(), torch.arange(batch) % 4 - 1


@pytest.mark.parametrize(("name", "fields"), CASES, ids=IDS)
def test_a_row_is_its_own_and_every_input_reaches_every_output(name: str, fields: dict[str, Any], seed: int) -> None:
    network, (x, noise, label) = made(name, fields, seed), inputs(name)
    y = network(x, noise, label)
    assert y.shape == x.shape
    for row in range(3):
        alone = network(x[row : row + 1], noise[row : row + 1], label[row : row + 1])
        torch.testing.assert_close(alone[0], y[row], rtol=1e-10, atol=1e-10)
    pixels = x[:1].clone().requires_grad_()
    out = network(pixels, noise[:1], label[:1]).flatten()
    for place in (0, len(out) // 2, len(out) - 1):
        (reach,) = torch.autograd.grad(out[place], pixels, retain_graph=True)
        assert (reach != 0).all()


@pytest.mark.parametrize(("name", "fields"), CASES, ids=IDS)
def test_noise_and_class_are_heard(name: str, fields: dict[str, Any], seed: int) -> None:
    network, (x, noise, label) = made(name, fields, seed), inputs(name)
    y = network(x, noise, label)
    assert ((network(x, noise + 0.1, label) - y).flatten(1).abs().amax(1) > 1e-6).all()
    assert ((network(x, noise, (label + 2) % 3) - y).flatten(1).abs().amax(1) > 1e-6).all()
    torch.testing.assert_close(network(x, noise, None), network(x, noise, torch.full((3,), -1)))


@pytest.mark.parametrize("name", list(BACKBONES))
def test_further_numbers_are_heard_and_zeros_say_nothing(name: str, seed: int) -> None:
    network, (x, noise, label) = made(name, {}, seed, 3, 2, 1), inputs(name)
    y, told = network(x, noise, label), torch.randn(3, 2).double()
    assert torch.equal(network(x, noise, label, torch.zeros_like(told)), y)
    assert ((network(x, noise, label, told) - y).flatten(1).abs().amax(1) > 1e-6).all()
    with pytest.raises(ValueError, match=r"^told: [^\n]*; [^\n]*$"):
        made(name, {}, seed)(x, noise, label, told)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_more_outputs_are_independent_ones(name: str, seed: int) -> None:
    network, (x, noise, label) = made(name, {}, seed, 3, 0, 2), inputs(name)
    first, second = network(x, noise, label).chunk(2, 1)
    assert first.shape == second.shape == x.shape
    for mine, other in ((first, second), (second, first)):
        weights = torch.autograd.grad(mine.sum(), list(network.out.parameters()), retain_graph=True)  # type: ignore[union-attr]
        theirs = torch.autograd.grad(other.sum(), list(network.out.parameters()), retain_graph=True)  # type: ignore[union-attr]
        assert all(not torch.equal(a, b) and bool((a * b == 0).all()) for a, b in zip(weights, theirs, strict=True))


@pytest.mark.parametrize("name", list(BACKBONES))
def test_fresh_ones_say_nothing_and_learn_everywhere(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    network = parse(BACKBONES[name], SMALL[name]).build(SHAPES[name], 2)  # type: ignore[attr-defined]
    x, noise, label = inputs(name)
    x, noise, label = x.float(), noise.float(), label.clamp(max=1)
    assert not network(x, noise, label).any()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(4):  # zeros are left layer by layer
        optimizer.zero_grad()
        ((network(x, noise, label) - x) ** 2).mean().backward()
        optimizer.step()
    assert all(weight.grad is not None and weight.grad.any() for weight in network.parameters())


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("shape", [(4,), (1, 7, 8)])
def test_what_is_no_image_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^shape=[^\n]*; [^\n]*$|^shape=[^\n]*expected[^\n]*$"):
        parse(BACKBONES[name], SMALL[name]).build(shape, 0)  # type: ignore[attr-defined]


def test_labels_outside_the_classes_are_refused(seed: int) -> None:
    network, (x, noise, _) = made("points", {}, seed), inputs("points")
    for label in (-2, 3):
        with pytest.raises(ValueError, match=rf"^label={label}: outside 0 .. 2; [^\n]*$"):
            network(x, noise, torch.tensor([0, label, 0]))
    with pytest.raises(ValueError, match=r"^label: given to a model without classes; [^\n]*$"):
        made("points", {}, seed, classes=0)(x, noise, torch.zeros(3, dtype=torch.int64))
