"""UniPC: each step foresees x from past estimates, and the estimate made there corrects it before the next step.

The correction is a sum of the estimates too, so that both are one weighted sum: of x as it was foreseen and the estimates.
"""

from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from fewstep.diffusion.solvers.multistep import Rows, RuleConfig, choose
from fewstep.diffusion.solvers.nodes import Nodes, exponential
from fewstep.diffusion.solvers.ode import first_order, with_start


@final
class UniPCConfig(RuleConfig):
    """UniPC of `terms` estimates, of order `terms` + 1 where two or more; `variant`: B(h) = h (bh1) or exp(h) - 1 (bh2).

    What a step gives is foreseen, and corrected at the start of the next.
    """

    kind: ClassVar[str] = "unipc"
    source: ClassVar[str] = "Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2"
    claims: ClassVar[tuple[str, ...]] = ("solver-order",)

    terms: int = Field(default=2, ge=1, le=3)
    variant: Literal["bh1", "bh2"] = "bh2"

    @property
    def order(self) -> int:
        return self.terms + 1

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.terms

    def rows(self, nodes: Nodes) -> Rows:
        foreseen, corrected = self._weights(nodes)
        change = corrected - pad(foreseen, (1, 0))  # by the step before, in terms of the estimate here and those behind
        change = pad(change, (0, 0, 1, 0))[..., :-1, :]
        x, _ = first_order(nodes)
        weights = x.unsqueeze(-1) * change + pad(foreseen, (0, 1))
        return Rows(x, weights[..., 0], weights[..., 1:])

    def _weights(self, nodes: Nodes) -> tuple[Tensor, Tensor]:
        """Of each step: [.., K, terms] of the predictor, [.., K, terms + 1] of the corrector, newest first."""
        places, known = nodes.past(max(self.terms - 1, 1)), nodes.known(self.terms - 1)
        whole = 1 - nodes.shrink
        half = 0.5 * (nodes.h if self.variant == "bh1" else whole)
        slope = half / places[..., 0]
        foresee = [whole.unsqueeze(-1), torch.stack((whole - slope, slope), -1)]
        correct = [torch.stack((half, whole - half), -1)]
        for count in range(2, self.terms + 1):
            behind = with_start(places[..., : count - 1])
            foresee += [exponential(nodes.h, behind)] if count > 2 else []
            correct.append(exponential(nodes.h, torch.cat((torch.ones_like(behind[..., :1]), behind), -1)))
        alpha = nodes.ends[0].unsqueeze(-1)
        ahead, after = (alpha * choose(known, weights) for weights in (foresee[: self.terms], correct))
        kept = pad(ahead, (1, 0))  # a step over infinity is not corrected
        return ahead, torch.where(nodes.smooth.unsqueeze(-1), after, kept)
