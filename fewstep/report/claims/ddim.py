"""DDIM against DDPM's ancestral sampler at few steps of DDPM's own chain, with the exact denoiser and a trained one.

Samples are compared with fresh data by energy distance, which is not resolved below what two sets of data have.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from fewstep.core.process import Denoise, Solver
from fewstep.core.random import CounterRng
from fewstep.diffusion.mixture import Mixture
from fewstep.diffusion.processes import DDPMConfig
from fewstep.diffusion.solvers.ancestral import AncestralConfig
from fewstep.diffusion.solvers.sde import DDIMConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.denoisers import drawn, trained
from fewstep.report.quality import energy_distance
from fewstep.training.data.points import DENSITIES

_STEPS, _MOST = 2000, 8192  # of training; the most samples that are compared
_FID: Mapping[int, tuple[float, float]] = MappingProxyType(
    {10: (41.07, 13.36), 20: (18.36, 6.84), 50: (8.01, 4.67)}  # CIFAR-10 by calls: DDPM with the small variance, and DDIM
)
_PROCESS = DDPMConfig()
_SOLVERS: Mapping[str, Solver[Any]] = MappingProxyType(
    {
        "DDIM": DDIMConfig().build(),
        "DDPM": AncestralConfig().build(),
        "DDPM, large variance": AncestralConfig(variance="large").build(),
    }
)


def _criteria(name: str, what: str) -> tuple[Criterion, ...]:
    return tuple(
        Criterion(
            f"{name}-{calls}",
            f"energy distance of DDPM's samples from data over that of DDIM's, {calls} calls, {what}",
            f"arXiv 2010.02502, table 1, CIFAR-10: FID {ddpm} and {ddim}; recalled",
            "at least",
            1.0,
        )
        for calls, (ddpm, ddim) in _FID.items()
    )


EXACT, NETWORK = _criteria("exact", "exact denoiser of a mixture"), _criteria("network", "network trained on a ring")
LARGE = Criterion(
    "large-variance",
    "the same at 10 calls of DDPM with the large variance over that with the small one, exact denoiser",
    "arXiv 2010.02502, table 1, CIFAR-10: FID 367.43 and 41.07; recalled",
    "at least",
    1.0,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    seed, count = bench.effort.seed, min(bench.effort.draws, _MOST)
    mixture = Mixture.drawn(seed)
    exact = _Contest(mixture.denoiser(_PROCESS), mixture.sample(count, seed), mixture.sample(count, seed + 1), torch.float64)
    yield from exact.findings(EXACT, seed)
    yield exact.finding(LARGE, 10, ("DDPM, large variance", "DDPM"), seed)
    model = trained(bench, "ring", _STEPS, {"process": {"kind": "ddpm"}, "parameterisation": {"kind": "eps"}})
    data, fresh = (DENSITIES["ring"].sample(CounterRng.seeded(range(first, first + count))) for first in (seed, seed + count))
    yield from _Contest(model.denoiser(), data, fresh, torch.float32).findings(NETWORK, seed)


@final
class _Contest:
    """Samples of one denoiser by every solver, compared with `data` beside `fresh` data."""

    def __init__(self, denoiser: Denoise, data: Tensor, fresh: Tensor, dtype: torch.dtype) -> None:
        self._denoiser, self._data, self._dtype = denoiser, data, dtype
        self._floor = abs(energy_distance(fresh, data))

    def findings(self, criteria: tuple[Criterion, ...], seed: int) -> Iterator[Finding]:
        """Those of DDPM against DDIM, by the number of calls."""
        for criterion, calls in zip(criteria, _FID, strict=True):
            yield self.finding(criterion, calls, ("DDPM", "DDIM"), seed)

    def finding(self, criterion: Criterion, calls: int, pair: tuple[str, str], seed: int) -> Finding:
        """The first solver's distance over the second's, both at least the floor."""
        grid = torch.linspace(1, 0, calls + 1, dtype=torch.float64)
        far = {}
        for name in pair:
            x = drawn(self._denoiser, _PROCESS, _SOLVERS[name], grid, len(self._data), seed, self._dtype)
            far[name] = energy_distance(x.double(), self._data)
        worse, better = (max(far[name], self._floor) for name in pair)
        how = f"{far[pair[0]]:.2g} for {far[pair[1]]:.2g}; fresh data {self._floor:.1g}"
        return Finding(criterion, worse / better, how, {**far, "fresh data": self._floor})


CLAIM = Claim(
    "ddim",
    "Song et al. 2021, arXiv 2010.02502; Ho et al. 2020, arXiv 2006.11239",
    "At 10 to 50 calls DDIM's samples are nearer to the data than those of DDPM's ancestral sampler, of the same network.",
    (*EXACT, LARGE, *NETWORK),
    measure,
)
