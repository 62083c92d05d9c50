"""Ancestral sampling: a step draws from the law of x_s given x_t and the denoised estimate."""

from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from fewstep.core.process import Denoise, Denoised, Process, Solver
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.diffusion.solvers.multistep import gaussian, mean, table, weigh
from fewstep.diffusion.solvers.nodes import Nodes

Variance = Literal["small", "large", "learned"]


class AncestralMemory(NamedTuple):
    """Of each step: the weights of x and D, the standard deviations small and large ([2] or [B,2]); the times."""

    table: tuple[Tensor, ...]
    deviations: tuple[Tensor, ...]
    times: tuple[Tensor, ...]


@final
class Ancestral:
    """DDPM's sampler with the least or the greatest variance, or where the network puts it between them."""

    order = 1
    calls = 1
    stochastic = True

    def __init__(self, variance: Variance) -> None:
        self._variance = variance

    def init(self, x: Tensor, process: Process, grid: Tensor) -> AncestralMemory:
        nodes = Nodes.of(x, process, grid, "ancestral", noisy=True)
        (alpha, sigma), (alpha_s, sigma_s) = nodes.starts, nodes.ends
        large = sigma * torch.sqrt((1 - nodes.shrink) * (1 + nodes.shrink))
        small = sigma_s / sigma * large
        down = nodes.shrink * sigma_s / sigma  # sigma_s^2 alpha_t / (sigma_t^2 alpha_s)
        rows = table((down, alpha_s - down * alpha), x)
        return AncestralMemory(rows, table((small, torch.where(sigma_s == 0, 0.0, large)), x), nodes.times(len(x)))

    def step(self, denoise: Denoise, x: Tensor, i: int, memory: AncestralMemory, rng: Rng) -> tuple[Tensor, AncestralMemory]:
        estimate = denoise(x, memory.times[i])
        moved = weigh(memory.table[i], (x, mean(estimate)))
        small, large = (s.view(-1, *(1,) * (x.dim() - 1)) for s in memory.deviations[i].unbind(-1))
        deviation = large if self._variance == "large" else small
        if self._variance == "learned":
            if not isinstance(estimate, Denoised) or estimate.variance is None:
                raise ValueError("variance='learned': this denoiser returns none; choose 'small' or 'large'")
            floor = torch.finfo(x.dtype).tiny  # a step to sigma = 0 has no deviation, whatever the power
            deviation = large * (small.clamp(min=floor) / large.clamp(min=floor)) ** (1 - estimate.variance)
        return moved + deviation * gaussian(x, rng), memory


@final
class AncestralConfig(Config):
    """DDPM's ancestral sampler; `variance` small is the posterior's (DDIM with eta 1), large the forward step's.

    Learned: exp(v ln large + (1 - v) ln small), v from the denoiser. No noise in a step that ends at sigma = 0.
    """

    kind: ClassVar[str] = "ancestral"
    source: ClassVar[str] = (
        "Ho et al. 2020, arXiv 2006.11239, algorithm 2; Nichol and Dhariwal 2021, arXiv 2102.09672, equation 15"
    )

    variance: Variance = "small"

    def build(self) -> Solver[AncestralMemory]:
        """The solver."""
        return Ancestral(self.variance)
