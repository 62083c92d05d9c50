"""HiPPO: the past of a signal as the coefficients of Legendre polynomials, kept up to date by a linear differential equation.

`Legs` and `Legt` are the operators, `discretise` their steps in time, `diagonal_plus_low_rank` the form in which S4 starts from
them. This file knows no mixer.
"""

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

Rule = Literal["euler", "backward", "bilinear", "zoh"]


def legs(order: int) -> tuple[Tensor, Tensor]:
    """A [N,N] and B [N] of c' = (A c + B f) / t, float64: all of the past, equally. Source: arXiv 2008.07669, theorem 2."""
    root = (2 * torch.arange(_positive(order), dtype=torch.float64) + 1).sqrt()
    return -(torch.outer(root, root).tril(-1) + torch.arange(1, order + 1, dtype=torch.float64).diag()), root


def legt(order: int) -> tuple[Tensor, Tensor]:
    """A [N,N] and B [N] of c' = (A c + B f) / theta, float64: the last `theta` of the past. Source: arXiv 2008.07669, theorem 1.

    Differs: the polynomials are orthonormal, as in the authors' code; theorem 1 scales coefficient n by sqrt(2n + 1).
    """
    n = torch.arange(_positive(order))
    root, sign = (2 * n.double() + 1).sqrt(), (-1.0) ** (n[:, None] - n).double()
    return -torch.outer(root, root) * torch.where(n[:, None] < n, sign, 1.0), root


def discretise(a: Tensor, b: Tensor, step: float, rule: Rule) -> tuple[Tensor, Tensor]:
    """The matrices of c_k = A_d c_{k-1} + B_d f_k for c' = A c + B f and samples `step` apart.

    `zoh` is exact where f is constant between samples; it inverts A. Raises ValueError for another rule. Source: arXiv
    2008.07669, appendix B.3.
    """
    one = torch.eye(len(a), dtype=a.dtype, device=a.device)
    match rule:
        case "euler":
            return one + step * a, step * b
        case "backward":
            solved = torch.linalg.solve(one - step * a, torch.cat([one, step * b[:, None]], 1))
            return solved[:, :-1], solved[:, -1]
        case "bilinear":
            solved = torch.linalg.solve(one - step / 2 * a, torch.cat([one + step / 2 * a, step * b[:, None]], 1))
            return solved[:, :-1], solved[:, -1]
        case "zoh":
            grown = torch.linalg.matrix_exp(step * a)
            return grown, torch.linalg.solve(a, (grown - one) @ b)
        case _:
            raise ValueError(f"rule={rule!r}: not known; choose one of euler, backward, bilinear, zoh")


@final
class Legs:
    """The scaled Legendre memory: coefficients of the whole past, however long. It needs no time scale.

    Args:
        order: N >= 1, coefficients.
        rule: as in `discretise`; the k-th step has length 1/k, for `zoh` log(k / (k - 1)), since d/dt = (1/t) d/d(log t).

    Cost: a solve of N^2 numbers a sample. Differs: the authors' code steps by log((k + 1) / k); as it is here, `zoh` gives the
    exact coefficients of a signal that is constant between its samples.
    """

    def __init__(self, order: int, rule: Rule = "bilinear") -> None:
        self.a, self.b = legs(order)
        self.rule: Rule = rule

    def project(self, f: Tensor) -> Tensor:
        """[...,T,N] the coefficients after each sample of f [...,T]."""
        a, b = self.a.to(f), self.b.to(f)
        states, c = [], f.new_zeros(*f.shape[:-1], len(b))
        for k in range(1, f.shape[-1] + 1):
            kept, added = self._step(a, b, k)
            c = c @ kept.mT + f[..., k - 1, None] * added
            states.append(c)
        return torch.stack(states, -2)

    def _step(self, a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.rule != "zoh":
            return discretise(a, b, 1 / k, self.rule)
        if k == 1:  # an infinite time after the empty past: nothing is left of it
            return torch.zeros_like(a), torch.linalg.solve(a, -b)
        return discretise(a, b, math.log(k / (k - 1)), self.rule)

    def reconstruct(self, c: Tensor, count: int) -> Tensor:
        """[...,count] the past that coefficients c [...,N] stand for, at the middles of `count` equal parts, oldest first."""
        return c @ basis(c.shape[-1], count).to(c)


@final
class Legt:
    """The translated Legendre memory: coefficients of the last `theta` samples.

    Args:
        order: N >= 1, coefficients.
        theta: above 0, the length of the window in samples.
        rule: as in `discretise`.

    Cost: N^2 multiply-adds a sample.
    """

    def __init__(self, order: int, theta: float, rule: Rule = "bilinear") -> None:
        if theta <= 0:
            raise ValueError(f"theta={theta}: must be above 0; give the window's length in samples")
        self.a, self.b = discretise(*legt(order), 1 / theta, rule)

    def project(self, f: Tensor) -> Tensor:
        """[...,T,N] the coefficients after each sample of f [...,T]; before the first it was 0."""
        a, b = self.a.to(f), self.b.to(f)
        states, c = [], f.new_zeros(*f.shape[:-1], len(b))
        for sample in f.unbind(-1):
            c = c @ a.mT + sample.unsqueeze(-1) * b
            states.append(c)
        return torch.stack(states, -2)

    def reconstruct(self, c: Tensor, count: int) -> Tensor:
        """[...,count] the window that coefficients c [...,N] stand for, at the middles of `count` equal parts, oldest first."""
        return c @ basis(c.shape[-1], count).to(c)


def basis(order: int, count: int) -> Tensor:
    """[N,count] sqrt(2n + 1) P_n at the middles of `count` equal parts of [-1, 1], float64: orthonormal under the uniform law."""
    x = (2 * torch.arange(count, dtype=torch.float64) + 1) / count - 1
    rows = [torch.ones_like(x), x]
    for n in range(1, order - 1):
        rows.append(((2 * n + 1) * x * rows[-1] - n * rows[-2]) / (n + 1))
    return torch.stack(rows[:order]) * (2 * torch.arange(order, dtype=torch.float64)[:, None] + 1).sqrt()


@final
@dataclass(frozen=True, eq=False, slots=True)
class DiagonalPlusLowRank:
    """A = V (diag(lam) - p p*) V* and B = V b; of each conjugate pair of the N eigenvalues one: lam, p, b [N/2], V [N,N/2]."""

    lam: Tensor
    p: Tensor
    b: Tensor
    v: Tensor


def diagonal_plus_low_rank(order: int) -> DiagonalPlusLowRank:
    """`legs` (without the 1/t) in the basis where all but a matrix of rank one is diagonal, complex128.

    Raises ValueError for an odd order. Source: Gu et al. 2021, arXiv 2111.00396, theorem 1 and appendix C.1: A + p p' is skew
    but for -1/2 on its diagonal, with p_n = sqrt(n + 1/2).
    """
    if order < 2 or order % 2:
        raise ValueError(f"order={order}: eigenvalues come in pairs; choose an even order of at least 2")
    a, b = legs(order)
    p = (torch.arange(order, dtype=torch.float64) + 0.5).sqrt()
    normal = a + torch.outer(p, p)
    imaginary, v = torch.linalg.eigh(-1j * (normal - normal.mT) / 2)  # in ascending order: the last half is positive
    v = v[:, order // 2 :]
    lam = torch.complex(normal.diagonal().mean().expand(order // 2), imaginary[order // 2 :])
    return DiagonalPlusLowRank(lam, v.mH @ p.to(v), v.mH @ b.to(v), v)


def _positive(order: int) -> int:
    if order < 1:
        raise ValueError(f"order={order}: must be at least 1; give the number of coefficients")
    return order
