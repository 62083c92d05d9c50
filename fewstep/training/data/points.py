"""Laws of points in the plane, sampled exactly, whose densities are known: what density models are measured on.

Every law has about unit scale and mean 0. This file knows no model and no objective.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng, Rng
from fewstep.training.data.arrays import ArraysConfig, rows_of


class Density(ABC):
    """A law of points in the plane, next to nothing of which lies outside [-`reach`, reach]^2."""

    reach: float

    @abstractmethod
    def sample(self, rng: Rng) -> Tensor:
        """[B,2] float64: one point for each row of `rng`, exactly of this law."""

    @abstractmethod
    def log_density(self, x: Tensor) -> Tensor:
        """[N] nats for x [N,2] float64."""

    def entropy(self, cells: int = 512) -> float:
        """Nats, by the midpoint rule on cells^2 squares. Cost: as many densities."""
        side = 2 * self.reach / cells
        middles = torch.arange(cells, dtype=torch.float64).add(0.5).mul(side) - self.reach
        total = 0.0
        for column in middles:
            log_p = self.log_density(torch.stack([column.expand(cells), middles], 1))
            total -= float(torch.special.xlogy(log_p.exp(), log_p.exp()).sum()) * side * side
        return total


@final
class Ring(Density):
    """Eight Gaussians of standard deviation 0.2 on a circle of radius 2."""

    reach, radius, deviation, modes = 4.0, 2.0, 0.2, 8

    def sample(self, rng: Rng) -> Tensor:
        mode = (rng.split("mode").uniform() * self.modes).long()
        return self._centres()[mode] + self.deviation * rng.split("place").normal(2)

    def log_density(self, x: Tensor) -> Tensor:
        return _mixture(x, self._centres(), x.new_full((2,), self.deviation))

    def _centres(self) -> Tensor:
        angle = torch.arange(self.modes, dtype=torch.float64) * (2 * math.pi / self.modes)
        return self.radius * torch.stack([angle.cos(), angle.sin()], 1)


@final
class Moons(Density):
    """Two half circles of radius 1 that reach into each other, blurred by a Gaussian of standard deviation 0.1."""

    reach, deviation = 3.0, 0.1

    def sample(self, rng: Rng) -> Tensor:
        upper = rng.split("moon").uniform() < 0.5
        upper_arc, lower_arc = _moons(math.pi * rng.split("angle").uniform())
        return torch.where(upper[:, None], upper_arc, lower_arc) + self.deviation * rng.split("blur").normal(2)

    def log_density(self, x: Tensor) -> Tensor:
        nodes, weights = (torch.from_numpy(found) for found in np.polynomial.legendre.leggauss(64))
        centres = torch.cat(_moons(math.pi / 2 * (nodes + 1)))
        return _mixture(x, centres, x.new_full((2,), self.deviation), (weights / 4).repeat(2))


@final
class Checkerboard(Density):
    """Uniform on the eight black squares of side 1 of a board on [-2, 2]^2."""

    reach = 2.0

    def sample(self, rng: Rng) -> Tensor:
        x = 4 * rng.split("x").uniform()
        y = 2 * rng.split("y").uniform()  # a height within the black squares of a column alone, stacked
        row = 2 * y.floor() + x.floor() % 2
        return torch.stack([x - 2, row + y % 1 - 2], 1)

    def log_density(self, x: Tensor) -> Tensor:
        column, row = (x + 2).floor().unbind(1)
        black = ((column + row) % 2 == 0) & ((x >= -2) & (x < 2)).all(1)
        return torch.where(black, -math.log(8), -math.inf).to(x)

    def entropy(self, cells: int = 512) -> float:
        return math.log(8)


@final
class Pinwheel(Density):
    """Five Gaussian arms, twisted about the centre by an angle in proportion to the distance from it.

    The twist keeps areas, so that the density is that of the arms. Differs: the usual twist depends on the place along the arm
    and has no simple density.
    """

    reach, distance, along, across, arms, twist = 5.0, 1.5, 0.45, 0.12, 5, 1.0

    def sample(self, rng: Rng) -> Tensor:
        arm = (rng.split("arm").uniform() * self.arms).long() * (2 * math.pi / self.arms)
        deviations = torch.tensor([self.along, self.across], dtype=torch.float64)
        straight = torch.tensor([self.distance, 0.0], dtype=torch.float64) + deviations * rng.split("place").normal(2)
        return _turned(straight, arm + self.twist * torch.linalg.vector_norm(straight, dim=1))

    def log_density(self, x: Tensor) -> Tensor:
        straight = _turned(x, -self.twist * torch.linalg.vector_norm(x, dim=1))
        angles = torch.arange(self.arms, dtype=x.dtype) * (2 * math.pi / self.arms)
        centre, deviations = x.new_tensor([[self.distance, 0.0]]), x.new_tensor([self.along, self.across])
        each = [_mixture(_turned(straight, -angle.expand(len(x))), centre, deviations) for angle in angles]
        return torch.stack(each).logsumexp(0) - math.log(self.arms)


DENSITIES: Mapping[str, Density] = MappingProxyType(
    {"ring": Ring(), "moons": Moons(), "checkerboard": Checkerboard(), "pinwheel": Pinwheel()}
)


@final
class PointsConfig(ArraysConfig):
    """Points of one of the laws of this file: new ones in every batch, and `held_out` that are always the same."""

    kind: ClassVar[str] = "points"

    density: Literal["ring", "moons", "checkerboard", "pinwheel"] = "ring"
    held_out: int = Field(default=4096, ge=1)

    def build(self) -> "Points":
        return Points(DENSITIES[self.density], self.held_out)


@final
class Points:
    """An endless data set of the points of `density`."""

    shape: tuple[int, ...] = (2,)
    context = 0

    def __init__(self, density: Density, held_out: int) -> None:
        self.density, self._held_out = density, held_out

    def train(self, batch: int, seed: int) -> "Stream":
        return Stream(self.density, batch, seed)

    def validation(self, batch: int) -> Iterator[Batch]:
        for numbers in torch.arange(self._held_out).split(batch):
            yield _drawn(self.density, numbers, 0, "validation")


@final
class Stream:
    """Batches of fresh points; batch n is a function of the seed and n."""

    def __init__(self, density: Density, batch: int, seed: int) -> None:
        self._density, self._batch, self._seed = density, batch, seed

    def batch(self, step: int) -> Batch:
        return _drawn(self._density, step * self._batch + torch.arange(self._batch), self._seed, "train")


def _drawn(density: Density, numbers: Tensor, seed: int, part: str) -> Batch:
    rng = CounterRng.seeded([seed]).split(part).fork(torch.zeros_like(numbers)).at(numbers)
    return rows_of(density.sample(rng).float(), None, numbers)


def _mixture(x: Tensor, centres: Tensor, deviations: Tensor, weights: Tensor | None = None) -> Tensor:
    """[N] log-density of the mixture of Gaussians around `centres` [K,2] with the `deviations` [2] along the axes."""
    far = torch.cdist(x / deviations, centres / deviations).square()
    logs = -0.5 * far - math.log(2 * math.pi) - deviations.log().sum()
    return (logs - math.log(len(centres)) if weights is None else logs + weights.log()).logsumexp(1)


def _moons(angle: Tensor) -> tuple[Tensor, Tensor]:
    """The points [N,2] of the upper and the lower half circle at `angle` [N] in [0, pi]."""
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    return upper, -upper


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """x [N,2] turned by `angle` [N]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], 1)
