"""The laws of a bijection, for every registered one on vectors and images, with and without a condition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fewstep.core.random import CounterRng
from fewstep.nn.bijections import BIJECTIONS
from fewstep.nn.bijections.autoregressive import Autoregressive, MaskedNetwork
from fewstep.nn.bijections.continuous import ContinuousConfig
from fewstep.nn.bijections.coupling import Coupling, alternating, half_channels
from fewstep.nn.bijections.elementwise import Additive, Affine
from fewstep.nn.bijections.layer import Chain, Inverse, Layer, Part
from fewstep.nn.bijections.linear import ActNorm, Diagonal, Mix, Permute, reversal, squeeze
from fewstep.nn.bijections.networks import Perceptron
from fewstep.nn.bijections.spline import RationalQuadratic
from fewstep.nn.bijections.tarflow import PatchAutoregression, TarFlowConfig, patches

SMALL: dict[str, dict[str, Any]] = {  # a kind that is not named here is built with its defaults
    "nice": {"hidden": 8},
    "realnvp": {"hidden": 6, "layers": 3},
    "glow": {"hidden": 6, "steps": 2},
    "maf": {"hidden": 8, "layers": 2},
    "iaf": {"hidden": 8, "layers": 2},
    "nsf": {"hidden": 8, "layers": 2},
    "nsf_ar": {"hidden": 8, "layers": 2},
    "continuous": {"hidden": 8, "steps": 24},
    "tarflow": {"flows": 2, "width": 8, "heads": 2},
}
SHAPES = {"vector": ((5,), 0), "given": ((3,), 2), "image": ((1, 4, 4), 0), "image-given": ((2, 4, 4), 3)}
CASES = [pytest.param(kind, shape, id=f"{kind}-{shape}") for kind in BIJECTIONS for shape in SHAPES]


def shaken(layer: Layer) -> Layer:
    """With weights unlike those it begins with, of which the last layers' are zeros."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.double().eval()


def made(kind: str, shape: str, rows: int = 3, **fields: Any) -> tuple[Layer, Tensor, Tensor | None]:
    """The bijection, rows for it and their conditions."""
    sizes, context = SHAPES[shape]
    layer = shaken(BIJECTIONS[kind](**{**SMALL.get(kind, {}), **fields}).build(shape=sizes, context=context))
    assert (layer.size, layer.context) == (torch.Size(sizes).numel(), context)
    c = torch.randn(rows, context, dtype=torch.float64) if context else None
    return layer, torch.randn(rows, layer.size, dtype=torch.float64), c


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """[B,d,d] of a map whose rows do not depend on one another."""
    whole: Tensor = torch.autograd.functional.jacobian(lambda rows: function(rows).sum(0), x)
    return whole.transpose(0, 1)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_the_inverse_is_one(kind: str, shape: str) -> None:
    layer, x, c = made(kind, shape)
    with torch.no_grad():
        z, log_det = layer(x, c)
        back, log_inverse = layer.inverse(z, c)
        there, _ = layer(layer.inverse(x, c)[0], c)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(there, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_inverse, -log_det, rtol=0, atol=1e-10)
    assert (z - x).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_log_determinants_are_those_of_autograd(kind: str, shape: str) -> None:
    layer, x, c = made(kind, shape)
    forward = torch.linalg.slogdet(jacobian(lambda rows: layer(rows, c)[0], x))
    inverse = torch.linalg.slogdet(jacobian(lambda rows: layer.inverse(rows, c)[0], x))
    torch.testing.assert_close(layer(x, c)[1], forward.logabsdet, rtol=0, atol=1e-9)
    torch.testing.assert_close(layer.inverse(x, c)[1], inverse.logabsdet, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_a_row_alone_is_that_of_the_batch(kind: str, shape: str) -> None:
    layer, x, c = made(kind, shape)
    for way in (layer, layer.inverse):
        together = way(x, c)
        for row in range(len(x)):
            alone = way(x[row : row + 1], None if c is None else c[row : row + 1])
            torch.testing.assert_close(alone[0][0], together[0][row], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(alone[1][0], together[1][row], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_in_single_precision_it_is_still_an_inverse(kind: str, shape: str) -> None:
    layer, x, c = made(kind, shape)
    layer, x, c = layer.float(), x.float(), None if c is None else c.float()
    with torch.no_grad():
        z, log_det = layer(x, c)
        back, log_inverse = layer.inverse(z, c)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-3)
    torch.testing.assert_close(log_inverse, -log_det, rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", BIJECTIONS)
def test_the_condition_changes_every_element(kind: str) -> None:
    """The first too, which has nothing before it. Over many rows: in one alone every unit that hears of c may be off."""
    layer, x, c = made(kind, "given", rows=64)
    assert c is not None
    for way in (layer, layer.inverse):
        before, after = way(x, c), way(x, c + 1)
        assert bool(((before[0] - after[0]).abs().amax(0) > 1e-9).all())
        assert kind == "nice" or (before[1] - after[1]).abs().max() > 1e-9


@pytest.mark.parametrize("kind", BIJECTIONS)
def test_gradcheck(kind: str) -> None:
    layer, x, c = made(kind, "given", **({"steps": 2} if kind == "continuous" else {}))
    x, weight = x[:2].requires_grad_(), torch.randn(3, dtype=torch.float64)
    assert c is not None
    given = c[:2].requires_grad_()

    def both(x: Tensor, c: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        (z, log_det), (y, log_inverse) = layer(x, c), layer.inverse(x, c)
        return (z @ weight).sum(), log_det.sum(), (y @ weight).sum(), log_inverse.sum()

    assert torch.autograd.gradcheck(both, (x, given, *layer.parameters()), fast_mode=True)


def parts_of_flows() -> Chain:
    """A chain of everything that is no flow of its own."""
    networks = [Perceptron(2, 2, Affine.numbers, 0, 8, 1) for _ in range(2)]
    couplings = [Coupling(alternating(4, i), Affine(), network) for i, network in enumerate(networks)]
    parts = [Permute(torch.tensor([2, 0, 3, 1])), Mix((4,)), Mix((2, 1, 2)), ActNorm((2, 1, 2)), Diagonal(4), *couplings]
    return Chain([*parts, Part(2, Diagonal(2)), Inverse(Chain([reversal(4), Mix((4,))]))])


def test_the_laws_of_the_parts() -> None:
    layer, x = shaken(parts_of_flows()), torch.randn(5, 4, dtype=torch.float64)
    z, log_det = layer(x)
    back, log_inverse = layer.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_inverse, -log_det, rtol=0, atol=1e-10)
    wanted = torch.linalg.slogdet(jacobian(lambda rows: layer(rows)[0], x)).logabsdet
    torch.testing.assert_close(log_det, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["maf", "nsf_ar"])
def test_cached_sampling_is_uncached_sampling(kind: str) -> None:
    """Against a whole call of the network for each element."""
    layer, z, c = made(kind, "given")
    assert isinstance(layer, Chain) and c is not None
    for part in layer.layers:
        if not isinstance(part, Autoregressive):
            continue
        x = torch.zeros_like(z)
        for _ in range(part.size):
            x, log_slope = part.transform.inverse(z, part.network(x, c))
        found, log_det = part.inverse(z, c)
        torch.testing.assert_close(found, x, rtol=0, atol=1e-12)
        torch.testing.assert_close(log_det, log_slope.sum(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_cached_sampling_of_patches_is_uncached_sampling(grad: bool) -> None:
    layer, z, c = made("tarflow", "image-given")
    assert isinstance(layer, Chain)
    for part in layer.layers:
        if not isinstance(part, PatchAutoregression):
            continue
        tokens = z.view(-1, *part.shape)
        x = torch.zeros_like(tokens)
        for _ in range(part.shape[0]):  # one more patch is right after each
            mu, alpha = part.moves(x, c)
            x = tokens * alpha.exp() + mu
        with torch.set_grad_enabled(grad):
            found, _ = part.inverse(z, c)
        torch.testing.assert_close(found, x.flatten(1), rtol=0, atol=1e-10)


def test_the_sequential_way_costs_no_more_than_the_parallel_one() -> None:
    layer = Autoregressive(MaskedNetwork(12, 2, 0, 48, 2), Affine(), 12).eval()
    x, counts = torch.randn(2, 12), []
    for way in (layer.forward, layer.inverse):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            way(x)
        counts.append(counter.get_total_flops())
    assert 0 < counts[1] < counts[0]


@pytest.mark.parametrize("probes", [1, 4])
def test_an_estimated_trace_is_that_of_its_row_and_right_on_average(probes: int, seed: int) -> None:
    config = ContinuousConfig(hidden=8, steps=4)
    exact = shaken(config.build(shape=(3,)))
    guess = config.model_copy(update={"probes": probes}).build(shape=(3,)).double()
    guess.load_state_dict(exact.state_dict())
    x, rows = torch.randn(1, 3, dtype=torch.float64), 4000
    with pytest.raises(ValueError, match=r"^rng=None: [^\n]*; [^\n]*$"):
        guess(x)
    rng = CounterRng.seeded(range(seed, seed + rows))
    with torch.no_grad():
        z, log_det = guess(x.expand(rows, -1), None, rng)
        _, alone = guess(x, None, rng.fork(torch.tensor([7])))
        wanted, right = exact(x)
    torch.testing.assert_close(z, wanted.expand(rows, -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det[7:8], alone, rtol=0, atol=1e-12)
    assert log_det.std() > 1e-6
    assert abs(float(log_det.mean() - right)) < 5 * float(log_det.std()) / rows**0.5 + 1e-9


def test_maps_that_nothing_could_invert_are_refused() -> None:
    network = Perceptron(2, 2, 1, 0, 4, 1)
    for moves, told in ((torch.ones(4, dtype=torch.bool), "every"), (torch.zeros(4, dtype=torch.bool), "no")):
        with pytest.raises(ValueError, match=rf"^mask: moves {told} element of 4; [^\n]*$"):
            Coupling(moves, Additive(), network)
    for weight in (torch.ones(2, 2), torch.tensor([[1.0, 2.0], [torch.nan, 1.0]])):
        with pytest.raises(ValueError, match=r"^weight: pivots [^\n]* no inverse, give another$"):
            Mix((2,), weight)
    with pytest.raises(ValueError, match=r"^weight: shape \(2, 3\), expected \(2, 2\); [^\n]*$"):
        Mix((2,), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^order: not a permutation of 0\.\.2; [^\n]*$"):
        Permute(torch.tensor([0, 2, 2]))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^shape=\(1, 3, 4\): a side of odd length [^\n]*; [^\n]*$"):
        squeeze((1, 3, 4))
    with pytest.raises(ValueError, match=r"^patch=3: does not divide the sides \(4, 4\); [^\n]*$"):
        patches((1, 4, 4), 3)
    with pytest.raises(ValueError, match=r"^hidden=3: fewer units than the 4 elements [^\n]*; [^\n]*$"):
        MaskedNetwork(4, 2, 0, 3, 1)
    with pytest.raises(ValueError, match=r"^layers: sizes \[2, 3\]; [^\n]*$"):
        Chain([Diagonal(2), Diagonal(3)])
    with pytest.raises(ValueError, match=r"^bins=1: [^\n]*; [^\n]*$"):
        RationalQuadratic(bins=1)
    with pytest.raises(ValueError, match=r"^x: the first batch [^\n]*; [^\n]*$"):
        ActNorm((3,)).train()(torch.randn(1, 3))
    for kind in BIJECTIONS:
        with pytest.raises(ValueError, match=r"^shape=[^\n]*; [^\n]*$"):
            BIJECTIONS[kind]().build(shape=())
    with pytest.raises(ValueError, match=r"^mask: moves [^\n]*; [^\n]*$"):
        BIJECTIONS["nice"]().build(shape=(1,))  # one element has no other to be steered by


def test_masks() -> None:
    assert alternating(5, 0).tolist() == [False, True, False, True, False]
    assert half_channels((3, 1, 1), 0).tolist() == [False, True, True]
    assert half_channels((3, 1, 1), 1).tolist() == [True, False, False]
    assert patches((1, 2, 4), 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert TarFlowConfig(patch=2).build(shape=(6,)).size == 6
