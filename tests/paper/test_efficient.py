"""Efficient attention (arXiv 1812.01243): the published form, what the causal one is, and that no key is too large for it."""

import pytest
import torch

from fewstep.core.mixer import Causal, Context, Full, Window
from fewstep.nn.mixers.efficient import EfficientAttention, EfficientConfig

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH, HEADS = 12, 3


def made() -> EfficientAttention:
    mixer = EfficientConfig(bias=True).build(width=WIDTH, heads=HEADS).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def test_is_the_published_form() -> None:
    """E(Q, K, V) = rho_q(Q) (rho_k(K)' V), softmax over features and over tokens (eq. 8, 10), head by head."""
    mixer, x = made(), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    y, _ = mixer(x, Context(torch.arange(7).expand(2, -1), mask=Full()))
    for row in range(2):
        q, k, v = mixer.qkv(x[row]).view(7, 3, HEADS, WIDTH // HEADS).unbind(1)
        heads = [q[:, h].softmax(1) @ (k[:, h].exp() / k[:, h].exp().sum(0)).T @ v[:, h] for h in range(HEADS)]
        torch.testing.assert_close(y[row], mixer.out(torch.cat(heads, 1)), **TIGHT)


def test_rows_of_its_attention_sum_to_one() -> None:
    """Section 3.3: the implicit attention matrix is one, so values that are all alike come back."""
    mixer, x = made(), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        mixer.qkv.weight[2 * WIDTH :] = 0.0
    wanted = mixer.out(mixer.qkv.bias[2 * WIDTH :]).expand(1, 9, -1)
    for mask in (Causal(), Full()):
        y, _ = mixer(x, Context(torch.arange(9)[None], mask=mask))
        torch.testing.assert_close(y, wanted, **TIGHT)


def test_causally_a_token_has_what_the_published_form_gives_its_own_past() -> None:
    mixer, x = made(), torch.randn(1, 40, WIDTH, dtype=torch.float64)
    y, _ = mixer(x, Context(torch.arange(40)[None]))
    for end in (1, 2, 16, 17, 40):
        past, _ = mixer(x[:, :end], Context(torch.arange(end)[None], mask=Full()))
        torch.testing.assert_close(y[:, end - 1], past[:, -1], **TIGHT)


@pytest.mark.parametrize("size", [1e3, 1e5])
def test_keys_of_any_size(size: float) -> None:
    """Exponentials are of differences alone: nothing overflows, and the parts agree where a plain sum is infinite."""
    mixer = made().float()
    with torch.no_grad():
        mixer.qkv.weight[WIDTH : 2 * WIDTH] *= size
    x = torch.randn(1, 50, WIDTH, requires_grad=True)
    y, _ = mixer(x, Context(torch.arange(50)[None]))
    state = mixer.init_state(1, 50, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        steps = []
        for i in range(50):
            step, state = mixer.extend(x[:, i : i + 1], Context(), state)
            state = state.commit(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
            steps.append(step)
    torch.testing.assert_close(torch.cat(steps, 1), y.detach(), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and gradient.isfinite().all()


def test_its_state_does_not_grow() -> None:
    mixer = made()
    sizes = []
    for count in (5, 500):
        state = mixer.init_state(1, 500, device="cpu", dtype=torch.float64)
        with torch.no_grad():
            _, state = mixer.extend(torch.randn(1, count, WIDTH, dtype=torch.float64), Context(), state)
        state = state.commit(torch.arange(count)[None], torch.tensor([count]))
        sizes.append(state.nbytes())
    assert sizes[0] == sizes[1] == 8 * HEADS * (WIDTH // HEADS) * (WIDTH // HEADS + 1)


def test_a_mask_it_does_not_take_is_refused() -> None:
    x = torch.randn(1, 3, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^mask=Window: efficient takes Causal, Full; choose one of them$"):
        made()(x, Context(torch.arange(3)[None], mask=Window(2)))
