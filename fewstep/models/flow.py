"""A normalizing flow as a model: a law of vectors or images with an exact density, and samples from it in one pass.

Between data and bijections stand what data may need: dequantisation, a logit transform, a first standardisation. All of them are
in the density, which is always one of the data in their own unit. This file knows bijections through their registry only.
"""

import math
from pathlib import Path
from typing import ClassVar, Literal, cast, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fewstep.core.random import Rng
from fewstep.core.recipe import Config, choice
from fewstep.models.stored import restore, store
from fewstep.nn.bijections import BIJECTIONS
from fewstep.nn.bijections.layer import Chain, Layer, size_of
from fewstep.nn.bijections.linear import ActNorm
from fewstep.nn.bijections.nsf import NSFConfig


@final
class FlowConfig(Config):
    """A flow: `bijections` one after another between data of `shape` and the base law, given `context` numbers a row.

    `levels`: data are whole numbers 0 .. levels - 1 (grey levels), to which uniform noise is added; 0: real numbers. `logit`:
    data on [0, 1], or [0, levels], pass logit(a + (1 - 2 a) x) first, where a is `logit`; 0: they do not. `standardise`: the
    first training batch sets each element's mean and variance to 0 and 1. `noise`: the standard deviation of Gaussian noise
    that training adds and sampling takes off again (TarFlow).
    """

    kind: ClassVar[str] = "flow"
    source: ClassVar[str] = "Dinh et al. 2014, arXiv 1410.8516; Papamakarios et al. 2019, arXiv 1912.02762"

    shape: tuple[int, ...] = (2,)
    context: int = Field(default=0, ge=0)
    bijections: tuple[choice(lambda: BIJECTIONS, "bijections"), ...] = (NSFConfig(),)  # type: ignore[valid-type]
    base: Literal["gaussian", "logistic"] = "gaussian"
    standardise: bool = True
    levels: int = Field(default=0, ge=0)
    logit: float = Field(default=0.0, ge=0, lt=0.5)
    noise: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _is_whole(self) -> "FlowConfig":
        size_of(self.shape)
        if not self.bijections:
            raise ValueError("bijections=(): empty; name at least one, e.g. ['nsf']")
        if self.levels and self.noise:
            raise ValueError(f"noise={self.noise}: whole numbers have uniform noise already; set noise=0 or levels=0")
        return self

    def build(self) -> "Flow":
        return Flow(self)


@final
class Flow(nn.Module):
    """A density with a sampler. Rows are x [B,*shape], conditions c [B,context]; logarithms are natural, densities per unit of x.

    Raises ValueError for x or c of another shape, for rows that are not numbers or outside the range of a logit, and, outside
    training, where the bijection's results are not numbers.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config, self.size = config, size_of(config.shape)
        parts: list[Layer] = [ActNorm((self.size,))] if config.standardise else []
        parts += [part.build(shape=config.shape, context=config.context) for part in config.bijections]
        self.bijection = Chain(parts)

    def log_prob(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> Tensor:
        """[B] nats. `rng` [B rows] for estimated traces."""
        z, log_det = self.encode(x, c, rng)
        return self._checked(self._base(z) + log_det, "log_prob")

    def bits_per_dim(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> Tensor:
        """[B] bits an element: -log2 p(x) / d.

        For whole numbers p is the probability of the row itself, bounded from below by one draw of the noise from `rng`. A level
        is the unit of x, so the bound needs no offset: uniform noise over 256 levels scores 8 bits.
        """
        return -self.log_prob(self.corrupted(x, rng) if self.config.levels else x, c, rng) / (self.size * math.log(2))

    def corrupted(self, x: Tensor, rng: Rng | None) -> Tensor:
        """x with the noise that training adds: uniform on [0, 1) for `levels`, Gaussian for `noise`; x itself without either."""
        if not self.config.levels and not self.config.noise:
            return x
        if rng is None:
            raise ValueError("rng=None: the noise is to be drawn; hand one in with a row for each x")
        drawn = rng.split("noise")
        if self.config.levels:
            self._levelled(x)
            return x + drawn.uniform(*self.config.shape).to(x)
        return x + self.config.noise * drawn.normal(*self.config.shape).to(x)

    def encode(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        """The latents z [B,d] of x, and log|dz/dx| [B]."""
        self._conditioned(c, len(x))
        if tuple(x.shape[1:]) != self.config.shape:
            raise ValueError(f"x: rows of shape {tuple(x.shape[1:])}, expected {self.config.shape}; reshape them")
        flat, log_det = self._inward(self._checked(x.flatten(1), "x"))
        z, inner = self.bijection(flat, c, rng)
        return z, log_det + inner

    def decode(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> Tensor:
        """x [B,*shape] of the latents z [B,d]."""
        self._conditioned(c, len(z))
        if tuple(z.shape[1:]) != (self.size,):
            raise ValueError(f"z: rows of shape {tuple(z.shape[1:])}, expected ({self.size},); give flat latents")
        x, _ = self.bijection.inverse(self._checked(z, "z"), c, rng)
        return self._checked(self._outward(x), "sample").view(-1, *self.config.shape)

    def sample(self, rng: Rng, c: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """One x [B,*shape] for each row of `rng`, whose law is the model's, or sharper for a `temperature` below 1.

        The base law's draws are multiplied by `temperature` >= 0 (0: its mode). Whole numbers where the data are; the noise of
        training is taken off.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature}: must be at least 0; 1 samples the model's own law")
        weight = next(self.parameters())
        drawn = rng.split("latents")
        if self.config.base == "gaussian":
            z = drawn.normal(self.size)
        else:
            u = drawn.uniform(self.size).clamp(min=2.0**-54)
            z = u.log() - (-u).log1p()
        with torch.no_grad():
            x = self.decode((temperature * z).to(weight), c, rng)
        if self.config.noise:
            x = self.denoise(x, c, rng)
        return x.floor().clamp(0, self.config.levels - 1) if self.config.levels else x

    def denoise(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> Tensor:
        """E[clean row | x] [B,*shape] for noisy x: x + noise^2 d log p / dx. Source: Tweedie's formula; TarFlow, section 2.5."""
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(at, c, rng).sum(), at)
        return x + self.config.noise**2 * score

    def save(self, directory: Path | str) -> None:
        """Write the model directory: recipe and weights. Raises ValueError when the disk refuses."""
        store(self, self.config, directory)

    @classmethod
    def load(cls, directory: Path | str, device: torch.device | str = "cpu") -> "Flow":
        """Read what `save` or a run wrote. Raises ValueError for a missing, damaged or mismatched file."""
        return cast(Flow, restore(directory, {FlowConfig.kind: FlowConfig}, device))

    def _base(self, z: Tensor) -> Tensor:
        if self.config.base == "gaussian":
            return -0.5 * (z.square().sum(1) + self.size * math.log(2 * math.pi))
        return (logsigmoid(z) + logsigmoid(-z)).sum(1)

    def _inward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Flat data as the bijections take them, and log|det| of that."""
        levels, alpha, log_det = self.config.levels, self.config.logit, x.new_zeros(len(x))
        if levels:
            x, log_det = x / levels, log_det - self.size * math.log(levels)
        if alpha:
            outside = ((x < 0) | (x > 1)).any(1)
            if outside.any():
                row = int(outside.nonzero()[0])
                raise ValueError(f"x: row {row} leaves [0, {levels or 1}], where the logit is defined; rescale it or set logit=0")
            y = alpha + (1 - 2 * alpha) * x
            log_det = log_det + self.size * math.log(1 - 2 * alpha) - (y.log() + (-y).log1p()).sum(1)
            x = y.log() - (-y).log1p()
        return x, log_det

    def _outward(self, x: Tensor) -> Tensor:
        levels, alpha = self.config.levels, self.config.logit
        if alpha:
            x = (x.sigmoid() - alpha) / (1 - 2 * alpha)
        return x * levels if levels else x

    def _levelled(self, x: Tensor) -> None:
        wrong = ((x != x.floor()) | (x < 0) | (x >= self.config.levels)).flatten(1).any(1)
        if wrong.any():
            row, top = int(wrong.nonzero()[0]), self.config.levels - 1
            raise ValueError(f"x: row {row} has a value that is no whole number from 0 to {top}; rescale it, or set levels")

    def _conditioned(self, c: Tensor | None, rows: int) -> None:
        found = None if c is None else tuple(c.shape)
        wanted = (rows, self.config.context) if self.config.context else None
        if found != wanted:
            raise ValueError(f"c: shape {found}, expected {wanted}; give a row of {self.config.context} numbers for each x")
        if c is not None:
            self._checked(c, "c")

    def _checked(self, rows: Tensor, name: str) -> Tensor:
        """`rows` [B,...] themselves. In training the loss is watched instead, which costs no wait for the device."""
        if not self.training and not rows.isfinite().all():
            row = int((~rows.isfinite()).view(len(rows), -1).any(1).nonzero()[0])
            value = rows[row].flatten()[(~rows[row].isfinite()).flatten().nonzero()[0, 0]].item()
            remedy = "correct the data" if name in ("x", "c", "z") else "the weights have diverged, train again with a lower lr"
            raise ValueError(f"{name}: row {row} holds {value}, which is no finite number; {remedy}")
        return rows
