"""HiPPO (arXiv 2008.07669): its matrices keep the best coefficients, of all of the past or of a window, and S4's form of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.nn.hippo import Legs, Legt, basis, diagonal_plus_low_rank, discretise, legs, legt

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
RULES: tuple[Any, ...] = ("euler", "backward", "bilinear", "zoh")


def best(f: Tensor, order: int) -> Tensor:
    """Coefficients of the best polynomial for a signal that is constant between samples: its integrals against sqrt(2n+1) P_n.

    (2n + 1) P_n is the derivative of P_{n+1} - P_{n-1}.
    """
    count = f.shape[-1]
    x = torch.linspace(-1, 1, count + 1, dtype=torch.float64)
    rows = [torch.ones_like(x), x]
    for n in range(1, order):
        rows.append(((2 * n + 1) * x * rows[-1] - n * rows[-2]) / (n + 1))
    primitives = [rows[1]] + [(rows[n + 1] - rows[n - 1]) / (2 * n + 1) for n in range(1, order)]
    pieces = torch.stack([(2 * n + 1) ** 0.5 / 2 * row.diff() for n, row in enumerate(primitives)])
    return f @ pieces.T


def test_matrices_of_order_three() -> None:
    """Theorem 2: A_nk = sqrt((2n+1)(2k+1)) below the diagonal and n + 1 on it; theorem 1 with its signs above."""
    root3, root5, root15 = 3**0.5, 5**0.5, 15**0.5
    a, b = legs(3)
    torch.testing.assert_close(-a, torch.tensor([[1, 0, 0], [root3, 2, 0], [root5, root15, 3]], dtype=torch.float64))
    a, _ = legt(3)
    wanted = torch.tensor([[1, -root3, root5], [root3, 3, -root15], [root5, root15, 5]], dtype=torch.float64)
    torch.testing.assert_close(-a, wanted)
    torch.testing.assert_close(b, torch.tensor([1, root3, root5], dtype=torch.float64))


def test_legs_keeps_the_best_polynomial_at_every_time() -> None:
    f = torch.randn(2, 50, dtype=torch.float64)
    found = Legs(12, "zoh").project(f)
    for count in (1, 2, 7, 50):
        torch.testing.assert_close(found[:, count - 1], best(f[:, :count], 12), **TIGHT)


@pytest.mark.parametrize("rule", RULES)
def test_rules_agree_in_the_limit(rule: Any) -> None:
    """The error of each falls with the step, by its order: bilinear and zero-order hold 2 against a smooth signal's middles."""
    errors = []
    for count in (200, 400, 800):
        t = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        f = torch.sin(5 * t) + t * t
        reconstructed = Legs(10, rule).reconstruct(Legs(10, rule).project(f)[-1], count)
        errors.append(float((reconstructed - f).abs().mean()))
    assert errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2]


def test_legs_has_no_time_scale() -> None:
    """Proposition 3: the same signal, sampled three times as often, has the same coefficients."""
    f = torch.randn(40, dtype=torch.float64)
    slow = Legs(16, "zoh").project(f.repeat_interleave(3))
    torch.testing.assert_close(slow[2::3], Legs(16, "zoh").project(f), **TIGHT)


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_legt_keeps_a_window_of_a_polynomial(degree: int) -> None:
    """It takes what leaves the window from its own reconstruction, which is exact for polynomials."""
    count, theta = 900, 300
    f = (torch.arange(count, dtype=torch.float64) / count) ** degree
    memory = Legt(12, theta)
    window = memory.reconstruct(memory.project(f)[-1], theta)
    torch.testing.assert_close(window, f[-theta:], rtol=0, atol=0.01)


def test_the_basis_is_orthonormal() -> None:
    rows = basis(20, 20_000)
    torch.testing.assert_close(rows @ rows.T / 20_000, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-4)
    assert basis(1, 5).tolist() == [[1.0] * 5]


@pytest.mark.parametrize("order", [2, 8, 64])
def test_legs_is_diagonal_plus_rank_one(order: int) -> None:
    """Theorem 1 of arXiv 2111.00396: with the conjugate half it is the whole matrix, V is unitary and every real part -1/2."""
    form, (a, b) = diagonal_plus_low_rank(order), legs(order)
    lam, p, v = (torch.cat([x, x.conj()], -1) for x in (form.lam, form.p, form.v))
    torch.testing.assert_close((v @ (lam.diag() - torch.outer(p, p.conj())) @ v.mH), a.to(v), rtol=0, atol=1e-9 * order)
    torch.testing.assert_close(2 * (form.v @ form.b).real, b, **TIGHT)
    torch.testing.assert_close(v.mH @ v, torch.eye(order, dtype=v.dtype), **TIGHT)
    assert (form.lam.real + 0.5).abs().max() < 1e-9 and form.lam.imag.min() > 0


@pytest.mark.parametrize("rule", RULES)
def test_steps_against_the_exponential(rule: Any) -> None:
    a, b = legs(6)
    kept, added = discretise(a, b, 1e-3, rule)
    exact = torch.linalg.matrix_exp(1e-3 * a)
    torch.testing.assert_close(kept, exact, rtol=0, atol={"euler": 1e-3, "backward": 1e-3, "bilinear": 1e-5, "zoh": 1e-12}[rule])
    torch.testing.assert_close(added, 1e-3 * b, rtol=0.05, atol=1e-4)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"order=7: eigenvalues come in pairs; choose an even order of at least 2"):
        diagonal_plus_low_rank(7)
    with pytest.raises(ValueError, match=r"order=0: must be at least 1"):
        Legs(0)
    with pytest.raises(ValueError, match=r"theta=0: must be above 0"):
        Legt(4, 0)
    with pytest.raises(ValueError, match=r"rule='trapezoid': not known; choose one of"):
        discretise(*legs(2), 0.1, "trapezoid")  # type: ignore[arg-type]
