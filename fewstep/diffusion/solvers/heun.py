"""Heun's method on the clock sigma / alpha, and EDM's sampler, which stirs in new noise before each of its steps."""

import math
from typing import ClassVar, NamedTuple, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.process import Denoise, Process, Solver
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.diffusion.processes import spread
from fewstep.diffusion.solvers.multistep import gaussian, mean, table, weigh
from fewstep.diffusion.solvers.nodes import Nodes


class HeunMemory(NamedTuple):
    """Of each step: the weights of x and noise in the stirred x, those of x and D in Euler's step, the correction's weight, the
    times where the step starts and ends, and whether it is corrected."""

    stirred: tuple[Tensor, ...] | None
    euler: tuple[Tensor, ...]
    correction: tuple[Tensor, ...]
    times: tuple[tuple[Tensor, Tensor], ...]
    smooth: tuple[bool, ...]


class Churn(NamedTuple):
    """How much noise is stirred in: `amount` over all steps, within [`least`, `most`] of sigma / alpha, its deviation `scale`."""

    amount: float
    least: float
    most: float
    scale: float


@final
class Heun:
    """Euler's step, then the same with the mean of the slopes at both its ends. Cost: two calls a step, one where an end is
    infinite on the clock of the log-SNR."""

    order = 2
    calls = 2

    def __init__(self, churn: Churn | None = None) -> None:
        self._churn = churn
        self.stochastic = churn is not None

    def init(self, x: Tensor, process: Process, grid: Tensor) -> HeunMemory:
        nodes = Nodes.of(x, process, grid, "heun", noisy=self.stochastic)
        (alpha, sigma), (alpha_s, sigma_s) = nodes.starts, nodes.ends
        start, stirred = nodes.t[..., :-1], None
        if self._churn is not None:
            start, stirred = self._stir(nodes, self._churn, x)
            alpha, sigma = process.alpha(start), process.sigma(start)
        shrink = alpha * sigma_s / (sigma * alpha_s)
        euler = table((sigma_s / sigma, alpha_s * (1 - shrink)), x)
        smooth = (alpha > 0) & (sigma_s > 0)
        correction = torch.where(smooth, alpha_s * (1 / torch.where(smooth, shrink, 1.0) - 1) / 2, 0.0)
        starts, ends = (t.expand(len(x), -1).unbind(1) for t in (start, nodes.t[..., 1:]))
        corrected = smooth if smooth.dim() == 1 else smooth.any(0)
        parts = table((correction,), x)
        return HeunMemory(stirred, euler, parts, tuple(zip(starts, ends, strict=True)), tuple(corrected.tolist()))

    def step(self, denoise: Denoise, x: Tensor, i: int, memory: HeunMemory, rng: Rng) -> tuple[Tensor, HeunMemory]:
        start, end = memory.times[i]
        if memory.stirred is not None:
            x = weigh(memory.stirred[i], (x, gaussian(x, rng)))
        d = mean(denoise(x, start))
        following = weigh(memory.euler[i], (x, d))
        if memory.smooth[i]:
            change = mean(denoise(following, end)) - d
            following = following + spread(memory.correction[i].view(-1), x) * change
        return following, memory

    def _stir(self, nodes: Nodes, churn: Churn, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The times after new noise came in, and the weights of x and noise."""
        alpha, sigma = nodes.starts
        ratio, most = sigma / alpha, nodes.process.sigma(torch.ones_like(sigma)) / nodes.process.alpha(torch.ones_like(sigma))
        gain = min(churn.amount / nodes.steps, math.sqrt(2) - 1)
        within = (ratio >= churn.least) & (ratio <= churn.most) & torch.isfinite(ratio)
        raised = torch.where(within, torch.minimum(ratio * (1 + gain), most), ratio)
        t = torch.where(within, nodes.process.time(raised), nodes.t[..., :-1])
        alpha_up = nodes.process.alpha(t)
        fresh = torch.where(within, torch.sqrt((raised**2 - ratio**2).clamp(min=0)), 0.0)
        scale = torch.where(within, alpha_up / alpha, 1.0)
        return t, table((scale, alpha_up * churn.scale * fresh), x)


@final
class HeunConfig(Config):
    """Heun's second-order method, EDM's deterministic sampler."""

    kind: ClassVar[str] = "heun"
    source: ClassVar[str] = "Karras et al. 2022, arXiv 2206.00364, algorithm 1"
    claims: ClassVar[tuple[str, ...]] = ("heun-rho", "solver-order")

    def build(self) -> Solver[HeunMemory]:
        """The solver."""
        return Heun()


@final
class ChurnConfig(Config):
    """EDM's stochastic sampler: before a step the noise is raised by a factor of 1 + min(`churn` / K, sqrt 2 - 1).

    Only where `least` <= sigma / alpha <= `most`; the new noise has the deviation `noise`. Its limit is the ODE's law.
    Differs: noise is never raised above that of t = 1.
    """

    kind: ClassVar[str] = "churn"
    source: ClassVar[str] = "Karras et al. 2022, arXiv 2206.00364, algorithm 2"
    claims: ClassVar[tuple[str, ...]] = ("churn",)

    churn: float = Field(default=40.0, ge=0)
    least: float = Field(default=0.05, ge=0)
    most: float = Field(default=50.0, gt=0)
    noise: float = Field(default=1.003, gt=0)

    def build(self) -> Solver[HeunMemory]:
        """The solver."""
        return Heun(Churn(self.churn, self.least, self.most, self.noise))
