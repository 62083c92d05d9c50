"""Numbers and identities that the papers on normalizing flows state."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.random import CounterRng
from fewstep.models.flow import Flow, FlowConfig
from fewstep.nn.bijections.autoregressive import MaskedNetwork
from fewstep.nn.bijections.continuous import ContinuousConfig
from fewstep.nn.bijections.coupling import Coupling, checkerboard
from fewstep.nn.bijections.glow import GlowConfig
from fewstep.nn.bijections.layer import Chain, Layer
from fewstep.nn.bijections.linear import ActNorm, Diagonal, Mix, squeeze
from fewstep.nn.bijections.maf import IAFConfig, MAFConfig
from fewstep.nn.bijections.nice import NICEConfig
from fewstep.nn.bijections.realnvp import RealNVPConfig
from fewstep.nn.bijections.spline import RationalQuadratic
from fewstep.nn.bijections.tarflow import TarFlowConfig


def shaken(layer: Any) -> Any:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.double().eval()


def rows(count: int, size: int) -> Tensor:
    return torch.randn(count, size, dtype=torch.float64)


def test_nice_keeps_volumes_up_to_its_diagonal() -> None:
    """Equation 8 and section 3.3: additive couplings have slope 1, so that log|det| is the sum of the last scales for every x."""
    layer = shaken(NICEConfig(hidden=8).build(shape=(5,)))
    *couplings, diagonal = layer.layers
    assert all(isinstance(part, Coupling) for part in couplings) and isinstance(diagonal, Diagonal)
    _, kept = Chain(couplings)(rows(7, 5))
    assert bool((kept == 0).all())
    _, log_det = layer(rows(7, 5))
    torch.testing.assert_close(log_det, diagonal.log_scale.sum().expand(7), rtol=0, atol=1e-15)


def test_realnvp_splits_the_spectrum_of_masks() -> None:
    """Figure 3: the board's squares alternate in all channels; squeezing puts 2x2 squares into channels."""
    assert checkerboard((2, 2, 3), 0).tolist() == 2 * [False, True, False, True, False, True]
    image = torch.arange(8.0).view(1, 8)  # 1 x 2 x 4
    assert squeeze((1, 2, 4))(image)[0].view(4, 1, 2).tolist() == [[[0, 2]], [[1, 3]], [[4, 6]], [[5, 7]]]
    layer, x = shaken(RealNVPConfig(hidden=4).build(shape=(1, 4, 4))), rows(2, 16)
    assert (layer(x)[0] - x).abs().min() > 0  # no element is left as it was


def test_actnorm_begins_with_mean_0_and_variance_1() -> None:
    """Glow, section 3.1: by channel, over the first batch in training; later ones do not change it."""
    layer, x = ActNorm((3, 2, 2)).double(), 5 + 3 * rows(50, 12)
    assert torch.equal(layer.eval()(x)[0], x)  # nothing is learned outside training
    maps = layer.train()(x)[0].view(50, 3, 4)
    variance, mean = torch.var_mean(maps, (0, 2), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(variance, torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)
    before = layer.log_scale.clone()
    layer(rows(50, 12))
    assert torch.equal(layer.log_scale, before)
    again = ActNorm((3, 2, 2)).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.train()(x)[0], layer(x)[0])  # a checkpoint does not begin anew


def test_a_matrix_over_the_channels_counts_every_pixel() -> None:
    """Glow, equation 9: log|det| is H W log|det W|; equation 10: W = P L (U + diag s)."""
    weight = rows(3, 3)
    layer, x = Mix((3, 2, 2), weight), rows(2, 12)
    torch.testing.assert_close(layer.weight(), weight, rtol=0, atol=1e-12)
    z, log_det = layer(x)
    torch.testing.assert_close(z.view(2, 3, 4), torch.einsum("ij,bjn->bin", weight, x.view(2, 3, 4)), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det, 4 * torch.linalg.slogdet(weight).logabsdet.expand(2), rtol=0, atol=1e-12)
    rotation = Mix((4,)).double().weight()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)


def test_glow_is_the_identity_but_for_its_rotations_at_the_start() -> None:
    """Section 3.3: the last convolution of each coupling begins at zero."""
    layer, x = GlowConfig(levels=2, steps=2, hidden=4).build(shape=(1, 4, 4)).double().eval(), rows(3, 16)
    z, log_det = layer(x)
    torch.testing.assert_close(torch.linalg.vector_norm(z, dim=1), torch.linalg.vector_norm(x, dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(log_det, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-5)


def test_the_first_half_of_glows_latents_leaves_after_one_level() -> None:
    """Figure 2b: what left does not depend on the levels below."""
    layer, x = shaken(GlowConfig(levels=2, steps=1, hidden=4).build(shape=(1, 4, 4))), rows(2, 16)
    before = layer(x)[0].clone()
    with torch.no_grad():
        for parameter in layer.layers[-1].parameters():
            parameter.add_(0.5)
    after = layer(x)[0]
    assert torch.equal(before[:, :8], after[:, :8]) and (before[:, 8:] - after[:, 8:]).abs().min() > 0


def test_iaf_is_maf_backwards() -> None:
    """MAF, section 3.3."""
    maf, iaf = shaken(MAFConfig(hidden=8).build(shape=(4,))), IAFConfig(hidden=8).build(shape=(4,)).double()
    iaf.load_state_dict({f"layer.{name}": value for name, value in maf.state_dict().items()})
    x = rows(3, 4)
    for one, other in ((maf(x), iaf.inverse(x)), (maf.inverse(x), iaf(x))):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_maf_standardises_each_element_given_those_before() -> None:
    """Equations 3 and 4, z = (x - mu) e^(-alpha), and 5, log|det| = - sum alpha."""
    part = shaken(MAFConfig(hidden=8, layers=1).build(shape=(4,))).layers[0]
    x = rows(3, 4)
    t, raw = part.network(x, None).unbind(2)
    alpha = -raw / (1 + raw.abs() / part.transform.bound)
    mu = -t * alpha.exp()
    z, log_det = part(x)
    torch.testing.assert_close(z, (x - mu) * (-alpha).exp(), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det, -alpha.sum(1), rtol=0, atol=1e-12)


def test_made_sees_only_what_is_before() -> None:
    network, x, c = shaken(MaskedNetwork(5, 2, 3, 16, 2)), rows(1, 5).abs(), rows(1, 3).abs()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()  # then every unit is on, and nothing cancels
    seen = torch.autograd.functional.jacobian(lambda row: network(row, c)[0].sum(1), x)[:, 0] != 0
    assert torch.equal(seen, torch.ones(5, 5, dtype=torch.bool).tril(-1))
    given = torch.autograd.functional.jacobian(lambda row: network(x, row)[0].sum(1), c)[:, 0] != 0
    assert bool(given.all())


def textbook(x: float, xs: list[float], ys: list[float], slopes: list[float]) -> tuple[float, float]:
    """Equations 4 and 5 in plain numbers: the value and the derivative."""
    k = max(i for i in range(len(xs) - 1) if xs[i] <= x)
    width, height = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    s, r = height / width, (x - xs[k]) / width
    q = s + (slopes[k + 1] + slopes[k] - 2 * s) * r * (1 - r)
    value = ys[k] + height * (s * r * r + slopes[k] * r * (1 - r)) / q
    slope = s * s * (slopes[k + 1] * r * r + 2 * s * r * (1 - r) + slopes[k] * (1 - r) ** 2) / q**2
    return value, slope


def test_the_spline_is_that_of_equations_4_and_5() -> None:
    spline = RationalQuadratic(bins=5, bound=3.0)
    p, x = rows(9, spline.numbers), 6 * torch.rand(9, dtype=torch.float64) - 3
    y, log_slope = spline.forward(x, p)
    for row, (knots_x, knots_y, slopes) in enumerate(zip(*spline.knots(p), strict=True)):
        assert slopes[0] == slopes[-1] == 1 and (knots_x[0], knots_x[-1]) == (-3, 3) == (knots_y[0], knots_y[-1])
        value, slope = textbook(float(x[row]), knots_x.tolist(), knots_y.tolist(), slopes.tolist())
        assert float(y[row]) == pytest.approx(value, abs=1e-12)
        assert float(log_slope[row]) == pytest.approx(math.log(slope), abs=1e-12)


def test_the_spline_has_linear_tails_and_its_gradients_are_finite() -> None:
    spline = RationalQuadratic(bins=4, bound=2.0)
    x = torch.tensor([-1e30, -7.0, -2.0, 2.0, 7.0, 1e30, 2 - 1e-15, -2 + 1e-15, 0.0], dtype=torch.float64)
    for scale in (1.0, 30.0):
        for way in (spline.forward, spline.inverse):
            at, p = x.clone().requires_grad_(), (scale * rows(len(x), spline.numbers)).requires_grad_()
            y, log_slope = way(at, p)
            assert torch.equal(y[:6], at[:6]) and bool((log_slope[:6] == 0).all())
            (y[abs(x) < 1e20].sum() + log_slope.sum()).backward()
            assert at.grad is not None and p.grad is not None
            assert bool(at.grad.isfinite().all()) and bool(p.grad.isfinite().all())
            assert bool((p.grad[:6] == 0).all())


def test_the_spline_in_single_precision_comes_back() -> None:
    """The discriminant of the inverse may round below 0; nothing may be NaN, at the knots and between, however bent."""
    spline = RationalQuadratic(bins=8, bound=3.0)
    p = 4 * torch.randn(2000, spline.numbers)
    x = torch.cat([spline.knots(p)[0][:1000, 4], 6 * torch.rand(1000) - 3]).requires_grad_()
    y, _ = spline.forward(x, p)
    back, log_slope = spline.inverse(y, p)
    (back.sum() + log_slope.sum()).backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and bool(log_slope.isfinite().all())
    risen, _ = spline.forward(back.detach(), p)
    torch.testing.assert_close(risen, y, rtol=0, atol=1e-3)


def test_zeros_make_the_spline_the_identity() -> None:
    spline, x = RationalQuadratic(), 12 * torch.rand(50, dtype=torch.float64) - 6
    y, log_slope = spline.forward(x, torch.zeros(50, spline.numbers, dtype=torch.float64))
    torch.testing.assert_close(y, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-12)


def test_the_continuous_flow_converges_at_fourth_order() -> None:
    """Runge and Kutta: twice the steps, a sixteenth of the error, in values and log-determinants."""
    fine, x = shaken(ContinuousConfig(hidden=8, steps=128).build(shape=(3,))), rows(4, 3)
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.mul_(2.5)
        wanted = fine(x)
        errors = []
        for steps in (4, 8):
            coarse = ContinuousConfig(hidden=8, steps=steps).build(shape=(3,)).double()
            coarse.load_state_dict(fine.state_dict())
            errors.append([float((a - b).square().mean().sqrt()) for a, b in zip(coarse(x), wanted, strict=True)])
    for one, half in zip(*errors, strict=True):
        assert 2**3 < one / half < 2**5.5


def test_tarflow_leaves_patches_in_alternating_order() -> None:
    """Section 2.2: the first patch of one flow is the last of the next, so that in two every patch is steered by all others."""
    layer, x = shaken(TarFlowConfig(flows=2, width=8, heads=2).build(shape=(3,))), rows(1, 3)
    _, first, flip, second = layer.layers
    reach = torch.autograd.functional.jacobian(lambda row: first(row)[0], x)[0, :, 0] != 0
    assert torch.equal(reach, torch.ones(3, 3, dtype=torch.bool).tril())
    both = torch.autograd.functional.jacobian(lambda row: second(flip(first(row)[0])[0])[0], x)[0, :, 0] != 0
    assert bool(both.all())


def test_a_flow_of_one_diagonal_has_the_gaussians_likelihood(seed: int) -> None:
    """The change of variables, in the simplest case: standardised data, and the entropy 0.5 ln(2 pi e) an element."""
    flow: Flow = FlowConfig(bijections=(NICEConfig(layers=1),)).build().double()
    x = 3 + 2 * CounterRng.seeded(range(seed, seed + 500)).normal(2)
    variance = x.var(0, correction=0)
    wanted = 0.5 * (math.log(2 * math.pi * math.e) + variance.log()).sum()
    torch.testing.assert_close(-flow.train().log_prob(x).mean(), wanted, rtol=0, atol=1e-9)


def test_every_layer_says_its_size() -> None:
    parts: tuple[Layer, ...] = (Diagonal(3), ActNorm((3,)), Mix((3,)))
    assert [(part.size, part.context) for part in parts] == [(3, 0)] * 3
