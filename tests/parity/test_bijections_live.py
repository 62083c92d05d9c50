"""Bijections agree with zuko, nflows and normflows on copied weights: values and log-determinants, both ways."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.nn.bijections.autoregressive import Autoregressive, MaskedNetwork
from fewstep.nn.bijections.coupling import Coupling, sides
from fewstep.nn.bijections.elementwise import Additive, Affine, Elementwise
from fewstep.nn.bijections.layer import Chain, Layer
from fewstep.nn.bijections.linear import Mix, reversal
from fewstep.nn.bijections.networks import Perceptron
from fewstep.nn.bijections.spline import RationalQuadratic

pytestmark = pytest.mark.claims
FEATURES, CONTEXT, HIDDEN = 5, 3, 40
CLOSE = {"rtol": 0.0, "atol": 1e-6}


def rows(count: int, size: int) -> Tensor:
    return torch.randn(count, size, dtype=torch.float64)


def drawn(module: Any) -> Any:
    """In float64, with weights of ordinary size."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module.double().eval()


def copied(theirs: Any, order: Tensor, transform: Elementwise) -> Autoregressive:
    """zuko's masked network in ours: its hidden units sorted by how many elements they see, c before x, elements in `order`."""
    ours = MaskedNetwork(FEATURES, transform.numbers, CONTEXT, HIDDEN, 2).double()
    linear = [layer for layer in theirs.hyper if isinstance(layer, nn.Linear)]
    units = linear[0].mask[:, :FEATURES].sum(1).argsort(stable=True)
    columns = torch.cat([torch.arange(FEATURES, FEATURES + CONTEXT), order])
    outputs = (order[:, None] * transform.numbers + torch.arange(transform.numbers)).flatten()
    places = [(units, columns), (units, units), (outputs, units)]
    with torch.no_grad():
        for layer, source, (out, into) in zip(ours.layers, linear, places, strict=True):
            assert torch.equal(layer.mask, source.mask[out][:, into])
            layer.weight.copy_(source.weight[out][:, into])
            layer.bias.copy_(source.bias[out])
    return Autoregressive(ours, transform, FEATURES, CONTEXT)


@pytest.mark.parametrize("kind", ["MAF", "NICE"])
def test_flows_of_zuko(kind: str) -> None:
    zuko = pytest.importorskip("zuko")
    options: Any = {"transforms": 3, "hidden_features": (HIDDEN, HIDDEN)}
    theirs = drawn(getattr(zuko.flows, kind)(FEATURES, CONTEXT, **options))
    layers: list[Layer] = []
    for part in theirs.transform.transforms:
        if kind == "MAF":
            order = part.order.argsort()
            turned = bool(order[0])
            layer = copied(part, order, Affine(bound=math.log(1e3)))
            layers += [reversal(FEATURES), layer, reversal(FEATURES)] if turned else [layer]
        else:
            network = Perceptron(int(part.mask.sum()), int((~part.mask).sum()), 2, CONTEXT, HIDDEN, 2).double()
            network.layers.load_state_dict(part.hyper.state_dict())
            layers.append(Coupling(~part.mask, Affine(bound=math.log(1e3)), network, CONTEXT))
    ours, x, c = Chain(layers), rows(20, FEATURES), rows(20, CONTEXT)
    with torch.no_grad():
        z, log_det = ours(x, c)
        law = theirs(c)
        wanted, wanted_log_det = law.transform.call_and_ladj(x)
        back, _ = ours.inverse(z, c)
        log_prob = -0.5 * (z.square().sum(1) + FEATURES * math.log(2 * math.pi)) + log_det
        torch.testing.assert_close(law.log_prob(x), log_prob, **CLOSE)
        torch.testing.assert_close(law.transform.inv(z), back, **CLOSE)
    torch.testing.assert_close(z, wanted, **CLOSE)
    torch.testing.assert_close(log_det, wanted_log_det, **CLOSE)
    print(f"zuko {kind}: {float((z - wanted).abs().max()):.1e}, log-det {float((log_det - wanted_log_det).abs().max()):.1e}")


@pytest.mark.parametrize("bins", [3, 8])
@pytest.mark.parametrize("inverse", [False, True])
def test_splines_of_nflows_and_normflows(bins: int, inverse: bool) -> None:
    spline = RationalQuadratic(bins=bins, bound=3.0)
    p, x = 2 * rows(500, spline.numbers), 2 * rows(500, 1)[:, 0]
    found, log_slope = spline.inverse(x, p) if inverse else spline.forward(x, p)
    even = math.log(math.expm1(1 - spline.least))  # theirs have no offset: zero is no straight line
    widths, heights, slopes = p.split([bins, bins, bins - 1], 1)
    for name in ("nflows.transforms.splines.rational_quadratic", "normflows.utils.splines"):
        module = pytest.importorskip(name)
        wanted, wanted_slope = module.unconstrained_rational_quadratic_spline(
            x, widths, heights, slopes + even, inverse=inverse, tails="linear", tail_bound=3.0
        )
        torch.testing.assert_close(found, wanted, **CLOSE)
        torch.testing.assert_close(log_slope, wanted_slope, **CLOSE)
        print(f"{name}, {bins} bins: {float((found - wanted).abs().max()):.1e}")


@pytest.mark.parametrize("additive", [True, False])
def test_couplings_of_nflows(additive: bool) -> None:
    coupling = pytest.importorskip("nflows.transforms.coupling")
    moves = torch.tensor([True, False, False, True, True])
    kept, moved = sides(moves)
    transform: Elementwise = Additive() if additive else RationalQuadratic(bins=6, bound=3.0)
    ours = Coupling(moves, transform, drawn(Perceptron(len(kept), len(moved), transform.numbers, 0, HIDDEN, 2)))

    class Same(nn.Module):
        """Our network with the shape and the offsets of theirs."""

        def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
            p = ours.network(x, None).clone()
            if isinstance(transform, RationalQuadratic):
                p[..., 2 * transform.bins :] += math.log(math.expm1(1 - transform.least))
            return p.flatten(1)

    if additive:
        theirs = coupling.AdditiveCouplingTransform(moves.int(), lambda inputs, outputs: Same())
    else:
        theirs = coupling.PiecewiseRationalQuadraticCouplingTransform(
            moves.int(), lambda inputs, outputs: Same(), num_bins=6, tails="linear", tail_bound=3.0
        )
    x = 2 * rows(50, FEATURES)
    with torch.no_grad():
        for found, wanted in ((ours(x), theirs(x)), (ours.inverse(x), theirs.inverse(x))):
            torch.testing.assert_close(found, wanted, **CLOSE)


def test_the_invertible_convolution_of_normflows() -> None:
    mixing = pytest.importorskip("normflows.flows.mixing")
    theirs = drawn(mixing.Invertible1x1Conv(4, use_lu=True))
    ours = Mix((4, 3, 2)).double()
    with torch.no_grad():
        ours.lower.copy_(theirs.L)
        ours.upper.copy_(theirs.U)
        ours.log_scale.copy_(theirs.log_S)
        ours.sign.copy_(theirs.sign_S)
        ours.order.copy_(theirs.P.argmax(1))
        x = rows(5, 24)
        for way, back in ((ours.forward, theirs.inverse), (ours.inverse, theirs.forward)):
            z, log_det = way(x)
            wanted, wanted_log_det = back(x.view(5, 4, 3, 2))
            torch.testing.assert_close(z, wanted.flatten(1), **CLOSE)
            torch.testing.assert_close(log_det, wanted_log_det.expand(5), **CLOSE)
