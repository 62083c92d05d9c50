"""UniPC: each step foresees x from past estimates, and the estimate made there corrects it before the next step."""

from typing import ClassVar, Literal, NamedTuple, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from fewstep.core.process import Denoise, Process, Solver
from fewstep.core.random import Rng
from fewstep.core.recipe import Config
from fewstep.diffusion.solvers.multistep import choose, mean, trimmed
from fewstep.diffusion.solvers.nodes import Nodes, exponential
from fewstep.diffusion.solvers.ode import first_order, with_start


class UniPCMemory(NamedTuple):
    """The weights of each step, [2,m] or [B,2,m], the times, and (corrected x, estimates), the latest first."""

    table: tuple[Tensor, ...]
    times: tuple[Tensor, ...]
    history: tuple[Tensor, ...]


@final
class UniPC:
    """The predictor and corrector as a pair of weighted sums. Cost: one call a step, one product with `terms` + 2 arrays.

    What `step` returns is foreseen; the corrected x of the same place lies in the memory and serves the next step.
    """

    calls = 1
    stochastic = False

    def __init__(self, terms: int, variant: Literal["bh1", "bh2"]) -> None:
        self.order = terms + 1
        self._terms, self._variant = terms, variant

    def init(self, x: Tensor, process: Process, grid: Tensor) -> UniPCMemory:
        nodes = Nodes.of(x, process, grid, "unipc")
        a, foreseen, corrected = self._weights(nodes)
        # columns: the corrected x of the place before, D here, D of the places behind
        carry = torch.cat((torch.ones_like(a[..., :1]), a[..., :-1]), -1)
        here = torch.cat((carry.unsqueeze(-1), pad(corrected, (0, 0, 1, 0))[..., :-1, :]), -1)
        there = a.unsqueeze(-1) * here
        there[..., 1:-1] += foreseen
        table = torch.stack((here, there), -2).to(x).unbind(-3)
        return UniPCMemory(trimmed(table, 2, self._terms), nodes.times(len(x)), (x,))

    def step(self, denoise: Denoise, x: Tensor, i: int, memory: UniPCMemory, rng: Rng) -> tuple[Tensor, UniPCMemory]:
        d = mean(denoise(x, memory.times[i]))
        base, *past = memory.history
        corrected, following = weigh_both(memory.table[i], (base, d, *past))
        return following, UniPCMemory(memory.table, memory.times, (corrected, d, *past)[: self._terms + 1])

    def _weights(self, nodes: Nodes) -> tuple[Tensor, Tensor, Tensor]:
        """Of each step: that of x, [.., K, terms] of the predictor, [.., K, terms + 1] of the corrector, newest first."""
        places, known = nodes.past(max(self._terms - 1, 1)), nodes.known(self._terms - 1)
        whole = 1 - nodes.shrink
        half = 0.5 * (nodes.h if self._variant == "bh1" else whole)
        slope = half / places[..., 0]
        foresee = [whole.unsqueeze(-1), torch.stack((whole - slope, slope), -1)]
        correct = [torch.stack((half, whole - half), -1)]
        for count in range(2, self._terms + 1):
            behind = with_start(places[..., : count - 1])
            foresee += [exponential(nodes.h, behind)] if count > 2 else []
            correct.append(exponential(nodes.h, torch.cat((torch.ones_like(behind[..., :1]), behind), -1)))
        alpha = nodes.ends[0].unsqueeze(-1)
        ahead, after = (alpha * choose(known, weights) for weights in (foresee[: self._terms], correct))
        kept = pad(ahead, (1, 0))  # a step over infinity is not corrected
        return first_order(nodes)[0], ahead, torch.where(nodes.smooth.unsqueeze(-1), after, kept)


def weigh_both(weights: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Two sums of `parts` [B, ...] with `weights` [2,m] or [B,2,m]."""
    shape = parts[0].shape
    if weights.dim() == 2:
        return torch.mm(weights, torch.stack(parts).view(len(parts), -1)).view(2, *shape).unbind(0)
    return torch.bmm(weights, torch.stack(parts, 1).flatten(2)).view(shape[0], 2, *shape[1:]).unbind(1)


@final
class UniPCConfig(Config):
    """UniPC of `terms` estimates, of order `terms` + 1 where two or more; `variant`: B(h) = h (bh1) or exp(h) - 1 (bh2)."""

    kind: ClassVar[str] = "unipc"
    source: ClassVar[str] = "Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2"
    claims: ClassVar[tuple[str, ...]] = ("solver-order",)

    terms: int = Field(default=2, ge=1, le=3)
    variant: Literal["bh1", "bh2"] = "bh2"

    def build(self) -> Solver[UniPCMemory]:
        """The solver."""
        return UniPC(self.terms, self.variant)
