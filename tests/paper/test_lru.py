"""The linear recurrent unit (arXiv 2303.06349): the recurrence by the book, the ring it begins on, the scale of its states."""

import math

import pytest
import torch
from sequences import TIGHT, shaken
from torch import Tensor
from torch.nn.functional import gelu, glu

from fewstep.core.mixer import Context
from fewstep.nn.mixers.lru import LRU, LRUConfig


def by_the_book(layer: LRU, x: Tensor) -> Tensor:
    """Appendix A for one sequence [T,D]."""
    lam = torch.exp(-layer.nu.exp() + 1j * layer.theta.exp())
    b, c = (torch.complex(*matrix) for matrix in (layer.b, layer.c))
    h, y = torch.zeros_like(lam), torch.empty_like(x)
    for t in range(len(x)):
        h = lam * h + layer.gamma.exp() * (b @ x[t].to(b))
        y[t] = (c @ h).real + layer.skip * x[t]
    return glu(layer.out(gelu(y)), -1)


@pytest.mark.parametrize("state", [None, 5])
def test_the_recurrence_by_the_book(state: int | None) -> None:
    layer = shaken(LRUConfig(state=state).build(width=8, heads=2))
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    y, _ = layer(x, Context(torch.arange(11).expand(2, -1)))
    for row in range(2):
        torch.testing.assert_close(y[row], by_the_book(layer, x[row]), **TIGHT)


def test_eigenvalues_begin_uniform_on_a_ring() -> None:
    """Lemma 3.2: |lam|^2 is uniform between the squared radii, the angle between 0 and its bound; no step leaves the disk."""
    count = 20_000
    layer = LRUConfig(state=count, inner=0.4, outer=0.9, angle=2.0).build(width=1, heads=1)
    square, angle = torch.exp(-2 * layer.nu.exp()).double(), layer.theta.exp().double()
    for found, low, high in ((square, 0.4**2, 0.9**2), (angle, 0.0, 2.0)):
        assert found.min() >= low - 1e-6 and found.max() <= high + 1e-6
        rank = torch.arange(1, count + 1, dtype=torch.float64) / count
        gap = ((found.sort().values - low) / (high - low) - rank).abs().max()
        assert float(gap.detach()) < 3.0 / math.sqrt(count)  # Kolmogorov: exceeded once in 3e7 draws
    with torch.no_grad():
        layer.nu += 5 * torch.randn_like(layer.nu)
    assert torch.exp(-layer.nu.exp()).max() <= 1


def test_states_are_as_large_as_what_comes_in() -> None:
    """Section 3.4: with gamma = sqrt(1 - |lam|^2) a state gathers from white noise the variance of one input."""
    layer = LRUConfig(state=64, inner=0.5, outer=0.95).build(width=8, heads=2).double()
    with torch.no_grad():
        (put,) = layer.inputs(torch.randn(64, 400, 8, dtype=torch.float64), torch.empty(0), torch.empty(0))
        (empty,) = layer.begin(64, "cpu", torch.float64)
        (state,) = layer.advance((empty,), (put,), torch.ones(64, 400, dtype=torch.bool))
        alone = torch.linalg.vector_norm(layer.b, dim=(0, 2)) ** 2
    ratio = state.abs().square().mean(0) / alone
    assert 0.6 < float(ratio.mean()) < 1.6
