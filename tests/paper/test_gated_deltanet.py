"""Gated DeltaNet (arXiv 2412.06464): the recurrence by the book, and what the delta rule is for."""

import pytest
import torch
from sequences import TIGHT, shaken
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu, softplus

from fewstep.core.mixer import Context
from fewstep.nn import delta
from fewstep.nn.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from fewstep.nn.recurrent import Links


def by_the_book(layer: GatedDeltaNet, x: Tensor) -> Tensor:
    """The gated delta rule token after token for one sequence [T,D], each head on its own."""
    heads, d, e, size = layer.heads, layer.key_width, layer.value_width, layer.config.conv
    *mixed, gate = layer.into(x).split([heads * d, heads * d, heads * e, heads * e], -1)
    b, a = layer.rates(x).chunk(2, -1)
    flat = torch.cat(mixed, -1)
    weight = layer.conv.weight.T.unsqueeze(1)
    flat = silu(conv1d(pad(flat.T.unsqueeze(0), (size - 1, 0)), weight, groups=flat.shape[1])[0].T)
    q, k, v = flat.split([heads * d, heads * d, heads * e], -1)
    alpha, beta = torch.exp(-layer.a_log.exp() * softplus(a + layer.step_bias)), b.sigmoid()
    y = torch.empty_like(v)
    for head in range(heads):
        keys, values = slice(head * d, (head + 1) * d), slice(head * e, (head + 1) * e)
        state, one = x.new_zeros(e, d), torch.eye(d, dtype=x.dtype)
        for t in range(len(x)):
            qt, kt = (z[t, keys] / (z[t, keys].square().sum() + 1e-6).sqrt() for z in (q, k))
            keep = alpha[t, head] * (one - beta[t, head] * torch.outer(kt, kt))
            state = state @ keep + beta[t, head] * torch.outer(v[t, values], kt)
            out = state @ qt / d**0.5
            out = out / (out.square().mean() + layer.config.eps).sqrt() * layer.gain
            y[t, values] = out * silu(gate[t, values])
    return layer.out(y)


@pytest.mark.parametrize("fields", [{}, {"key_width": 5, "value_width": 7}, {"conv": 1, "value_width": 2}])
def test_the_recurrence_by_the_book(fields: dict[str, int]) -> None:
    layer = shaken(GatedDeltaNetConfig(**fields).build(width=12, heads=3))
    layer.chunk = 4
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    y, _ = layer(x, Context(torch.arange(10).expand(2, -1)))
    for row in range(2):
        torch.testing.assert_close(y[row], by_the_book(layer, x[row]), **TIGHT)


def test_a_key_written_twice_recalls_its_last_value() -> None:
    """Where nothing fades and beta is 1, a value replaces the one before it, and others stay."""
    keys = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0][[0, 1, 2, 1, 3, 0]]
    values = torch.randn(6, 4, dtype=torch.float64)
    ones = torch.ones(1, 6, 1, dtype=torch.float64)
    writes = delta.Writes(keys[None, :, None], values[None, :, None], 0 * ones, ones)
    sees = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    links = Links(torch.arange(-1, 5)[None], sees, torch.zeros(1, 6, dtype=torch.bool), True)
    empty = torch.zeros(1, 1, 6, 4, dtype=torch.float64)
    found = delta.read(keys[None, :, None], writes, empty, links)[0, :, 0]
    torch.testing.assert_close(found, values, **TIGHT)
    state = delta.advance(writes, empty, torch.ones(1, 6, dtype=torch.bool))[0, 0]
    torch.testing.assert_close(keys[[5, 3, 2, 4]] @ state, values[[5, 3, 2, 4]], **TIGHT)


def test_it_begins_as_the_authors_say() -> None:
    layer = GatedDeltaNetConfig(key_width=1, value_width=1).build(width=2048, heads=1024)
    steps, rates = softplus(layer.step_bias), layer.a_log.exp()
    assert 1e-3 <= steps.min() < 2e-3 and 0.05 < steps.max() <= 0.1001
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16.001
