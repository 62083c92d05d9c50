"""What a network outputs, by name: eps, x_0, v, velocity, score, or EDM's and consistency's mixtures, and the ways between them.

A parameterisation is a linear map of (x_0, eps) to the output F, so that D = E[x_0 | x_t], training targets and conversions
follow from two coefficients. This file knows no network's inside.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.process import Denoise, Process
from fewstep.core.recipe import Config
from fewstep.diffusion.processes import diffuse, rates, spread

Network = Callable[[Tensor, Tensor], Tensor]  # (c_in x_t [B, ...], c_noise [B] of x's dtype) -> F [B, ...]


@final
@dataclass(frozen=True)
class Point:
    """Times `t` [B] of a process, and what it is there, worked out when asked for; each [B] float64."""

    process: Process
    t: Tensor

    @cached_property
    def alpha(self) -> Tensor:
        return self.process.alpha(self.t)

    @cached_property
    def sigma(self) -> Tensor:
        return self.process.sigma(self.t)

    @cached_property
    def rates(self) -> tuple[Tensor, Tensor]:
        """d alpha / dt and d sigma / dt."""
        return rates(self.process, self.t.double())

    @cached_property
    def ratio(self) -> Tensor:
        """sigma / alpha."""
        return self.sigma / self.alpha


class Example(NamedTuple):
    """What a network is trained on: E weight |network(inputs, c_noise) - target|^2."""

    x_t: Tensor
    inputs: Tensor
    c_noise: Tensor
    target: Tensor
    weight: Tensor


class ParameterisationConfig(Config):
    """What the output F means. `clock`: what the network is told of the time, c_noise.

    t itself; the step of a chain of 1000, counted from 0; a quarter of the log of sigma / alpha; or the log of half of it.
    """

    clock: Literal["t", "step", "quarter-log", "half-log"] = "t"

    @abstractmethod
    def mix(self, at: Point) -> tuple[Tensor, Tensor]:
        """m and n of F = m x_0 + n eps."""
        ...

    def unmix(self, at: Point) -> tuple[Tensor, Tensor]:
        """c_skip and c_out of D = c_skip x_t + c_out F."""
        m, n = self.mix(at)
        determinant = at.alpha * n - at.sigma * m
        return n / determinant, -at.sigma / determinant

    def c_in(self, at: Point) -> Tensor:
        """What x_t is multiplied by before the network sees it."""
        return torch.ones_like(at.alpha)

    def weight(self, at: Point) -> Tensor:
        """The weight of |F - target|^2 that the row's authors train with."""
        return torch.ones_like(at.alpha)

    def build(self) -> "ParameterisationConfig":
        """The parameterisation: this config."""
        return self

    def c_noise(self, at: Point) -> Tensor:
        """What the network is told of the time."""
        if self.clock == "t":
            return at.t.double()
        if self.clock == "step":
            return 1000 * at.t.double() - 1
        return torch.log(at.ratio) / 4 if self.clock == "quarter-log" else torch.log(at.ratio / 2)

    def inputs(self, x: Tensor, at: Point) -> tuple[Tensor, Tensor]:
        """What the network is given at x_t: c_in x_t, and c_noise in the dtype of x."""
        return spread(self.c_in(at), x) * x, self.c_noise(at).to(x.dtype)

    def estimate(self, output: Tensor, x: Tensor, at: Point) -> Tensor:
        """D = E[x_0 | x_t] of the network's output F at x_t."""
        c_skip, c_out = (spread(c, x) for c in self.unmix(at))
        return c_skip * x + c_out * output

    def denoiser(self, network: Network, process: Process) -> Denoise:
        """The network as E[x_0 | x_t] of the process that it was trained on. Cost: three multiplications of x."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            at = Point(process, t)
            return self.estimate(network(*self.inputs(x, at)), x, at)

        return denoise

    def example(self, process: Process, x_0: Tensor, t: Tensor, eps: Tensor) -> Example:
        """Denoising score matching at times `t` [B] with noise `eps`, in the dtype of `x_0` [B, ...]."""
        at, x_t = Point(process, t), diffuse(process, x_0, t, eps)
        m, n = (spread(c, x_0) for c in self.mix(at))
        target = m * x_0 + n * eps.to(x_0.dtype)
        return Example(x_t, *self.inputs(x_t, at), target, self.weight(at).to(x_0.dtype))


def convert(output: Tensor, x: Tensor, at: Point, source: ParameterisationConfig, target: ParameterisationConfig) -> Tensor:
    """An output of the parameterisation `source` at x_t as one of `target`.

    Exact wherever F and x_t determine x_0 and eps: eps says nothing of x_0 where alpha = 0, x_0 nothing of eps where sigma = 0.
    """
    if source == target:
        return output
    m, n = target.mix(at)
    direct = spread(n / at.sigma, x)
    return direct * x + spread(m - n * (at.alpha / at.sigma), x) * source.estimate(output, x, at)


@final
class EpsConfig(ParameterisationConfig):
    """F = eps, weighted evenly: DDPM's simple loss."""

    kind: ClassVar[str] = "eps"
    source: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239, equation 14"

    def mix(self, at: Point) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(at.alpha), torch.ones_like(at.alpha)


@final
class DataConfig(ParameterisationConfig):
    """F = x_0."""

    kind: ClassVar[str] = "x_0"
    source: ClassVar[str] = "Salimans and Ho 2022, arXiv 2202.00512, section 4"

    def mix(self, at: Point) -> tuple[Tensor, Tensor]:
        return torch.ones_like(at.alpha), torch.zeros_like(at.alpha)

    def unmix(self, at: Point) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(at.alpha), torch.ones_like(at.alpha)


@final
class VConfig(ParameterisationConfig):
    """F = v = alpha eps - sigma x_0, EDM's for data of unit variance with the sign turned."""

    kind: ClassVar[str] = "v"
    source: ClassVar[str] = "Salimans and Ho 2022, arXiv 2202.00512, appendix D"

    def mix(self, at: Point) -> tuple[Tensor, Tensor]:
        return -at.sigma, at.alpha


@final
class VelocityConfig(ParameterisationConfig):
    """F = dx_t / dt at fixed x_0 and eps; eps - x_0 for flow matching."""

    kind: ClassVar[str] = "velocity"
    source: ClassVar[str] = "Lipman et al. 2023, arXiv 2210.02747, equation 23"

    def mix(self, at: Point) -> tuple[Tensor, Tensor]:
        return at.rates


@final
class ScoreConfig(ParameterisationConfig):
    """F = the gradient of the log density of x_t, -eps / sigma in expectation, weighted with sigma^2."""

    kind: ClassVar[str] = "score"
    source: ClassVar[str] = "Song and Ermon 2019, arXiv 1907.05600, equation 5"

    def mix(self, at: Point) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(at.alpha), -1 / at.sigma

    def weight(self, at: Point) -> Tensor:
        return at.sigma**2


class _Scaled(ParameterisationConfig):
    """Inputs scaled to unit variance for data of standard deviation `sigma_data`."""

    clock: Literal["t", "step", "quarter-log", "half-log"] = "quarter-log"
    sigma_data: float = Field(default=0.5, gt=0)

    def _size(self, at: Point) -> Tensor:
        return torch.hypot(at.sigma, self.sigma_data * at.alpha)

    def c_in(self, at: Point) -> Tensor:
        return 1 / self._size(at)


@final
class EDMPreconditioningConfig(_Scaled):
    """EDM: F of unit variance at every level of noise, and the skip that makes errors of F matter least."""

    kind: ClassVar[str] = "edm"
    source: ClassVar[str] = "Karras et al. 2022, arXiv 2206.00364, table 1"

    def mix(self, at: Point) -> tuple[Tensor, Tensor]:
        return at.sigma / (self.sigma_data * self._size(at)), -self.sigma_data * at.alpha / self._size(at)


@final
class ConsistencyConfig(_Scaled):
    """Consistency models: EDM's shifted so that D(x) = x / alpha at the least noise, `sigma_min`.

    There F says nothing and `mix` is not finite.
    """

    kind: ClassVar[str] = "consistency"
    source: ClassVar[str] = "Song et al. 2023, arXiv 2303.01469, appendix C"

    sigma_min: float = Field(default=0.002, ge=0)

    def unmix(self, at: Point) -> tuple[Tensor, Tensor]:
        above, data = at.sigma - self.sigma_min * at.alpha, self.sigma_data
        return at.alpha * data**2 / (above**2 + (at.alpha * data) ** 2), data * above / self._size(at)

    def mix(self, at: Point) -> tuple[Tensor, Tensor]:
        c_skip, c_out = self.unmix(at)
        return (1 - c_skip * at.alpha) / c_out, -c_skip * at.sigma / c_out


PARAMETERISATIONS: Mapping[str, type[ParameterisationConfig]] = MappingProxyType(
    {
        config.kind: config
        for config in (
            EDMPreconditioningConfig,
            EpsConfig,
            DataConfig,
            VConfig,
            VelocityConfig,
            ScoreConfig,
            ConsistencyConfig,
        )
    }
)
