"""Mamba-2 (arXiv 2405.21060): the recurrence by the book, and the duality of its two forms."""

import pytest
import torch
from sequences import TIGHT, shaken
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu, softplus

from fewstep.core.mixer import Context
from fewstep.nn.mixers.mamba2 import Mamba2, Mamba2Config


def built(width: int = 12, heads: int = 4, **fields: int) -> Mamba2:
    return shaken(Mamba2Config(state=5, **fields).build(width=width, heads=heads))


def by_the_book(layer: Mamba2, x: Tensor) -> Tensor:
    """Token after token for one sequence [T,D], each head on its own."""
    config, inner = layer.config, layer.inner
    z, mixed, dt = layer.into(x).split([inner, inner + 2 * layer.shared, layer.heads], -1)
    padded = pad(mixed.T.unsqueeze(0), (config.conv - 1, 0))
    mixed = silu(conv1d(padded, layer.conv.weight.T.unsqueeze(1), layer.conv.bias, groups=mixed.shape[1])[0].T)
    x, b, c = mixed.split([inner, layer.shared, layer.shared], -1)
    dt, a = softplus(dt + layer.step_bias), -layer.a_log.exp()
    width = inner // layer.heads
    y = torch.empty_like(x)
    for head in range(layer.heads):
        own, group = slice(head * width, (head + 1) * width), head * config.groups // layer.heads
        shared = slice(group * config.state, (group + 1) * config.state)
        state = x.new_zeros(config.state, width)
        for t in range(len(x)):
            state = (dt[t, head] * a[head]).exp() * state + dt[t, head] * torch.outer(b[t, shared], x[t, own])
            y[t, own] = c[t, shared] @ state + layer.skip[head] * x[t, own]
    y = (y * silu(z)).unflatten(-1, (config.groups, -1))
    y = (y / (y.square().mean(-1, keepdim=True) + config.eps).sqrt()).flatten(-2) * layer.gain
    return layer.out(y)


@pytest.mark.parametrize("fields", [{}, {"groups": 2}, {"groups": 4, "conv": 1}, {"head_width": 3, "groups": 2}, {"expand": 1}])
def test_the_recurrence_by_the_book(fields: dict[str, int]) -> None:
    layer = built(**fields)
    layer.chunk = 4
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    y, _ = layer(x, Context(torch.arange(9).expand(2, -1)))
    for row in range(2):
        torch.testing.assert_close(y[row], by_the_book(layer, x[row]), **TIGHT)


def test_it_begins_as_the_authors_say() -> None:
    """Steps from 0.001 to 0.1 log-uniformly, A from -16 to -1, D = 1."""
    layer = Mamba2Config(head_width=1).build(width=512, heads=4)
    steps, rates = softplus(layer.step_bias), layer.a_log.exp()
    assert 1e-3 <= steps.min() < 2e-3 and 0.05 < steps.max() <= 0.1001
    assert abs(float(steps.log().mean()) - 0.5 * float(torch.tensor([1e-3, 0.1]).log().sum())) < 0.3
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16.001
    assert (layer.skip == 1).all()


@pytest.mark.parametrize("fields", [{"head_width": 5}, {"groups": 3}])
def test_sizes_that_do_not_divide_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"^(head_width|groups)=\d: must divide [^\n]*; choose a divisor$"):
        built(**fields)


def test_steps_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"step_min=1.0: must be at most step_max=0.1; lower it"):
        Mamba2Config(step_min=1.0)
