"""Deterministic one-call solvers: DDIM's relatives, DPM-Solver++, DEIS. Each is a rule for the weights of a step.

With shrink = (sigma_s / alpha_s) / (sigma_t / alpha_t) = exp(-h), all of them are, for x / alpha, shrink x plus weights on the
denoised estimates that sum to 1 - shrink; they differ in how they foresee the estimate within the step.
"""

from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.processes import rates
from fewstep.diffusion.solvers.multistep import Rows, RuleConfig, choose
from fewstep.diffusion.solvers.nodes import Nodes, exponential, interpolation, legendre, moments


def first_order(nodes: Nodes) -> tuple[Tensor, Tensor]:
    """The weights of x and D if D stays what it is: exact, and finite wherever sigma_t > 0."""
    (alpha, sigma), (alpha_s, sigma_s) = nodes.starts, nodes.ends
    return sigma_s / sigma, alpha_s - alpha * sigma_s / sigma


@final
class EulerConfig(RuleConfig):
    """Euler on the process's own time: rectified flow's sampler on flow matching, EDM's on EDM, where both are DDIM."""

    kind: ClassVar[str] = "euler"
    source: ClassVar[str] = "Liu et al. 2023, arXiv 2209.03003, section 2.1; Karras et al. 2022, arXiv 2206.00364, section 3"
    order: ClassVar[int] = 1

    def rows(self, nodes: Nodes) -> Rows:
        (alpha, sigma), step = nodes.starts, nodes.t.diff(dim=-1)
        alpha_rate, sigma_rate = rates(nodes.process, nodes.t[..., :-1])
        return Rows(1 + step * sigma_rate / sigma, step * (alpha_rate - sigma_rate * alpha / sigma))


@final
class DPMSolverConfig(RuleConfig):
    """DPM-Solver++ 1M, 2M, 3M: the estimate foreseen along the log-SNR from the last `terms`.

    1M is DDIM. Differs: the second difference of 3M has the factor 2 that third order needs; `published` leaves it out, as the
    paper's and others' code does, for a solver of second order.
    """

    kind: ClassVar[str] = "dpm++"
    source: ClassVar[str] = "Lu et al. 2022, arXiv 2211.01095, algorithm 2; their code for three terms"
    claims: ClassVar[tuple[str, ...]] = ("solver-order",)

    terms: int = Field(default=2, ge=1, le=3)
    published: bool = False

    @property
    def order(self) -> int:
        return min(self.terms, 2) if self.published else self.terms

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.terms - 1

    def rows(self, nodes: Nodes) -> Rows:
        x, d = first_order(nodes)
        if self.terms == 1:
            return Rows(x, d)
        places, alpha, whole = nodes.past(self.depth), nodes.ends[0], 1 - nodes.shrink
        behind = -places[..., 0]
        two = torch.stack((whole * (1 + 0.5 / behind), -whole * 0.5 / behind), -1)
        weights = [whole.unsqueeze(-1), two]
        if self.terms == 3:
            three = self._published(nodes.h, places) if self.published else exponential(nodes.h, with_start(places))
            weights.append(three)
        chosen = alpha.unsqueeze(-1) * choose(nodes.known(self.depth), weights)
        return Rows(x, chosen[..., 0], chosen[..., 1:])

    def _published(self, h: Tensor, places: Tensor) -> Tensor:
        phi_1, phi_2, twice_phi_3 = moments(h, 3).unbind(-1)
        r_0, r_1 = -places[..., 0], places[..., 0] - places[..., 1]
        slope, bend = r_0 / (r_0 + r_1), 1 / (r_0 + r_1)
        near = phi_2 * (1 + slope) + twice_phi_3 / 2 * bend  # of the last difference, (D_0 - D_1) / r_0
        far = -(phi_2 * slope + twice_phi_3 / 2 * bend)  # of the one before it
        return torch.stack((phi_1 + near / r_0, far / r_1 - near / r_0, -far / r_1), -1)


@final
class DEISConfig(RuleConfig):
    """DEIS: eps foreseen by the polynomial through its last `terms` values along a clock, integrated over sigma / alpha.

    `clock`: the log of sigma / alpha (what common code does), sigma / alpha itself (rho-AB) or the process's time (t-AB).
    Cost: two calls of the process's `time` when the table is made. Differs: integrals to rounding, in float64.
    """

    kind: ClassVar[str] = "deis"
    source: ClassVar[str] = "Zhang and Chen 2023, arXiv 2204.13902, proposition 3 and section 3.3"
    claims: ClassVar[tuple[str, ...]] = ("solver-order",)

    terms: int = Field(default=3, ge=1, le=3)
    clock: Literal["log-ratio", "ratio", "t"] = "log-ratio"

    @property
    def order(self) -> int:
        return self.terms

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.terms - 1

    def rows(self, nodes: Nodes) -> Rows:
        alpha, sigma = nodes.starts
        x, d = first_order(nodes)
        if self.terms == 1:
            return Rows(x, d)
        places, powers, scale = self._integrals(nodes)
        orders = [interpolation(places[..., :count], powers[..., :count]) for count in range(1, self.terms + 1)]
        past = scale.unsqueeze(-1) * choose(nodes.known(self.depth), orders)[..., 1:]
        moved = past.sum(-1)
        return Rows(x - moved / sigma, d + moved * alpha / sigma, past, left=(1 / sigma, -alpha / sigma))

    def _integrals(self, nodes: Nodes) -> tuple[Tensor, Tensor, Tensor]:
        """Where eps is known on the clock (0 a step's start, 1 its end), the clock's powers averaged over the step, their scale.

        A step is integrated over u = lambda / h, on which sigma / alpha falls as exp(-h u).
        """
        spots, weights = legendre(24, nodes.h)
        inside = torch.cat((spots, spots.new_tensor([0.0, 1.0])))
        u = torch.cat((nodes.past(self.depth), inside.expand(*nodes.h.shape, -1)), -1)
        clock = self._clock(nodes, u)
        start, end = clock[..., -2:-1], clock[..., -1:]
        clock = (clock - start) / (end - start)
        places = torch.cat((torch.zeros_like(start), clock[..., : self.depth]), -1)
        mass = nodes.h.unsqueeze(-1) * torch.exp(-nodes.h.unsqueeze(-1) * spots) * weights
        at = clock[..., self.depth : -2]
        powers = torch.stack([(mass * at**k).sum(-1) for k in range(self.terms)], -1)
        return places, powers, torch.where(nodes.smooth, -nodes.ends[0] * torch.exp(-nodes.log_snr[..., :-1]), 0.0)

    def _clock(self, nodes: Nodes, u: Tensor) -> Tensor:
        if self.clock == "log-ratio":
            return u
        start = torch.where(nodes.smooth, nodes.log_snr[..., :-1], 0.0)  # where it is not, any ratio near 1
        log_ratio = -(start.unsqueeze(-1) + nodes.h.unsqueeze(-1) * u)
        if self.clock == "ratio":
            return torch.exp(log_ratio - log_ratio[..., -2:-1])
        return nodes.process.time(torch.exp(log_ratio))


def with_start(places: Tensor) -> Tensor:
    """The places of a step's estimates: its own start, 0, and those behind."""
    return torch.cat((torch.zeros_like(places[..., :1]), places), -1)
