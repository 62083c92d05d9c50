"""Adaptive Runge-Kutta of order 5(4) by SciPy, which takes as many calls as the tolerance asks for."""

from typing import ClassVar, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.integrate import solve_ivp
from torch import Tensor

from fewstep.core.process import Denoise, Process, Solver
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.diffusion.processes import spread
from fewstep.diffusion.solvers.multistep import mean, table, weigh
from fewstep.diffusion.solvers.nodes import Nodes
from fewstep.diffusion.solvers.ode import first_order


class AdaptiveMemory(NamedTuple):
    """The process; the angle atan(sigma / alpha), alpha and sigma at each place, [K+1,3] or [B,K+1,3] float64; steps to sigma = 0
    as weights of x and D."""

    process: Process
    places: Tensor
    times: tuple[Tensor, ...]
    ending: tuple[Tensor, ...]
    clean: tuple[bool, ...]


@final
class Adaptive:
    """RK45 on the angle atan(sigma / alpha), where the ODE is as smooth at noise as at data; a step to sigma = 0 is of order 1.

    Cost: rows are solved one by one, each with steps of its own, so that a row does not depend on its batch.
    """

    order = 5
    calls = 0
    stochastic = False

    def __init__(self, rtol: float, atol: float) -> None:
        self._rtol, self._atol = rtol, atol

    def init(self, x: Tensor, process: Process, grid: Tensor) -> AdaptiveMemory:
        nodes = Nodes.of(x, process, grid, "rk45")
        places = torch.stack((torch.atan2(nodes.sigma, nodes.alpha), nodes.alpha, nodes.sigma), -1)
        ending = table(first_order(nodes), x)
        return AdaptiveMemory(process, places, nodes.times(len(x)), ending, nodes.clean)

    def step(self, denoise: Denoise, x: Tensor, i: int, memory: AdaptiveMemory, rng: Rng) -> tuple[Tensor, AdaptiveMemory]:
        if memory.clean[i]:
            return weigh(memory.ending[i], (x, mean(denoise(x, memory.times[i])))), memory
        places = memory.places.expand(len(x), -1, -1)[:, i : i + 2]
        rows = [self._solve(denoise, x[b : b + 1], b, places[b], memory.process) for b in range(len(x))]
        return torch.cat(rows), memory

    def _solve(self, denoise: Denoise, x: Tensor, row: int, places: Tensor, process: Process) -> Tensor:
        (angle, alpha, sigma), (angle_s, alpha_s, sigma_s) = places.tolist()

        def slope(at: float, flat: NDArray[np.float64]) -> NDArray[np.float64]:
            t = process.time(torch.tan(places.new_tensor([at])))
            size = torch.hypot(process.alpha(t), process.sigma(t))
            y = torch.from_numpy(flat).to(x.device).view(x.shape)
            d = mean(denoise((y * spread(size, y)).to(x.dtype), t)).double()
            return ((np.cos(at) * y - d) / np.sin(at)).flatten().cpu().numpy()

        start = (x.double() / np.hypot(alpha, sigma)).flatten().cpu().numpy()
        found = solve_ivp(slope, (angle, angle_s), start, rtol=self._rtol, atol=self._atol)
        if not found.success:
            raise ValueError(f"solver='rk45': row {row} did not converge ({found.message}); loosen rtol and atol")
        return torch.from_numpy(found.y[:, -1] * np.hypot(alpha_s, sigma_s)).to(x).view(x.shape)


@final
class AdaptiveConfig(Config):
    """The probability-flow ODE by SciPy's RK45, to relative and absolute tolerances; a short grid is best, of 1 to 3 steps."""

    kind: ClassVar[str] = "rk45"
    source: ClassVar[str] = "Dormand and Prince 1980; Song et al. 2021, arXiv 2011.13456, section 4.3"

    rtol: float = Field(default=1e-5, gt=0)
    atol: float = Field(default=1e-5, gt=0)

    def build(self) -> Solver[AdaptiveMemory]:
        """The solver."""
        return Adaptive(self.rtol, self.atol)
