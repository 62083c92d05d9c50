"""Whole sequences swept at once are the recurrence token by token: values, states and gradients, packed sequences too."""

import pytest
import torch
from torch import Tensor

from fewstep.nn.decay import sweep

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def drawn(count: int, batch: int = 2, heads: int = 2) -> tuple[Tensor, ...]:
    """q, k [B,T,H,3], v [B,T,H,2], the logarithms of decays and the state before, for gradients in float64."""
    q, k = torch.randn(2, batch, count, heads, 3, dtype=torch.float64)
    v, start = torch.randn(batch, count, heads, 2, dtype=torch.float64), torch.randn(batch, heads, 3, 2, dtype=torch.float64)
    log_a = -torch.rand(batch, count, heads, dtype=torch.float64)
    return tuple(x.clone().requires_grad_() for x in (q, k, v, log_a, start))


def looped(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, start: Tensor, begins: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token by token."""
    state, found = start, []
    for t in range(q.shape[1]):
        if begins is not None:
            state = torch.where(begins[:, t, None, None, None], 0.0, state)
        fade = 1.0 if log_a is None else log_a[:, t, :, None, None].exp()
        state = state * fade + k[:, t].unsqueeze(3) * v[:, t].unsqueeze(2)
        found.append((q[:, t].unsqueeze(2) @ state).squeeze(2))
    return torch.stack(found, 1), state


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_values_and_gradients(count: int, decays: bool, packed: bool) -> None:
    q, k, v, log_a, start = drawn(count)
    begins = torch.tensor([[True, False, False, False, True, False, True, True, False, False, False], [False] * 11])[:, :count]
    given = (q, k, v, log_a if decays else None, start, begins if packed else None)
    found, wanted = sweep(*given, chunk=4), looped(*given)
    torch.testing.assert_close(found, wanted, **TIGHT)
    weights, leaves = [torch.randn_like(x) for x in found], [q, k, v, start, *([log_a] if decays else [])]
    both = [
        torch.autograd.grad(outputs, leaves, weights, allow_unused=True, materialize_grads=True) for outputs in (found, wanted)
    ]
    torch.testing.assert_close(*both, **TIGHT)


def test_pieces_follow_one_another() -> None:
    q, k, v, log_a, start = drawn(9)
    whole, last = sweep(q, k, v, log_a, start, chunk=4)
    first, state = sweep(*(x[:, :5] for x in (q, k, v, log_a)), start, chunk=4)
    second, end = sweep(*(x[:, 5:] for x in (q, k, v, log_a)), state, chunk=4)
    torch.testing.assert_close((torch.cat([first, second], 1), end), (whole, last), **TIGHT)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda *given: sweep(*given, chunk=2), drawn(5, batch=1), fast_mode=True)
