"""Heun's method on EDM's grid against DDIM on an even grid of VP's time: how far from the end of the path, at equal calls.

The path is that of the probability-flow ODE of one denoiser, exact or trained, so that nothing but its discretisation counts.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor

from fewstep.core.process import Denoise, Process, Solver
from fewstep.core.random import CounterRng
from fewstep.diffusion.grids import GridConfig, KarrasConfig, LogSNRConfig, UniformConfig
from fewstep.diffusion.mixture import Mixture
from fewstep.diffusion.processes import EDMConfig, VPConfig, translate
from fewstep.diffusion.solvers.heun import HeunConfig
from fewstep.diffusion.solvers.sde import DDIMConfig
from fewstep.diffusion.solvers.unipc import UniPCConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.denoisers import arrive, trained

_ROWS, _FINE, _STEPS = 512, 500, 2000  # paths, steps of the reference, steps of training
_EDM, _VP = EDMConfig(), VPConfig()
_HEUN, _DDIM = HeunConfig().build(), DDIMConfig().build()
_RHO, _EVEN_SIGMA = KarrasConfig(most=80, least=0.002), KarrasConfig(rho=1, most=80, least=0.002)
_EVEN_TIME, _EVEN_LOG = UniformConfig(most=80, least=0.002), LogSNRConfig(most=80, least=0.002)
_OWN = "the calls are its; the threshold is fewstep's own"


def _against(name: str, what: str) -> tuple[Criterion, ...]:
    statement = f"error of DDIM on an even grid of VP's time over that of Heun with rho = 7, {{}} calls, {what}"
    return tuple(
        Criterion(f"{name}-{calls}", statement.format(calls), f"arXiv 2206.00364, figure 2; {_OWN}", "at least", 1.0)
        for calls in (35, 79)
    )


EXACT, NETWORK = _against("exact", "exact denoiser of a mixture"), _against("network", "network trained on a ring")
GRID = Criterion(
    "rho-7-vp",
    "error of Heun on the even grid of VP's time over that with rho = 7, 35 calls, exact denoiser",
    f"arXiv 2206.00364, section 3; {_OWN}",
    "at least",
    1.0,
)
RHO = Criterion(
    "rho-7-1",
    "error of Heun with rho = 1 over that with rho = 7, 35 calls, exact denoiser",
    f"arXiv 2206.00364, figure 13c; {_OWN}",
    "at least",
    1.0,
)
SPEED = Criterion(
    "speed-up",
    "calls that DDIM needs for the error of Heun with rho = 7 at 35, over 35, exact denoiser",
    "arXiv 2206.00364, section 3: 7.3 for VP, 3.2 for the DDIM-based model; recalled",
    "at least",
    3.2,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    seed = bench.effort.seed
    exact = _Paths(Mixture.drawn(seed).denoiser(_EDM), torch.float64, seed)
    yield from exact.findings(EXACT)
    heun = exact.heun(35, _RHO)
    for criterion, grid in ((GRID, _EVEN_TIME), (RHO, _EVEN_SIGMA)):
        other = exact.heun(35, grid)
        yield Finding(criterion, other / heun, f"{other:.2g} for {heun:.2g}")
    calls, numbers = needed(exact.ddim, heun)
    yield Finding(SPEED, calls / 35, f"DDIM reaches {heun:.2g} after about {calls:.0f} calls", numbers)
    model = trained(bench, "ring", _STEPS, {"process": {"kind": "edm"}, "parameterisation": {"kind": "edm", "sigma_data": 1.4}})
    yield from _Paths(model.denoiser(), torch.float32, seed).findings(NETWORK)


@final
class _Paths:
    """The same paths of a denoiser of the EDM process, discretised in several ways."""

    def __init__(self, denoiser: Denoise, dtype: torch.dtype, seed: int) -> None:
        self._denoiser = denoiser
        self._eps = CounterRng.seeded(range(seed, seed + _ROWS)).normal(2).to(dtype)
        self._end = self._arrive(UniPCConfig(terms=3).build(), _EDM, _EVEN_LOG, _FINE)

    def findings(self, criteria: tuple[Criterion, ...]) -> Iterator[Finding]:
        """DDIM's error over Heun's, with those at other numbers of calls behind them."""
        found = {calls: (self.ddim(calls), self.heun(calls, _RHO)) for calls in (9, 17, 35, 79)}
        numbers = {f"{calls} calls": {"DDIM": ddim, "Heun": heun} for calls, (ddim, heun) in found.items()}
        for criterion, calls in zip(criteria, (35, 79), strict=True):
            ddim, heun = found[calls]
            yield Finding(criterion, ddim / heun, f"{ddim:.2g} for {heun:.2g}, {_ROWS} paths", numbers)

    def ddim(self, calls: int) -> float:
        """The error of DDIM on VP's clock."""
        return self._missed(_DDIM, _VP, _EVEN_TIME, calls)

    def heun(self, calls: int, grid: GridConfig) -> float:
        """The error of Heun, whose last step is a single call; a grid even in time is even in that of VP."""
        return self._missed(_HEUN, _VP if grid is _EVEN_TIME else _EDM, grid, (calls + 1) // 2)

    def _missed(self, solver: Solver[Any], process: Process, grid: GridConfig, steps: int) -> float:
        return float((self._arrive(solver, process, grid, steps) - self._end).double().square().mean().sqrt())

    def _arrive(self, solver: Solver[Any], process: Process, grid: GridConfig, steps: int) -> Tensor:
        denoiser = translate(self._denoiser, _EDM, process)
        return arrive(denoiser, process, solver, grid.build(process, steps), self._eps)


def needed(missed: Callable[[int], float], wanted: float, most: int = 4480) -> tuple[float, dict[str, float]]:
    """The calls at which an error falls to `wanted`, by interpolation between doublings of 35, or `most`."""
    calls, now = 35, missed(35)
    numbers = {"35 calls": now}
    while now > wanted and calls < most:
        before, calls = now, 2 * calls
        now = missed(calls)
        numbers[f"{calls} calls"] = now
        if now <= wanted:
            return calls / 2 * 2 ** (math.log(before / wanted) / math.log(before / now)), numbers
    return float(calls), numbers


CLAIM = Claim(
    "heun-rho",
    "Karras et al. 2022, arXiv 2206.00364, section 3",
    "Heun's method on a grid even in the seventh root of sigma ends nearer the end of the path than DDIM, at equal calls.",
    (*EXACT, GRID, RHO, SPEED, *NETWORK),
    measure,
)
