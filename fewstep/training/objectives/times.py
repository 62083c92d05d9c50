"""The laws that times of training are drawn by. This file knows no loss."""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.core.process import Process
from fewstep.core.recipe import Config

_STEEPEST = 2 / (math.pi - 2)  # beyond it the mode's law runs backwards


class TimesConfig(Config):
    """The base of objectives that draw a time for each row.

    `times`: uniform over the process's span; the log of sigma / alpha normal around `location` with deviation `spread` (for flow
    matching this is the logit of t, SD3's law); that log uniform over the span, or on one of `levels` values evenly spaced on it
    (NCSN's geometric levels); or SD3's mode of weight `spread`.
    """

    times: Literal["uniform", "log-normal", "log-uniform", "levels", "mode"] = "log-normal"
    location: float = -1.2
    spread: float = Field(default=1.2, gt=0)
    levels: int = Field(default=10, ge=2)

    @model_validator(mode="after")
    def _runs_forwards(self) -> "TimesConfig":
        if self.times == "mode" and self.spread > _STEEPEST:
            raise ValueError(f"spread={self.spread}: times='mode' takes at most 2 / (pi - 2) = {_STEEPEST:.2f}; lower it")
        return self

    def drawn(self, process: Process, uniform: Tensor) -> Tensor:
        """Times [B] of this law inside the process's span, from uniform numbers [B] of [0, 1).

        Source of "mode": Esser et al. 2024, arXiv 2403.03206, section 3.1; of "levels": Song and Ermon 2019, arXiv 1907.05600.
        """
        first, last = process.span
        if self.times == "uniform":
            return first + (last - first) * uniform
        if self.times == "mode":
            t = 1 - uniform - self.spread * (torch.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)
            return t.clamp(first, last)
        edges = torch.tensor([max(first, 1e-5), last], dtype=torch.float64, device=uniform.device)
        low, high = (process.sigma(edges).log() - process.alpha(edges).log()).clamp(-20, 20)
        if self.times == "log-normal":
            log_ratio = self.location + self.spread * torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
        else:
            place = uniform if self.times == "log-uniform" else (uniform * self.levels).floor() / (self.levels - 1)
            log_ratio = low + (high - low) * place
        return process.time(log_ratio.clamp(low, high).exp()).clamp(first, last)
