"""Mamba (arXiv 2312.00752): the recurrence by the book, its beginnings, and theorem 1: with one state it is a gated average."""

import math

import pytest
import torch
from sequences import TIGHT, shaken
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu, softplus

from fewstep.core.mixer import Context
from fewstep.nn.kernels import selective_scan
from fewstep.nn.mixers.mamba import Mamba, MambaConfig


def by_the_book(layer: Mamba, x: Tensor) -> Tensor:
    """Algorithm 2 and figure 3 for one sequence [T,D], channel by channel, state by state."""
    config, inner = layer.config, layer.inner
    u, z = layer.into(x).split(inner, -1)
    padded = pad(u.T.unsqueeze(0), (config.conv - 1, 0))
    u = silu(conv1d(padded, layer.conv.weight.T.unsqueeze(1), layer.conv.bias, groups=inner)[0].T)
    step, b, c = layer.select(u).split([layer.rank, config.state, config.state], -1)
    step, a = softplus(step @ layer.step.T + layer.step_bias), -layer.a_log.exp()
    y = torch.empty_like(u)
    for d in range(inner):
        h = x.new_zeros(config.state)
        for t in range(len(x)):
            h = (step[t, d] * a[d]).exp() * h + step[t, d] * b[t] * u[t, d]
            y[t, d] = c[t] @ h + layer.skip[d] * u[t, d]
    return layer.out(y * silu(z))


@pytest.mark.parametrize("fields", [{}, {"state": 3, "conv": 1}, {"rank": 4, "expand": 1}])
def test_the_recurrence_by_the_book(fields: dict[str, int]) -> None:
    layer = shaken(MambaConfig(**fields).build(width=6, heads=2))
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    y, _ = layer(x, Context(torch.arange(9).expand(2, -1)))
    for row in range(2):
        torch.testing.assert_close(y[row], by_the_book(layer, x[row]), **TIGHT)


def test_it_begins_as_the_authors_say() -> None:
    """Section 3.6: A_n = -(n + 1), steps from 0.001 to 0.1 log-uniformly, and projections of rank D / 16."""
    layer = MambaConfig().build(width=256, heads=4)
    torch.testing.assert_close(layer.a_log.exp(), torch.arange(1.0, 17).expand(512, -1))
    steps = softplus(layer.step_bias.detach())
    assert 0.999e-3 < steps.min() < 2e-3 and 0.05 < steps.max() <= 0.1001
    assert abs(float(steps.log().mean()) - math.log(1e-2)) < 0.5  # 8 deviations of a mean of 512
    assert layer.rank == 16 and float(layer.step.abs().max()) <= 16**-0.5
    assert (layer.skip == 1).all()
    layer = MambaConfig(step_min=0.02, step_max=0.02).build(width=20, heads=4)
    torch.testing.assert_close(softplus(layer.step_bias), torch.full((40,), 0.02))
    assert layer.rank == 2


def test_one_state_is_a_gated_average() -> None:
    """Theorem 1: N = 1, A = -1, B = 1 and s = softplus(z) give g = sigmoid(z) and h = (1 - g) h' + g u, by zero-order hold.

    That rule's B is (1 - exp(-s)) / s times the Euler rule's, which is what the scan takes."""
    u, z = torch.randn(2, 20, 3, dtype=torch.float64), torch.randn(2, 20, 3, dtype=torch.float64)
    step, one = softplus(z), torch.ones(2, 20, 1, dtype=torch.float64)
    held = u * -torch.expm1(-step) / step
    h, _ = selective_scan(held, step, -torch.ones(1, 3, dtype=torch.float64), one, one, torch.zeros(2, 1, 3, dtype=torch.float64))
    gate, wanted = torch.sigmoid(z), torch.zeros(2, 3, dtype=torch.float64)
    for t in range(20):
        wanted = (1 - gate[:, t]) * wanted + gate[:, t] * u[:, t]
        torch.testing.assert_close(h[:, t], wanted, **TIGHT)


def test_what_is_let_in_depends_on_the_token() -> None:
    """Unlike a convolution: the response to a token depends on those around it."""
    layer = shaken(MambaConfig(conv=1).build(width=6, heads=2))
    x, bump = torch.randn(1, 8, 6, dtype=torch.float64), torch.zeros(1, 8, 6, dtype=torch.float64)
    bump[:, 2] = 0.1
    other = torch.cat([x[:, :4], torch.randn_like(x[:, 4:])], 1)
    ctx = Context(torch.arange(8).unsqueeze(0))
    one, two = ((layer(y + bump, ctx)[0] - layer(y, ctx)[0])[:, -1] for y in (x, other))
    assert (one - two).abs().max() > 1e-11


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"step_min=0\.5: must be at most step_max=0\.1; lower it"):
        MambaConfig(step_min=0.5)
    with pytest.raises(ValueError, match="state"):
        MambaConfig(state=0)
