"""Multistep sampling of consistency models: the estimate, noised anew to the next place of the grid."""

from typing import ClassVar, final

import torch
from pydantic import Field

from fewstep.diffusion.solvers.multistep import Rows, RuleConfig
from fewstep.diffusion.solvers.nodes import Nodes


@final
class ConsistencySamplerConfig(RuleConfig):
    """A step forgets x and noises the estimate of the data, which has noise of `sigma_min` already, to the step's end.

    For denoisers whose estimate lies at the end of the ODE's path; of others only the first step means anything, so that no
    `order` of convergence is stated.
    """

    kind: ClassVar[str] = "consistency"
    source: ClassVar[str] = "Song et al. 2023, arXiv 2303.01469, algorithm 1"
    claims: ClassVar[tuple[str, ...]] = ("few-step-digits",)
    order: ClassVar[int] = 0
    stochastic: ClassVar[bool] = True

    sigma_min: float = Field(default=0.002, ge=0)

    def rows(self, nodes: Nodes) -> Rows:
        alpha, sigma = nodes.ends
        noise = torch.sqrt((sigma**2 - (alpha * self.sigma_min) ** 2).clamp(min=0))
        return Rows(torch.zeros_like(alpha), alpha, noise=noise)
