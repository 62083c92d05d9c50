"""Langevin dynamics: at every level of noise some moves towards that level's law, alone or after a predictor's step."""

from typing import ClassVar, NamedTuple, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.process import Denoise, Process, Solver
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.diffusion.processes import spread
from fewstep.diffusion.solvers.multistep import Rows, gaussian, mean, table, weigh
from fewstep.diffusion.solvers.nodes import Nodes
from fewstep.diffusion.solvers.sde import ending_denoised, require_data


class LangevinMemory(NamedTuple):
    """Of each step: weights of x, D and noise in the step that a solver begins with, and in the moves that follow or the scale
    that takes x on; times at its start and end; whether it ends at sigma = 0."""

    table: tuple[Tensor, ...]
    following: tuple[Tensor, ...]
    times: tuple[Tensor, ...]
    clean: tuple[bool, ...]


@final
class AnnealedLangevin:
    """At each place of the grid `moves` of x += a/2 score + sqrt(a) z, a proportional to sigma^2; at sigma = 0 the estimate."""

    order = 0
    stochastic = True

    def __init__(self, moves: int, step_size: float) -> None:
        self.calls = moves
        self._step_size = step_size

    def init(self, x: Tensor, process: Process, grid: Tensor) -> LangevinMemory:
        nodes = Nodes.of(x, process, grid, "annealed-langevin", noisy=True)
        require_data(nodes, "annealed-langevin")
        (alpha, sigma), clean = nodes.starts, nodes.clean
        move = self._step_size / 2
        rows = table((torch.full_like(sigma, 1 - move), alpha * move, sigma * (2 * move) ** 0.5), x)
        scales = table((nodes.ends[0] / alpha,), x)
        return LangevinMemory(rows, scales, nodes.times(len(x)), clean)

    def step(self, denoise: Denoise, x: Tensor, i: int, memory: LangevinMemory, rng: Rng) -> tuple[Tensor, LangevinMemory]:
        for n in range(self.calls):
            x = weigh(memory.table[i], (x, mean(denoise(x, memory.times[i])), gaussian(x, rng.at(n))))
        if memory.clean[i]:
            return mean(denoise(x, memory.times[i])), memory
        return x * spread(memory.following[i].view(-1), x), memory


@final
class PredictorCorrector:
    """A step of the reverse diffusion, then `moves` of Langevin dynamics at its end of signal-to-noise ratio `snr`."""

    order = 1
    stochastic = True

    def __init__(self, moves: int, snr: float) -> None:
        self.calls = 1 + moves
        self._snr = snr

    def init(self, x: Tensor, process: Process, grid: Tensor) -> LangevinMemory:
        nodes = Nodes.of(x, process, grid, "predictor-corrector", noisy=True)
        (alpha, sigma), (alpha_s, sigma_s) = nodes.starts, nodes.ends
        kept = alpha / alpha_s
        fresh = (1 - nodes.shrink) * (1 + nodes.shrink)  # V / sigma_t^2, V the variance that one forward step adds
        rows = ending_denoised(nodes, Rows(2 - kept - fresh, fresh * alpha, noise=sigma * torch.sqrt(fresh)))
        assert rows.noise is not None
        move = 2 * (self._snr * kept) ** 2  # over sigma_s^2
        moves = table((1 - move, alpha_s * move, sigma_s * torch.sqrt(2 * move)), x)
        return LangevinMemory(table((rows.x, rows.d, rows.noise), x), moves, nodes.times(len(x)), nodes.clean)

    def step(self, denoise: Denoise, x: Tensor, i: int, memory: LangevinMemory, rng: Rng) -> tuple[Tensor, LangevinMemory]:
        x = weigh(memory.table[i], (x, mean(denoise(x, memory.times[i])), gaussian(x, rng)))
        if not memory.clean[i]:
            for n in range(self.calls - 1):
                x = weigh(memory.following[i], (x, mean(denoise(x, memory.times[i + 1])), gaussian(x, rng.at(n))))
        return x, memory


@final
class AnnealedLangevinConfig(Config):
    """Annealed Langevin dynamics: `moves` of a = `step_size` sigma^2 at each level; the last level denoised.

    The paper's 2e-5 for a last level of 0.01 is a `step_size` of 0.2. Differs: any process with alpha > 0, x being scaled between
    levels as its data is; the last estimate, which is Jolicoeur-Martineau's.
    """

    kind: ClassVar[str] = "annealed-langevin"
    source: ClassVar[str] = (
        "Song and Ermon 2019, arXiv 1907.05600, algorithm 1; Jolicoeur-Martineau et al. 2020, arXiv 2009.05475"
    )

    moves: int = Field(default=100, ge=1)
    step_size: float = Field(default=0.2, gt=0, lt=2)

    def build(self) -> Solver[LangevinMemory]:
        """The solver."""
        return AnnealedLangevin(self.moves, self.step_size)


@final
class PredictorCorrectorConfig(Config):
    """The reverse-diffusion predictor with `moves` of the Langevin corrector (0: the predictor alone) on any process.

    A step's forward kernel is x_t = A x_s + sqrt(V) z, and the corrector's rate A^2 is 1 for VE and 1 - beta for VP.
    Differs: the norms of noise and score are sqrt(d) and sqrt(d) / sigma, about what they are, not the batch's means, so that no
    row depends on others; a step to sigma = 0 ends at the estimate.
    """

    kind: ClassVar[str] = "predictor-corrector"
    source: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456, algorithms 2 to 5 and appendix E"

    moves: int = Field(default=1, ge=0)
    snr: float = Field(default=0.16, gt=0)

    def build(self) -> Solver[LangevinMemory]:
        """The solver."""
        return PredictorCorrector(self.moves, self.snr)
