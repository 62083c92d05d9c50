"""S4 (arXiv 2111.00396) and S4D (arXiv 2206.11893): the dense HiPPO system, the convolutions of both papers, their beginnings."""

import math
from typing import Any

import pytest
import torch
from sequences import TIGHT, shaken
from torch import Tensor
from torch.nn.functional import gelu, glu

from fewstep.core.mixer import Context
from fewstep.nn.hippo import diagonal_plus_low_rank, discretise, legs
from fewstep.nn.mixers.s4 import S4, S4D, S4Config, S4DConfig, StateSpace

WIDTH, LENGTH = 3, 21


def built(config: Any, moved: bool = True) -> Any:
    layer = config.build(width=WIDTH, heads=1)
    return shaken(layer) if moved else layer.double()


def parallel(layer: StateSpace, x: Tensor) -> Tensor:
    y, _ = layer(x, Context(torch.arange(x.shape[1]).expand(x.shape[0], -1)))
    return y


def convolved(layer: StateSpace, kernel: Tensor, x: Tensor) -> Tensor:
    """The layer by a Fourier transform of twice the length with `kernel` [D,T]."""
    count = x.shape[1]
    spectrum = torch.fft.rfft(kernel, 2 * count) * torch.fft.rfft(x.mT, 2 * count)
    y = torch.fft.irfft(spectrum, 2 * count)[..., :count].mT
    return glu(layer.out(gelu(y + layer.skip * x)), -1)


def complex_of(x: Tensor) -> Tensor:
    return torch.complex(x[..., 0], x[..., 1])


@pytest.mark.parametrize("start", ["lin", "inv", "legs"])
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_s4d_is_a_convolution_with_its_vandermonde_kernel(start: Any, rule: Any) -> None:
    """Section 3.2: K_l = 2 Re sum_n C_n B_n A_n^l of the discretised A and B, whatever the chunks."""
    layer: S4D = built(S4DConfig(state=8, start=start, rule=rule))
    step, lam = layer.step_log.exp()[:, None], torch.complex(-layer.fading.exp(), layer.turning)
    if rule == "zoh":
        a, b = (step * lam).exp(), ((step * lam).exp() - 1) / lam
    else:
        a, b = (1 + step * lam / 2) / (1 - step * lam / 2), step / (1 - step * lam / 2)
    vandermonde = a.unsqueeze(-1) ** torch.arange(LENGTH)
    kernel = 2 * ((complex_of(layer.c) * b).unsqueeze(-1) * vandermonde).sum(1).real
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    for chunk in (64, 5, 1):
        layer.chunk = chunk
        torch.testing.assert_close(parallel(layer, x), convolved(layer, kernel, x), **TIGHT)


def generating(layer: S4, count: int) -> Tensor:
    """The kernel [D,count] of algorithm 1: Cauchy products at the roots of unity, Woodbury, inverse Fourier transform.

    The truncated generating function takes C (I - A^count) in place of C; here A^count is taken from the dense system.
    """
    step, lam = layer.step_log.exp()[:, None], torch.complex(-layer.fading.exp(), layer.turning)
    p, b, c = complex_of(layer.p), complex_of(layer.b), complex_of(layer.c)
    lam, p, b, c = (torch.cat([z, z.conj()], -1) for z in (lam, p, b, c))
    dense = torch.diag_embed(lam) - p.unsqueeze(-1) * p.conj().unsqueeze(-2)
    one = torch.eye(lam.shape[-1], dtype=lam.dtype)
    half = step.unsqueeze(-1) / 2 * dense
    a = torch.linalg.solve(one - half, one + half)
    truncated = (c.unsqueeze(1) @ (one - torch.linalg.matrix_power(a, count))).squeeze(1)
    roots = torch.exp(-2j * math.pi * torch.arange(count, dtype=torch.float64) / count)  # 1 / z in the paper's words
    z = (2 / step * ((1 - roots) / (1 + roots))).unsqueeze(-1)

    def cauchy(left: Tensor, right: Tensor) -> Tensor:
        return ((left * right).unsqueeze(1) / (z - lam.unsqueeze(1))).sum(-1)

    whole = cauchy(truncated, b) - cauchy(truncated, p) * cauchy(p.conj(), b) / (1 + cauchy(p.conj(), p))
    return torch.fft.ifft(2 / (1 + roots) * whole).real


def test_s4_is_a_convolution_with_its_cauchy_kernel() -> None:
    """Theorem 3 and algorithm 1 give what powers of the matrix by doubling do."""
    layer: S4 = built(S4Config(state=8))
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    wanted = convolved(layer, generating(layer, LENGTH), x)  # an odd length: no root is -1
    for chunk in (64, 5, 1):
        layer.chunk = chunk
        torch.testing.assert_close(parallel(layer, x), wanted, **TIGHT)


def test_s4_begins_as_the_dense_system_of_hippo() -> None:
    """h = A h + B u with A = -A_LegS by the bilinear rule, read by a real row: theorem 1."""
    layer, form = built(S4Config(state=32), moved=False), diagonal_plus_low_rank(32)
    assert isinstance(layer, S4)
    own = {layer.fading: (-form.lam.real).log(), layer.turning: form.lam.imag, layer.p: form.p, layer.b: form.b}
    with torch.no_grad():
        for parameter, value in own.items():  # which begin as these in float32
            value = torch.view_as_real(value) if value.is_complex() else value
            torch.testing.assert_close(parameter[0], value, rtol=1e-6, atol=1e-6)
            parameter.copy_(value.expand_as(parameter))
    x = torch.randn(1, 60, WIDTH, dtype=torch.float64)
    read = (2 * complex_of(layer.c) @ form.v.mH).real
    y = torch.empty_like(x)
    for d in range(WIDTH):
        a, b = discretise(*legs(32), float(layer.step_log[d].detach().exp()), "bilinear")
        h = torch.zeros(32, dtype=torch.float64)
        for t in range(60):
            h = a @ h + b * x[0, t, d]
            y[0, t, d] = read[d] @ h
    wanted = glu(layer.out(gelu(y + layer.skip * x)), -1)
    torch.testing.assert_close(parallel(layer, x), wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("config", [S4Config(), S4DConfig(), S4DConfig(start="inv"), S4DConfig(start="legs")])
def test_beginnings(config: Any) -> None:
    layer = config.build(width=300, heads=1)
    steps, real, imaginary = layer.step_log.exp(), -layer.fading.exp(), layer.turning
    assert 0.999e-3 < steps.min() < 2e-3 and 0.05 < steps.max() <= 0.1001
    torch.testing.assert_close(real, torch.full((300, 32), -0.5), rtol=1e-4, atol=1e-4)
    n = torch.arange(32)
    if isinstance(config, S4DConfig) and config.start == "lin":  # equation 8
        torch.testing.assert_close(imaginary, (math.pi * n).expand(300, -1))
    elif isinstance(config, S4DConfig) and config.start == "inv":  # equation 9
        torch.testing.assert_close(imaginary, (64 / math.pi * (64 / (2 * n + 1) - 1)).expand(300, -1))
    else:
        spectrum = torch.linalg.eigvals(legs(64)[0] + torch.outer(*[(torch.arange(64.0, dtype=torch.float64) + 0.5).sqrt()] * 2))
        wanted = spectrum.imag[spectrum.imag > 0].sort().values.float()
        torch.testing.assert_close(imaginary[0].sort().values, wanted, rtol=1e-4, atol=1e-4)


def test_the_largest_eigenvalue_of_s4d_inv_is_near_that_of_s4() -> None:
    """Section 4.2: S4D-Inv is a fit of the spectrum of S4D-LegS, whose largest frequency grows as N^2 / pi."""
    fitted, exact = (S4DConfig(start=start).build(width=1, heads=1).turning.max() for start in ("inv", "legs"))
    assert abs(float(fitted / exact) - 1) < 0.05


@pytest.mark.parametrize("kind", [S4Config, S4DConfig])
def test_bad_sizes_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="state"):
        kind(state=7)
    with pytest.raises(ValueError, match=r"step_min=0\.5: must be at most step_max=0\.1; lower it"):
        kind(step_min=0.5)
