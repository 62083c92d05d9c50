"""What steers sampling from outside: classifier-free guidance wraps denoisers, inpainting a solver. No networks."""

from typing import Generic, NamedTuple, TypeVar, final

import torch
from torch import Tensor

from fewstep.core.process import Denoise, Denoised, Process, Solver
from fewstep.core.random import Rng
from fewstep.diffusion.processes import diffuse, ratio, spread
from fewstep.diffusion.solvers.multistep import gaussian, mean
from fewstep.diffusion.solvers.nodes import Nodes

M = TypeVar("M")


@final
class Guided:
    """D = D_u + weight (D_c - D_u) where sigma / alpha lies within `interval`, elsewhere D_c alone.

    In terms of the denoised estimate guidance is the same for every parameterisation. The unconditional estimate is made for the
    rows inside the interval only, and costs a call for each. `weight` 1 is the conditional model, 0 the unconditional.
    Source: Ho and Salimans 2022, arXiv 2207.12598, equation 6; Kynkaanniemi et al. 2024, arXiv 2404.07724 (interval).
    Differs: no learned variance is passed on.
    """

    def __init__(
        self,
        conditional: Denoise,
        unconditional: Denoise,
        process: Process,
        weight: float,
        interval: tuple[float, float] = (0.0, float("inf")),
    ) -> None:
        if not 0 <= interval[0] < interval[1]:
            raise ValueError(f"interval={interval}: expected 0 <= low < high, ratios sigma / alpha; exchange them")
        self._conditional, self._unconditional = conditional, unconditional
        self._process, self._weight, self._interval = process, weight, interval

    def __call__(self, x: Tensor, t: Tensor, /) -> Denoised:
        given = self._conditional(x, t)
        noise, (low, high) = ratio(self._process, t), self._interval
        rows = ((noise >= low) & (noise <= high)).nonzero().squeeze(1)
        if self._weight == 1 or len(rows) == 0:
            return Denoised(mean(given), calls=calls(given, len(x)))
        free = self._unconditional(x[rows], t[rows])
        shift = (self._weight - 1) * (mean(given)[rows] - mean(free))
        return Denoised(mean(given).index_add(0, rows, shift), calls=calls(given, len(x)) + calls(free, len(rows)))


def calls(estimate: Tensor | Denoised, rows: int) -> int:
    """The evaluations of the network behind an estimate for `rows` rows."""
    return estimate.calls if isinstance(estimate, Denoised) and estimate.calls is not None else rows


class InpaintMemory(NamedTuple, Generic[M]):
    """The solver's memory, and the grid's places."""

    inner: M
    nodes: Nodes


@final
class Inpaint(Generic[M]):
    """Any solver, kept to what is known: after each step known entries are replaced by the known data with that step's noise.

    `mask` True where known; it and `known` broadcast to x. Each step is done `times` times, between them noised back to where it
    began, so that both parts agree. Cost: `times` the solver's calls. Raises ValueError for known entries that are not finite.
    Source: Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1 (jumps of length 1).
    """

    def __init__(self, solver: Solver[M], known: Tensor, mask: Tensor, times: int = 1) -> None:
        if times < 1:
            raise ValueError(f"times={times}: must be at least 1; 1 does not resample")
        if not bool(torch.isfinite(known[mask.expand_as(known)]).all()):
            raise ValueError("known: not finite where mask is True; mask those entries out")
        self._solver, self._known, self._mask, self._times = solver, torch.where(mask, known, 0.0), mask, times
        self.order, self.calls, self.stochastic = solver.order, solver.calls * times, True

    def init(self, x: Tensor, process: Process, grid: Tensor) -> InpaintMemory[M]:
        return InpaintMemory(self._solver.init(x, process, grid), Nodes.of(x, process, grid, "inpaint", noisy=True))

    def step(self, denoise: Denoise, x: Tensor, i: int, memory: InpaintMemory[M], rng: Rng) -> tuple[Tensor, InpaintMemory[M]]:
        places = memory.nodes.times(len(x))
        for n in range(self._times):
            own = rng.at(n)
            following, inner = self._solver.step(denoise, x, i, memory.inner, own.split("step"))
            known = diffuse(memory.nodes.process, self._known.expand_as(x).to(x), places[i + 1], gaussian(x, own.split("known")))
            following = torch.where(self._mask, known, following)
            if n + 1 < self._times:
                x = _noised(memory.nodes, following, i, gaussian(x, own.split("back")))
        return following, memory._replace(inner=inner)


def _noised(nodes: Nodes, x: Tensor, i: int, z: Tensor) -> Tensor:
    """x at place i from x at place i + 1, by the forward process."""
    alpha, sigma = nodes.alpha.expand(len(x), -1), nodes.sigma.expand(len(x), -1)
    kept = alpha[:, i] / alpha[:, i + 1]
    fresh = torch.sqrt((sigma[:, i] ** 2 - (kept * sigma[:, i + 1]) ** 2).clamp(min=0))
    return spread(kept, x) * x + spread(fresh, x) * z
