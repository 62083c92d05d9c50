"""Grids of times from noise to data, by name and apart from solvers; any grid serves any process and solver.

All but the learned one place K points from the first ratio sigma / alpha to the last, and go to t = 0 from there. This file
knows no solver; `learned` fits grids to one.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.process import Process
from fewstep.core.recipe import Config
from fewstep.diffusion.processes import ratio

SHIPPED = Path(__file__).with_name("learned.json")  # `python -m fewstep.diffusion.learned` writes it


class GridConfig(Config):
    """K steps from `most` to `least`, ratios sigma / alpha (None: the ends of what the process is trained on, within 80 and
    0.002), the last of them to t = 0 unless `to_zero` is false."""

    most: float | None = Field(default=None, gt=0)
    least: float | None = Field(default=None, gt=0)
    to_zero: bool = True

    @abstractmethod
    def ratios(self, first: Tensor, last: Tensor, count: int, process: Process) -> Tensor:
        """`count` ratios that fall from `first` to `last`; the first alone where `count` is 1."""
        ...

    def build(self, process: Process, steps: int) -> Tensor:
        """[steps + 1] float64 times. Raises ValueError for less than one step or ends that are none."""
        if steps < 1:
            raise ValueError(f"steps={steps}: a grid has at least 1; raise it")
        begin, end = (ratio(process, torch.tensor(t, dtype=torch.float64)) for t in reversed(process.span))
        first = begin.clamp(max=80.0) if self.most is None else begin.new_tensor(self.most)
        last = end.clamp(min=0.002) if self.least is None else end.new_tensor(self.least)
        if not last < first:
            raise ValueError(f"least={float(last):g}: must lie below most={float(first):g}; exchange them")
        count = steps if self.to_zero else steps + 1
        times = process.time(self.ratios(first, last, count, process))
        return torch.cat((times, times.new_zeros(1))) if self.to_zero else times


@final
class UniformConfig(GridConfig):
    """Uniform in the process's own time."""

    kind: ClassVar[str] = "uniform"
    source: ClassVar[str] = "Ho et al. 2020, arXiv 2006.11239; Lipman et al. 2023, arXiv 2210.02747"

    def ratios(self, first: Tensor, last: Tensor, count: int, process: Process) -> Tensor:
        begin, end = float(process.time(first)), float(process.time(last))
        return ratio(process, torch.linspace(begin, end, count, dtype=torch.float64, device=first.device))


@final
class KarrasConfig(GridConfig):
    """Uniform in (sigma / alpha)^(1/rho): the larger rho, the more steps at little noise."""

    kind: ClassVar[str] = "karras"
    source: ClassVar[str] = "Karras et al. 2022, arXiv 2206.00364, equation 5"
    claims: ClassVar[tuple[str, ...]] = ("heun-rho",)

    rho: float = Field(default=7.0, ge=1)

    def ratios(self, first: Tensor, last: Tensor, count: int, process: Process) -> Tensor:
        place = torch.linspace(0, 1, count, dtype=torch.float64, device=first.device)
        return torch.lerp(first ** (1 / self.rho), last ** (1 / self.rho), place) ** self.rho


@final
class CosineGridConfig(GridConfig):
    """Uniform in the angle atan(sigma / alpha), as the cosine process is in time."""

    kind: ClassVar[str] = "cosine"
    source: ClassVar[str] = "Nichol and Dhariwal 2021, arXiv 2102.09672, section 3.2"

    def ratios(self, first: Tensor, last: Tensor, count: int, process: Process) -> Tensor:
        return torch.tan(torch.lerp(torch.atan(first), torch.atan(last), torch.linspace(0, 1, count, dtype=torch.float64)))


@final
class LogSNRConfig(GridConfig):
    """Uniform in the log-SNR."""

    kind: ClassVar[str] = "log-snr"
    source: ClassVar[str] = "Lu et al. 2022, arXiv 2206.00927, section 3.3"

    def ratios(self, first: Tensor, last: Tensor, count: int, process: Process) -> Tensor:
        place = torch.linspace(0, 1, count, dtype=torch.float64, device=first.device)
        return torch.exp(torch.lerp(torch.log(first), torch.log(last), place))


@final
class LearnedConfig(Config):
    """Ratios sigma / alpha that were fitted to a solver and a number of steps, so that few steps arrive where many would.

    Without `ratios` of one's own (`fit_grid` makes them) those that are shipped: for UniPC of 3 terms, from 50 to t = 0 or,
    unless `to_zero`, to 0.02, for data of deviation about 1. `scale` multiplies the ratios, for data of another.
    """

    kind: ClassVar[str] = "learned"
    source: ClassVar[str] = "Tong et al. 2025, arXiv 2405.15506 (grids by gradient through the solver)"
    claims: ClassVar[tuple[str, ...]] = ("learned-grid", "digits-calls")

    to_zero: bool = True
    ratios: tuple[float, ...] = ()
    scale: float = Field(default=1.0, gt=0)

    def build(self, process: Process, steps: int) -> Tensor:
        """[steps + 1] float64 times. Raises ValueError for a number of steps that no grid was fitted to."""
        known = {len(ratios) - 1: ratios for ratios in ((self.ratios,) if self.ratios else self._shipped())}
        if steps not in known:
            counts = ", ".join(str(count) for count in sorted(known))
            raise ValueError(f"steps={steps}: a grid was learned for {counts} only; take one of these or make one by `fit_grid`")
        return process.time(self.scale * torch.tensor(known[steps], dtype=torch.float64))

    def _shipped(self) -> list[list[float]]:
        return [grid["ratios"] for grid in json.loads(SHIPPED.read_text())["grids"] if grid["to_zero"] == self.to_zero]


GRIDS: Mapping[str, type[Config]] = MappingProxyType(
    {config.kind: config for config in (KarrasConfig, UniformConfig, CosineGridConfig, LogSNRConfig, LearnedConfig)}
)
