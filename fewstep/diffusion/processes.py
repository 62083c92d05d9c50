"""Processes by name: what data turns into noise by, as alpha(t) and sigma(t), and the time at which a ratio is reached.

This file knows no network, no solver and no loss. Everything is computed in float64.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.process import Denoise, Denoised, Process
from fewstep.core.random import Rng
from fewstep.core.recipe import Config

_ROUNDING = 1e-9  # how far beyond its ends a ratio may be, relatively


def checked(t: Tensor) -> Tensor:
    """`t` as float64. Raises ValueError for a time outside [0, 1], NaN included."""
    inside = (t >= 0) & (t <= 1)
    if not bool(inside.all()):
        raise ValueError(
            f"t={float(t[~inside].flatten()[0])}: outside [0, 1]; 0 is data and 1 is noise, `time` gives the t of a ratio"
        )
    return t.double()


def ratio(process: Process, t: Tensor) -> Tensor:
    """sigma / alpha, the one clock that all processes share; infinite where alpha is 0."""
    return process.sigma(t) / process.alpha(t)


def rates(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """d alpha / dt and d sigma / dt at float64 times, by automatic differentiation."""
    with torch.inference_mode(False), torch.enable_grad():
        at = t if t.requires_grad else t.clone().requires_grad_()
        values = ((process.alpha(at) + 0 * at).sum(), (process.sigma(at) + 0 * at).sum())  # either may be constant
        alpha, sigma = (torch.autograd.grad(value, at, create_graph=t.requires_grad)[0] for value in values)
    return alpha, sigma


def diffuse(process: Process, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = alpha(t) x_0 + sigma(t) eps in the dtype of x_0; `t` [B]."""
    return spread(process.alpha(t), x_0) * x_0 + spread(process.sigma(t), x_0) * eps.to(x_0.dtype)


def spread(factor: Tensor, x: Tensor) -> Tensor:
    """`factor` [B] as [B,1,...] of the dtype of `x` [B, ...]."""
    return factor.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))


def translate(denoise: Denoise, trained: Process, sampled: Process) -> Denoise:
    """A denoiser of the process `trained` as one of the process `sampled`: the same x_t / alpha_t at the same sigma / alpha.

    Cost: one multiplication. Raises ValueError, when called, for a ratio that `trained` never has: begin the grid later, or end
    it before. Source: Karras et al. 2022, arXiv 2206.00364, section 2 and appendix B.
    """
    if trained == sampled:
        return denoise

    def translated(x: Tensor, t: Tensor) -> Tensor | Denoised:
        own = trained.time(ratio(sampled, t))
        size, own_size = (torch.hypot(p.alpha(s), p.sigma(s)) for p, s in ((sampled, t), (trained, own)))
        return denoise(x * spread(own_size / size, x), own)

    return translated


class ProcessConfig(Config):
    """A process of x_t = alpha x_0 + sigma eps, which is its own description."""

    gaussian: ClassVar[bool] = True

    @property
    @abstractmethod
    def span(self) -> tuple[float, float]: ...

    @abstractmethod
    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at float64 times inside [0, 1]."""
        ...

    @abstractmethod
    def reached(self, ratio: Tensor) -> Tensor:
        """The time of a ratio between those of t = 0 and t = 1."""
        ...

    def build(self) -> Process:
        """The process: this config."""
        return self

    def alpha(self, t: Tensor) -> Tensor:
        return self.levels(checked(t))[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.levels(checked(t))[1]

    def time(self, ratio: Tensor) -> Tensor:
        alpha, sigma = self.levels(ratio.new_ones((), dtype=torch.float64))
        return self.reached(_within(ratio.double(), 0.0, float(sigma / alpha))).clamp(0, 1)

    def noise(self, shape: Sequence[int], rng: Rng) -> Tensor:
        return rng.normal(*shape)


def _within(ratio: Tensor, least: float, most: float) -> Tensor:
    """`ratio` moved inside [least, most] if only rounding put it outside; 0 is always reached."""
    inside = ((ratio >= least * (1 - _ROUNDING)) | (ratio == 0)) & (ratio <= most * (1 + _ROUNDING))
    if not bool(inside.all()):
        wrong = float(ratio[~inside].flatten()[0])
        raise ValueError(
            f"ratio={wrong:g}: sigma / alpha of this process lies within [{least:g}, {most:g}]; move the grid inside"
        )
    return torch.where(ratio == 0, ratio, ratio.clamp(least, most))


class _Decay(ProcessConfig):
    """Data that decays as alpha = exp(-B(t) / 2) while noise fills the variance up: alpha^2 + sigma^2 = 1."""

    @abstractmethod
    def decay(self, t: Tensor) -> Tensor:
        """B(t), the integral of the rate beta from 0 to t."""
        ...

    @abstractmethod
    def undecay(self, decay: Tensor) -> Tensor:
        """The inverse of `decay`."""
        ...

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        decay = self.decay(t)
        return torch.exp(-decay / 2), torch.sqrt(-torch.expm1(-decay))

    def reached(self, ratio: Tensor) -> Tensor:
        return self.undecay(torch.log1p(ratio**2))


class _Linear(_Decay):
    """A rate that grows linearly from `beta_min` to `beta_max`."""

    beta_min: float = Field(default=0.1, gt=0)
    beta_max: float = Field(default=20.0, gt=0)

    @property
    def span(self) -> tuple[float, float]:
        return (1e-5, 1.0)

    def decay(self, t: Tensor) -> Tensor:
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def undecay(self, decay: Tensor) -> Tensor:
        growth = self.beta_max - self.beta_min
        return 2 * decay / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * growth * decay))


@final
class VPConfig(_Linear):
    """Variance preserving with a linear rate, the continuous form of DDPM."""

    kind: ClassVar[str] = "vp"
    source: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456, equation 32"


@final
class SubVPConfig(_Linear):
    """Sub-VP: sigma is the variance of VP, so less noise at every time."""

    kind: ClassVar[str] = "sub-vp"
    source: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456, section 3.4"

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        decay = self.decay(t)
        return torch.exp(-decay / 2), -torch.expm1(-decay)

    def reached(self, ratio: Tensor) -> Tensor:
        return self.undecay(2 * torch.asinh(ratio / 2))


@final
class DDPMConfig(_Decay):
    """DDPM's chain of M steps with probabilities beta_j, and the VP process with a constant rate within each step between them.

    Step j of the chain (from 1) is t = j / M. `schedule`: beta linear, linear in its root (latent diffusion), or such that alpha
    follows a cosine. Cost: `time` searches the table. Differs: the cosine's rates are cut at 0.999, as its authors' are.
    """

    kind: ClassVar[str] = "ddpm"
    source: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239, section 4; Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17"

    steps: int = Field(default=1000, ge=1)
    beta_min: float = Field(default=1e-4, gt=0, lt=1)
    beta_max: float = Field(default=0.02, gt=0, lt=1)
    schedule: Literal["linear", "root-linear", "cosine"] = "linear"

    @property
    def span(self) -> tuple[float, float]:
        return (1 / self.steps, 1.0)

    @cached_property
    def _knots(self) -> Tensor:
        """[M+1] B at the steps of the chain, 0 first."""
        if self.schedule == "cosine":
            kept = CosineConfig().levels(torch.linspace(0, 1, self.steps + 1, dtype=torch.float64))[0] ** 2
            beta = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
        elif self.schedule == "linear":
            beta = torch.linspace(self.beta_min, self.beta_max, self.steps, dtype=torch.float64)
        else:
            beta = torch.linspace(self.beta_min**0.5, self.beta_max**0.5, self.steps, dtype=torch.float64) ** 2
        return torch.cat((beta.new_zeros(1), -torch.log1p(-beta).cumsum(0)))

    def decay(self, t: Tensor) -> Tensor:
        knots = self._knots.to(t.device)
        step = (t.detach() * self.steps).long().clamp(max=self.steps - 1)
        return torch.lerp(knots[step], knots[step + 1], t * self.steps - step)

    def undecay(self, decay: Tensor) -> Tensor:
        knots = self._knots.to(decay.device)
        step = (torch.searchsorted(knots, decay.detach().contiguous(), right=True) - 1).clamp(0, self.steps - 1)
        return (step + (decay - knots[step]) / (knots[step + 1] - knots[step])) / self.steps


@final
class CosineConfig(ProcessConfig):
    """Variance preserving with alpha a cosine of time; alpha(1) is exactly 0. `offset` keeps the first noise from vanishing."""

    kind: ClassVar[str] = "cosine"
    source: ClassVar[str] = "Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17"

    offset: float = Field(default=0.008, ge=0, lt=1)

    @property
    def span(self) -> tuple[float, float]:
        return (1e-5, 1.0)

    @property
    def _first(self) -> float:
        """The angle at t = 0; it is a right one at t = 1."""
        return math.pi / 2 * self.offset / (1 + self.offset)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        first, turn = self._first, math.pi / 2 / (1 + self.offset)
        alpha = torch.sin(turn * (1 - t)) / math.cos(first)
        sigma = torch.sqrt(torch.sin(turn * t) * torch.sin(turn * t + 2 * first)) / math.cos(first)
        return alpha, sigma

    def reached(self, ratio: Tensor) -> Tensor:
        first, ratio = self._first, ratio.clamp(max=1e100)  # where t is 1 to the last bit
        root = torch.hypot(ratio, torch.full_like(ratio, math.sin(first)))
        rise = math.cos(first) * ratio * (ratio / (root + math.sin(first)).clamp(min=1e-300))
        angle = torch.atan2(rise, math.cos(first) ** 2 + math.sin(first) * root)
        return angle * (2 / math.pi) * (1 + self.offset)


@final
class VEConfig(ProcessConfig):
    """Variance exploding: noise that grows geometrically on data left as it is, none at t = 0 and `sigma_min` right after it."""

    kind: ClassVar[str] = "ve"
    source: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456, equation 31 and appendix C"

    sigma_min: float = Field(default=0.01, gt=0)
    sigma_max: float = Field(default=50.0, gt=0)

    @property
    def span(self) -> tuple[float, float]:
        return (1e-5, 1.0)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma_min * torch.exp(math.log(self.sigma_max / self.sigma_min) * t)
        return torch.ones_like(t), torch.where(t == 0, 0.0, sigma)

    def time(self, ratio: Tensor) -> Tensor:
        return self.reached(_within(ratio.double(), self.sigma_min, self.sigma_max)).clamp(0, 1)

    def reached(self, ratio: Tensor) -> Tensor:
        above = ratio.clamp(min=self.sigma_min * (1 + 1e-15))  # so that the smallest noise is not taken for none
        t = (torch.log(above / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)).clamp(min=1e-300)
        return torch.where(ratio == 0, 0.0, t)


class _Straight(ProcessConfig):
    """sigma = sigma_max t on data left as it is."""

    sigma_min: float = Field(default=0.002, gt=0)
    sigma_max: float = Field(default=80.0, gt=0)

    @property
    def span(self) -> tuple[float, float]:
        return (self.sigma_min / self.sigma_max, 1.0)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_max * t

    def reached(self, ratio: Tensor) -> Tensor:
        return ratio / self.sigma_max


@final
class EDMConfig(_Straight):
    """EDM: noise in proportion to time. Differs: time ends at 1 and not at `sigma_max`."""

    kind: ClassVar[str] = "edm"
    source: ClassVar[str] = "Karras et al. 2022, arXiv 2206.00364, table 1"


@final
class PFGMConfig(_Straight):
    """PFGM++: EDM with noise of heavy tails, a Student t of `dimensions` degrees of freedom; EDM itself when these are many.

    Its radius is sigma_max t sqrt(D) sqrt(b / (1 - b)), b ~ Beta(N/2, D/2), and its direction uniform. Cost: D further draws.
    """

    kind: ClassVar[str] = "pfgm++"
    source: ClassVar[str] = "Xu et al. 2023, arXiv 2302.04265, section 4"
    gaussian: ClassVar[bool] = False

    dimensions: int = Field(default=128, ge=1)

    def noise(self, shape: Sequence[int], rng: Rng) -> Tensor:
        normal = rng.normal(*shape)
        return normal / spread(rng.split("radius").normal(self.dimensions).square().mean(1).sqrt(), normal)


@final
class FlowConfig(ProcessConfig):
    """Flow matching and rectified flow: the straight line from data to noise; alpha(1) is exactly 0."""

    kind: ClassVar[str] = "flow"
    source: ClassVar[str] = "Lipman et al. 2023, arXiv 2210.02747, example II; Liu et al. 2023, arXiv 2209.03003"

    @property
    def span(self) -> tuple[float, float]:
        return (0.0, 1.0)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def reached(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)


@final
@dataclass(frozen=True)
class Defined:
    """A process from any two functions of float64 times. `time` is found by bisection.

    Raises ValueError unless alpha >= 0, sigma(0) = 0 < alpha(0) and sigma / alpha rises strictly (looked at in 1001 places).
    """

    alpha_of: Callable[[Tensor], Tensor]
    sigma_of: Callable[[Tensor], Tensor]
    span: tuple[float, float] = (1e-5, 1.0)
    gaussian: bool = True

    def __post_init__(self) -> None:
        t = torch.linspace(0, 1, 1001, dtype=torch.float64)
        alpha, sigma = self.alpha(t), self.sigma(t)
        if not (float(sigma[0]) == 0 < float(alpha[0]) and bool((alpha >= 0).all()) and bool((sigma[1:] > 0).all())):
            raise ValueError(
                "alpha_of, sigma_of: need alpha >= 0 and sigma >= 0, with sigma = 0 < alpha at t = 0 only; correct them"
            )
        still = (torch.atan2(sigma, alpha).diff() <= 0).nonzero()
        if len(still):
            raise ValueError(
                f"alpha_of, sigma_of: sigma / alpha must rise, it does not at t={float(t[still[0]]):.3f}; correct them"
            )

    def alpha(self, t: Tensor) -> Tensor:
        return self.alpha_of(checked(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_of(checked(t))

    def time(self, ratio: Tensor) -> Tensor:
        last = ratio.new_ones((), dtype=torch.float64)
        ratio = _within(ratio.double(), 0.0, float(self.sigma(last) / self.alpha(last)))
        low, high = torch.zeros_like(ratio), torch.ones_like(ratio)
        for _ in range(100):
            middle = (low + high) / 2
            below = self.sigma_of(middle) < ratio * self.alpha_of(middle)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(ratio == 0, 0.0, high)

    def noise(self, shape: Sequence[int], rng: Rng) -> Tensor:
        return rng.normal(*shape)


PROCESSES: Mapping[str, type[ProcessConfig]] = MappingProxyType(
    {
        config.kind: config
        for config in (EDMConfig, VPConfig, CosineConfig, SubVPConfig, VEConfig, DDPMConfig, FlowConfig, PFGMConfig)
    }
)
