"""Solvers whose steps are one weighted sum: of x, the denoised estimate, those of earlier steps, and noise.

Such a solver is a rule that turns a grid into weights, made once; a step is one call of the denoiser and one weighted sum. This
file knows the rules' contract and no rule.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewstep.core.process import Denoise, Denoised, Process, Solver
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.diffusion.solvers.nodes import Nodes


class Rows(NamedTuple):
    """Weights of every step: `x`, `d` (the estimate at its start) and `noise` (None: none) are [K] or [B,K].

    `past` [.., K, m]: of what earlier steps left, the latest first. `left` (None: the estimate itself): the weights of x and d
    in what this step leaves.
    """

    x: Tensor
    d: Tensor
    past: Tensor | None = None
    noise: Tensor | None = None
    left: tuple[Tensor, Tensor] | None = None


Weights = Tensor | tuple[Tensor, tuple[float, ...]]  # of one step: [1,m], each row's [B,1,m], or the first and the others


class Course(NamedTuple):
    """What a run goes by: the weights of each step (the table), those of what it leaves, the times of each place."""

    table: tuple[Weights, ...]
    left: tuple[Weights, ...] | None
    times: tuple[Tensor, ...]


Memory = tuple[Course, tuple[Tensor, ...]]  # and what the last steps left, the latest first


class Rule(Protocol):
    """What a multistep solver needs to be told; `depth`: how many earlier steps it looks back at."""

    @property
    def order(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def stochastic(self) -> bool: ...

    def nodes(self, x: Tensor, process: Process, grid: Tensor) -> Nodes: ...

    def rows(self, nodes: Nodes) -> Rows: ...


@final
class Multistep:
    """The solver of a rule. Cost: one call a step, and the sum of 2 to 5 arrays like x."""

    calls = 1

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.order = rule.order
        self.stochastic = rule.stochastic
        self._depth = rule.depth

    def init(self, x: Tensor, process: Process, grid: Tensor) -> Memory:
        nodes = self._rule.nodes(x, process, grid)
        rows = self._rule.rows(nodes)
        columns = [rows.x, rows.d, *(() if rows.noise is None else (rows.noise,))]
        columns += [] if rows.past is None else rows.past.unbind(-1)
        left = None if rows.left is None else numbers(table(rows.left, x))
        parts = len(columns) - (0 if rows.past is None else rows.past.shape[-1])
        return Course(numbers(trimmed(table(columns, x), parts, self._depth)), left, nodes.times(len(x))), ()

    def step(self, denoise: Denoise, x: Tensor, i: int, memory: Memory, rng: Rng) -> tuple[Tensor, Memory]:
        course, history = memory
        weights, left, times = course
        d = mean(denoise(x, times[i]))
        following = weigh(weights[i], (x, d, gaussian(x, rng), *history) if self.stochastic else (x, d, *history))
        if not self._depth:
            return following, memory
        kept = d if left is None else weigh(left[i], (x, d))
        return following, (course, (kept, *history)[: self._depth])


class RuleConfig(Config):
    """A rule by name."""

    stochastic: ClassVar[bool] = False
    depth: ClassVar[int] = 0

    @abstractmethod
    def rows(self, nodes: Nodes) -> Rows:
        """The weights of every step of a grid."""
        ...

    def nodes(self, x: Tensor, process: Process, grid: Tensor) -> Nodes:
        return Nodes.of(x, process, grid, self.kind, self.stochastic)

    def build(self) -> Solver[Memory]:
        """The solver."""
        return Multistep(self)  # type: ignore[arg-type]


def table(columns: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Weights by step, [1,m] or [B,1,m] in the dtype and on the device of x, from columns [K] or [B,K]."""
    return torch.stack(list(columns), -1).to(x).unsqueeze(-2).unbind(-3)


def trimmed(weights: Sequence[Tensor], parts: int, depth: int) -> tuple[Tensor, ...]:
    """The same without the weights of what is not there yet: step i sees `parts` arrays and what min(i, depth) steps left."""
    return tuple(row[..., : parts + min(i, depth)].contiguous() for i, row in enumerate(weights))


def numbers(weights: Sequence[Tensor]) -> tuple[Weights, ...]:
    """The same as numbers, which cost less to multiply by, if all rows share them and no gradient is asked for."""
    if weights[0].dim() > 2 or weights[0].requires_grad:
        return tuple(weights)
    shared = [row.cpu().squeeze(0) for row in weights]
    return tuple((row[0], tuple(row[1:].tolist())) for row in shared)


def weigh(weights: Weights, parts: tuple[Tensor, ...]) -> Tensor:
    """The sum of `parts` [B, ...] with `weights`."""
    if isinstance(weights, tuple):
        first, others = weights
        total = parts[0] * first
        for n, weight in enumerate(others, 1):
            total.add_(parts[n], alpha=weight)
        return total
    shape = parts[0].shape
    if weights.dim() == 2:
        return torch.mm(weights, torch.stack(parts).view(len(parts), -1)).view(shape)
    return torch.bmm(weights, torch.stack(parts, 1).flatten(2)).view(shape)


def choose(known: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """[.., K, m]: of the weights for 1, 2, ... known estimates those for `known` [.., K], with zeros for the others."""
    width = weights[-1].shape[-1]
    padded = torch.stack([pad(w, (0, width - w.shape[-1])) for w in weights], -2)
    return padded.take_along_dim((known - 1)[..., None, None], -2).squeeze(-2)


def mean(estimate: Tensor | Denoised) -> Tensor:
    """E[x_0 | x_t] of what a denoiser returned."""
    return estimate.mean if isinstance(estimate, Denoised) else estimate


def gaussian(x: Tensor, rng: Rng) -> Tensor:
    """Standard Gaussian noise like x, each row's own."""
    return rng.normal(*x.shape[1:]).to(x)
