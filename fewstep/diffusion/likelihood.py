"""Exact likelihoods, latents and interpolation by the probability-flow ODE of any denoiser.

With x/alpha on the clock u = ln(sigma / alpha), dx/du = x - D and d ln p / du = -(d - tr dD/dx), whatever the process; the ODE is
integrated by the classical Runge-Kutta method along a grid. This file knows no network.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from fewstep.core.process import Denoise, Process
from fewstep.core.random import Rng
from fewstep.diffusion.processes import ratio
from fewstep.diffusion.solvers.multistep import mean

EXACT = 64  # the largest dimension whose trace is worked out exactly unless probes are asked for

Rate = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor]
]  # (z, t) -> dz/du and d ln p/du with its sign turned, in a column or more


@final
class Prior(NamedTuple):
    """The law of x / alpha at the greatest noise: Gaussian with the data's `mean` [d] and covariance [d,d] plus sigma^2.

    Matching the data's moments leaves an error of third order in data over noise; a centred prior of variance sigma^2 one of
    second, which does not vanish as the steps do.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, data: Tensor) -> "Prior":
        """The moments of `data` [N, ...], N >= 2."""
        flat = data.flatten(1).double()
        return cls(flat.mean(0), torch.cov(flat.T).reshape(flat.shape[1], flat.shape[1]))

    def log_prob(self, z: Tensor, sigma: Tensor) -> Tensor:
        """[B] of `z` [B,d] at noise `sigma` (one number)."""
        noise = sigma**2 * torch.eye(len(self.mean), dtype=torch.float64, device=z.device)
        law = torch.distributions.MultivariateNormal(self.mean.to(z.device), self.covariance.to(z.device) + noise)
        return law.log_prob(z)


@final
class Likelihood(NamedTuple):
    """`log_prob` [B] in nats; `error` [B] its standard error from the probes (0 where the trace is exact); `latent` [B, ...] the
    point of x / alpha that the ODE ends at; `calls` of the denoiser for each row."""

    log_prob: Tensor
    error: Tensor
    latent: Tensor
    calls: int


def log_likelihood(
    denoise: Denoise,
    process: Process,
    grid: Tensor,
    x: Tensor,
    prior: Prior,
    rng: Rng,
    probes: int | None = None,
    law: Literal["rademacher", "gaussian"] = "rademacher",
) -> Likelihood:
    """ln p of data `x` [B, ...] along `grid` [K+1], which falls from noise to data and does not reach t = 0.

    `probes`: None for the exact trace up to 64 dimensions; otherwise Hutchinson's estimate from as many probes, the same for all
    steps, of `law`. x is taken to lie at the grid's last time: its noise should be small beside the data's detail. Raises
    ValueError for a grid whose ends are infinite on this clock or too many dimensions for an exact trace.
    Cost: 4 K calls, with a derivative for each dimension or probe. Source: Song et al. 2021, arXiv 2011.13456, appendix D.2.
    Differs: on the ratio's clock for all processes; the prior matches the data's moments.
    """
    flat, t = x.flatten(1).double(), _rising(process, grid)
    d = flat.shape[1]
    if probes is None and d > EXACT:
        raise ValueError(f"probes=None: the exact trace of {d} dimensions, more than {EXACT}; give a number of probes, e.g. 8")
    v = (
        torch.eye(d, dtype=torch.float64, device=x.device).expand(len(x), d, d)
        if probes is None
        else _probes(rng, probes, d, law)
    )

    def rate(z: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        estimate, products = _DataClock(denoise, process, time, x).products(z, v)
        traces = (v * products).sum(-1)
        return z - estimate, d - (traces.sum(1, keepdim=True) if probes is None else traces)

    z, change = _runge_kutta(rate, process, t, flat, flat.new_zeros(len(x), 1 if probes is None else probes))
    end = prior.log_prob(z, ratio(process, t[-1]))
    values = end.unsqueeze(1) + change
    error = torch.zeros_like(end) if values.shape[1] < 2 else values.std(1) / math.sqrt(values.shape[1])
    error = torch.full_like(end, math.nan) if probes == 1 else error
    return Likelihood(values.mean(1), error, z.view(x.shape), 4 * (len(t) - 1))


def encode(denoise: Denoise, process: Process, grid: Tensor, x: Tensor) -> Tensor:
    """The latent x_t at the grid's first time of data `x` [B, ...]: any deterministic solver brings it back along `grid`.

    Cost: 4 K calls. Raises ValueError as `log_likelihood`. Source: Song et al. 2021, arXiv 2011.13456, section 4.3.
    """
    t = _rising(process, grid)

    def rate(z: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return z - _DataClock(denoise, process, time, x)(z), z.new_zeros(len(z), 1)

    start = x.flatten(1).double()
    z, _ = _runge_kutta(rate, process, t, start, start.new_zeros(len(x), 1))
    return (z * process.alpha(t[-1])).to(x.dtype).view(x.shape)


def interpolate(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """[S,B, ...]: latents between two [B, ...] at shares [S] in [0, 1] on the great circle, which keeps their length typical.

    Source: Song et al. 2021, arXiv 2010.02502, appendix D.5 (after Shoemake 1985).
    """
    a, b = first.flatten(1), second.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    angle = torch.arccos(cosine)
    straight = torch.sin(angle) < 1e-6
    safe = torch.where(straight, torch.ones_like(angle), angle)
    shares = share.to(first).view(-1, 1)
    near = torch.where(straight, 1 - shares, torch.sin((1 - shares) * safe) / torch.sin(safe))
    far = torch.where(straight, shares, torch.sin(shares * safe) / torch.sin(safe))
    return (near.unsqueeze(-1) * a + far.unsqueeze(-1) * b).view(len(shares), *first.shape)


def dequantise(levels: Tensor, count: int, rng: Rng) -> Tensor:
    """Integer `levels` [B, ...] of 0..count-1 as points of [-1, 1], each uniform within its cell.

    Source: Theis et al. 2016, arXiv 1511.01844, section 3.1.
    """
    return (levels + rng.uniform(*levels.shape[1:]).to(levels.device)) * (2 / count) - 1


def bits_per_dim(log_prob: Tensor, dimensions: int, count: int) -> Tensor:
    """[B]: a bound on the bits a dimension takes, from ln p of `dequantise`d data of `count` levels."""
    return -(log_prob / dimensions + math.log(2 / count)) / math.log(2)


def _rising(process: Process, grid: Tensor) -> Tensor:
    """The grid from data to noise. Raises ValueError where the ODE's clock is infinite."""
    t = grid.double().flip(-1)
    if t.dim() != 1 or not bool((process.alpha(t) > 0).all() & (process.sigma(t) > 0).all()):
        raise ValueError(
            "grid: one grid with 0 < sigma / alpha < infinity for all rows; build it with to_zero=False and a `most`"
        )
    return t


def _probes(rng: Rng, count: int, d: int, law: Literal["rademacher", "gaussian"]) -> Tensor:
    """[B, count, d]"""
    return rng.normal(count, d) if law == "gaussian" else torch.where(rng.uniform(count, d) < 0.5, -1.0, 1.0).double()


@final
class _DataClock:
    """The denoiser of x / alpha at one time, on flat rows in float64."""

    def __init__(self, denoise: Denoise, process: Process, t: Tensor, like: Tensor) -> None:
        self._denoise, self._like, self._t, self._alpha = denoise, like, t, process.alpha(t)

    def __call__(self, z: Tensor) -> Tensor:
        x = (z * self._alpha).to(self._like.dtype).view(self._like.shape)
        return mean(self._denoise(x, self._t.expand(len(z)))).flatten(1).double()

    def products(self, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """D [B,d], and v^T dD/dz [B,m,d] for `v` [B,m,d]: one pass forward, and the backward ones in one batch."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            estimate = self(z)
            (products,) = torch.autograd.grad(estimate, z, v.transpose(0, 1), is_grads_batched=True)
        return estimate.detach(), products.transpose(0, 1)


def _runge_kutta(rate: Rate, process: Process, t: Tensor, z: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """`z` and `change` carried along ln(sigma / alpha) over the rising times `t`, by steps of order 4."""
    clock = torch.log(ratio(process, t))
    middles = process.time(torch.exp((clock[1:] + clock[:-1]) / 2))
    for start, middle, end, h in zip(t[:-1], middles, t[1:], clock.diff().tolist(), strict=True):
        dz_1, dc_1 = rate(z, start)
        dz_2, dc_2 = rate(z + h / 2 * dz_1, middle)
        dz_3, dc_3 = rate(z + h / 2 * dz_2, middle)
        dz_4, dc_4 = rate(z + h * dz_3, end)
        z = z + h / 6 * (dz_1 + 2 * dz_2 + 2 * dz_3 + dz_4)
        change = change + h / 6 * (dc_1 + 2 * dc_2 + 2 * dc_3 + dc_4)
    return z, change
