"""Corruptions by name: a token survives to time t with probability keep(t), else it is drawn from a prior.

A noise schedule says what keep(t) is, a corruption what the prior is: any schedule serves either. This file knows no network, no
order and no loss. Everything is computed in float64.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.core.corruption import Corruption
from fewstep.core.random import Rng
from fewstep.core.recipe import Config, choice
from fewstep.diffusion.categorical import draw


class NoiseConfig(Config):
    """A noise schedule: the share of tokens that survive to t, which falls as t grows from 0 to 1."""

    @abstractmethod
    def keep(self, t: Tensor) -> Tensor:
        """keep(t) for float64 times in (0, 1]."""
        ...

    @abstractmethod
    def time(self, keep: Tensor) -> Tensor:
        """The inverse of `keep`; values beyond its ends give times beyond [0, 1]."""
        ...


@final
class LogLinearConfig(NoiseConfig):
    """keep = 1 - (1 - least) t: the total noise -ln keep is log-linear. LLaDA's linear schedule at `least` 0."""

    kind: ClassVar[str] = "log-linear"
    source: ClassVar[str] = "Lou et al. 2024, arXiv 2310.16834, appendix C.1; Sahoo et al. 2024, arXiv 2406.07524"

    least: float = Field(default=1e-3, ge=0, lt=1)

    def keep(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.least) * t

    def time(self, keep: Tensor) -> Tensor:
        return (1 - keep) / (1 - self.least)


@final
class GeometricConfig(NoiseConfig):
    """Total noise -ln keep that grows geometrically from `low` to `high`."""

    kind: ClassVar[str] = "geometric"
    source: ClassVar[str] = "Lou et al. 2024, arXiv 2310.16834, appendix C.1"

    low: float = Field(default=1e-4, gt=0)
    high: float = Field(default=20.0, gt=0)

    @model_validator(mode="after")
    def _grows(self) -> "GeometricConfig":
        if self.low >= self.high:
            raise ValueError(f"low={self.low}: must lie below high={self.high}; exchange them")
        return self

    def keep(self, t: Tensor) -> Tensor:
        return torch.exp(-(self.low ** (1 - t)) * self.high**t)

    def time(self, keep: Tensor) -> Tensor:
        return torch.log(-torch.log(keep) / self.low) / math.log(self.high / self.low)


@final
class CosineConfig(NoiseConfig):
    """keep = 1 - cos(pi/2 (1 - t)): few tokens are revealed at first, many at last."""

    kind: ClassVar[str] = "cosine"
    source: ClassVar[str] = "Chang et al. 2022, arXiv 2202.04200, section 3.2; Shi et al. 2024, arXiv 2406.04329, table 4"

    def keep(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def time(self, keep: Tensor) -> Tensor:
        return 1 - 2 / math.pi * torch.arccos((1 - keep).clamp(-1, 1))


@final
class PolynomialConfig(NoiseConfig):
    """keep = 1 - t^power."""

    kind: ClassVar[str] = "polynomial"
    source: ClassVar[str] = "Shi et al. 2024, arXiv 2406.04329, table 4"

    power: float = Field(default=2.0, gt=0)

    def keep(self, t: Tensor) -> Tensor:
        return 1 - t**self.power

    def time(self, keep: Tensor) -> Tensor:
        return (1 - keep).clamp(min=0) ** (1 / self.power)


NOISES: Mapping[str, type[Config]] = MappingProxyType(
    {config.kind: config for config in (LogLinearConfig, GeometricConfig, CosineConfig, PolynomialConfig)}
)


@final
class Interpolating:
    """q(x_t | x_0) = keep(t) x_0 + (1 - keep(t)) prior, each position for itself; keep(0) is 1 whatever the schedule.

    Source: Austin et al. 2021, arXiv 2107.03006, equations 2-4; Sahoo et al. 2024, arXiv 2406.07524, equation 3.
    """

    def __init__(self, noise: NoiseConfig, prior: Tensor) -> None:
        """`prior` [V] sums to 1."""
        self.noise, self.prior = noise, prior.double()

    def keep(self, t: Tensor) -> Tensor:
        inside = (t >= 0) & (t <= 1)
        if not bool(inside.all()):
            raise ValueError(f"t={float(t[~inside].flatten()[0])}: outside [0, 1]; 0 is data and 1 is noise")
        return torch.where(t > 0, self.noise.keep(t.double()), 1.0)  # so that the last step to t = 0 leaves no noise

    def time(self, keep: Tensor) -> Tensor:
        return self.noise.time(keep.double()).clamp(0, 1)

    def corrupt(self, x_0: Tensor, t: Tensor, rng: Rng) -> Tensor:
        count = x_0.shape[1]
        kept = rng.split("keep").uniform(count) < _level(self.keep(t))
        noise = draw(self.prior.expand(*x_0.shape, -1), rng.split("prior").uniform(count))
        return torch.where(kept, x_0, noise)

    def posterior(self, x_t: Tensor, p_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        keep_t, keep_s = (_level(self.keep(time)).unsqueeze(-1) for time in (t, s))
        between = torch.where(keep_s > 0, keep_t / keep_s.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
        weight = explained(self, x_t, p_0, t)
        reached = between * _one_hot(x_t, len(self.prior)) + (1 - between) * self.prior[x_t].unsqueeze(-1)  # q(x_t | x_s)
        law = reached * (keep_s * weight + (1 - keep_s) * self.prior * weight.sum(-1, keepdim=True))
        return law / law.sum(-1, keepdim=True)


def explained(corruption: Corruption, x_t: Tensor, p_0: Tensor, t: Tensor) -> Tensor:
    """[B,L,V]: p_0(x_0) / q(x_t | x_0), by which every quantity of the reverse process is linear in the predicted law.

    p_0 is first restricted to the tokens that can have become x_t: under absorption a visible token is itself whatever was
    predicted (the carry-over of arXiv 2406.07524, section 3.2.3).
    """
    keep = _level(corruption.keep(t)).unsqueeze(-1)
    forward = keep * _one_hot(x_t, len(corruption.prior)) + (1 - keep) * corruption.prior[x_t].unsqueeze(-1)  # q(x_t | x_0)
    possible = forward > 0
    law = torch.where(possible, p_0.double(), 0.0)
    total = law.sum(-1, keepdim=True)
    law = torch.where(total > 0, law / torch.where(total > 0, total, 1.0), possible / possible.sum(-1, keepdim=True))
    return torch.where(possible, law / torch.where(possible, forward, 1.0), 0.0)


def slope(corruption: Corruption, t: Tensor) -> Tensor:
    """d keep / dt at float64 times, by automatic differentiation."""
    with torch.inference_mode(False), torch.enable_grad():
        at = t.double().clone().requires_grad_()
        (found,) = torch.autograd.grad(corruption.keep(at).sum(), at)
    return found


def absorber(corruption: Corruption) -> int | None:
    """The token that everything turns into, the mask; None where there is more than one."""
    token = int(corruption.prior.argmax())
    return token if float(corruption.prior[token]) == 1 else None


def _level(keep: Tensor) -> Tensor:
    """[B] as [B,1], so that it broadcasts over positions; [B,L] as it is."""
    return keep.unsqueeze(-1) if keep.dim() == 1 else keep


def _one_hot(x: Tensor, vocab: int) -> Tensor:
    return torch.nn.functional.one_hot(x, vocab).double()


class CorruptionConfig(Config):
    """What turns data into noise, at the rate that `noise` sets."""

    noise: choice(lambda: NOISES, "noise") = LogLinearConfig()  # type: ignore[valid-type]

    @abstractmethod
    def build(self, vocab: int, mask_token: int | None = None, device: torch.device | str = "cpu") -> Interpolating:
        """Over a vocabulary of `vocab` tokens, of which `mask_token` stands for none that data has."""
        ...


@final
class AbsorbingConfig(CorruptionConfig):
    """Tokens turn into the mask and stay it. Raises ValueError for a model without one."""

    kind: ClassVar[str] = "absorbing"
    source: ClassVar[str] = "Austin et al. 2021, arXiv 2107.03006, section 3.1"

    def build(self, vocab: int, mask_token: int | None = None, device: torch.device | str = "cpu") -> Interpolating:
        if mask_token is None or not 0 <= mask_token < vocab:
            known = f"one of 0..{vocab - 1}; set model.mask_token, e.g. to the last id"
            raise ValueError(f"mask_token={mask_token}: absorbing corruption needs {known}")
        prior = torch.zeros(vocab, dtype=torch.float64, device=device)
        prior[mask_token] = 1
        return Interpolating(self.noise, prior)


@final
class UniformConfig(CorruptionConfig):
    """Tokens turn into any token, the mask left out."""

    kind: ClassVar[str] = "uniform"
    source: ClassVar[str] = "Hoogeboom et al. 2021, arXiv 2102.05379; Austin et al. 2021, arXiv 2107.03006, section 3.1"

    def build(self, vocab: int, mask_token: int | None = None, device: torch.device | str = "cpu") -> Interpolating:
        prior = torch.ones(vocab, dtype=torch.float64, device=device)
        if mask_token is not None:
            prior[mask_token] = 0
        return Interpolating(self.noise, prior / prior.sum())


CORRUPTIONS: Mapping[str, type[Config]] = MappingProxyType({config.kind: config for config in (AbsorbingConfig, UniformConfig)})
