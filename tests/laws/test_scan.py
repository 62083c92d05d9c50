"""Diagonal recurrences against a loop over tokens: chains, trees, packed chains and chains with gaps, real and complex."""

import pytest
import torch
from torch import Tensor

from fewstep.core.mixer import ancestors
from fewstep.nn import scan
from fewstep.nn.recurrent import Links

DTYPES = (torch.float64, torch.complex128)
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def drawn(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """a, b [3,count,2,4] with |a| below 1 and what is carried [3,2,4]."""
    a, b, start = (torch.randn(3, *shape, 2, 4, dtype=dtype) for shape in ((count,), (count,), ()))
    return a / (1 + a.abs()), b, start


def stepped(a: Tensor, b: Tensor, start: Tensor, parent: Tensor) -> Tensor:
    """[B,T,...] one state after another; `parent` -1: after `start`, -2: after nothing."""
    rows = []
    for row in range(a.shape[0]):
        states: list[Tensor] = []
        for t, p in enumerate(parent[row].tolist()):
            before = states[p] if p >= 0 else start[row] if p == -1 else torch.zeros_like(start[row])
            states.append(a[row, t] * before + b[row, t])
        rows.append(torch.stack(states))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 37])
def test_a_chain_is_a_loop(count: int, dtype: torch.dtype) -> None:
    a, b, start = drawn(count, dtype)
    parent = torch.arange(-1, count - 1).expand(3, -1)
    torch.testing.assert_close(scan.chain(a, b, start), stepped(a, b, start, parent), **TIGHT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tree_is_a_loop_along_each_path(dtype: torch.dtype) -> None:
    count = 24
    a, b, start = drawn(count, dtype)
    parent = torch.stack([torch.randint(-2, max(t, 0), (3,)) for t in range(count)], 1)
    torch.testing.assert_close(scan.tree(a, b, start, parent), stepped(a, b, start, parent), **TIGHT)


@pytest.mark.parametrize("chain", [True, False])
def test_fresh_rows_begin_with_nothing(chain: bool) -> None:
    a, b, start = drawn(9, torch.float64)
    parent = torch.arange(-1, 8).expand(3, -1).clone()
    fresh = torch.tensor([[True], [False], [True]]).expand(-1, 9)
    found = scan.along(a, b, start, Links(parent, ancestors(parent), fresh, chain))
    parent[fresh & (parent == -1)] = -2
    torch.testing.assert_close(found, stepped(a, b, start, parent), **TIGHT)


def test_what_is_not_on_the_path_matters_not_to_a_bit() -> None:
    a, b, start = drawn(16, torch.float64)
    parent = torch.stack([torch.randint(-2, max(t, 0), (3,)) for t in range(16)], 1)
    seen = ancestors(parent)[:, 13]
    found = scan.tree(a, b, start, parent)[:, 13]
    for x in (a, b):
        x[~seen] = torch.randn_like(x[~seen])
    assert torch.equal(scan.tree(a, b, start, parent)[:, 13], found)
    assert not torch.equal(scan.tree(a + 1, b, start, parent)[:, 13], found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 5, 16, 23])
def test_after_a_chain_with_gaps(count: int, dtype: torch.dtype) -> None:
    a, b, start = drawn(count, dtype)
    real = torch.rand(3, count) < 0.6
    wanted = []
    for row in range(3):
        h = start[row]
        for t in real[row].nonzero().flatten().tolist():
            h = a[row, t] * h + b[row, t]
        wanted.append(h)
    torch.testing.assert_close(scan.after(a, b, start, real), torch.stack(wanted), **TIGHT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: torch.dtype) -> None:
    a, b, start = (x.requires_grad_() for x in drawn(6, dtype))
    parent = torch.tensor([[-1, 0, 0, 2, -2, 3], [-2, -1, 1, 1, 0, 4], [-1, -1, 0, 1, 2, 3]])
    real = torch.tensor([[True, False, True, True, False, True]]).expand(3, -1)
    assert torch.autograd.gradcheck(scan.chain, (a, b, start), fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: scan.tree(*x, parent), (a, b, start), fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: scan.after(*x, real), (a, b, start), fast_mode=True)
