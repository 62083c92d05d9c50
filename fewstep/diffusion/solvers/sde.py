"""Stochastic one-call solvers: DDIM with noise, Euler-Maruyama, SDE-DPM-Solver++. Each is a rule for the weights of a step.

No noise is added in a step that ends at sigma = 0: it ends at the denoised estimate.
"""

from typing import ClassVar, final

import torch
from pydantic import Field

from fewstep.diffusion.processes import rates
from fewstep.diffusion.solvers.multistep import Rows, RuleConfig, choose
from fewstep.diffusion.solvers.nodes import Nodes


@final
class DDIMConfig(RuleConfig):
    """DDIM: deterministic for `eta` 0, the ancestral sampler of posterior variance for 1."""

    kind: ClassVar[str] = "ddim"
    source: ClassVar[str] = "Song et al. 2021, arXiv 2010.02502, equations 12 and 16"
    claims: ClassVar[tuple[str, ...]] = ("ddim",)
    order: ClassVar[int] = 1

    eta: float = Field(default=0.0, ge=0, le=1)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    def rows(self, nodes: Nodes) -> Rows:
        (alpha, sigma), (alpha_s, sigma_s) = nodes.starts, nodes.ends
        fresh = (1 - nodes.shrink) * (1 + nodes.shrink)
        down = torch.sqrt(1 - self.eta**2 * fresh) * sigma_s / sigma
        return Rows(down, alpha_s - down * alpha, noise=self.eta * sigma_s * torch.sqrt(fresh) if self.eta > 0 else None)


@final
class EulerMaruyamaConfig(RuleConfig):
    """Euler-Maruyama on the reverse SDE, in the process's own time. Weak order 1; needs alpha > 0 at the first time."""

    kind: ClassVar[str] = "euler-maruyama"
    source: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456, equation 6 and appendix D"
    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def rows(self, nodes: Nodes) -> Rows:
        (alpha, sigma), step = nodes.starts, nodes.t.diff(dim=-1)
        require_data(nodes, self.kind)
        alpha_rate, sigma_rate = rates(nodes.process, nodes.t[..., :-1])
        drift = alpha_rate / alpha
        spread = 2 * (sigma_rate / sigma - drift)  # g^2 / sigma^2
        x, d, noise = 1 + step * (drift + spread), -step * spread * alpha, sigma * torch.sqrt(-step * spread)
        return ending_denoised(nodes, Rows(x, d, noise=noise))


@final
class SDEDPMSolverConfig(RuleConfig):
    """SDE-DPM-Solver++ 1M and 2M: the reverse SDE with the estimate foreseen along the log-SNR from the last `terms`."""

    kind: ClassVar[str] = "sde-dpm++"
    source: ClassVar[str] = "Lu et al. 2022, arXiv 2211.01095, section 5.3; the midpoint form of their code"
    stochastic: ClassVar[bool] = True
    order: ClassVar[int] = 1

    terms: int = Field(default=2, ge=1, le=2)

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.terms - 1

    def rows(self, nodes: Nodes) -> Rows:
        sigma, (alpha_s, sigma_s) = nodes.starts[1], nodes.ends
        fresh = (1 - nodes.shrink) * (1 + nodes.shrink)
        x, noise = nodes.shrink * sigma_s / sigma, sigma_s * torch.sqrt(fresh)
        if self.terms == 1:
            return Rows(x, alpha_s * fresh, noise=noise)
        slope = -0.5 / nodes.past(1)
        weights = choose(nodes.known(1), [torch.ones_like(slope), torch.cat((1 + slope, -slope), -1)])
        weights = (alpha_s * fresh).unsqueeze(-1) * weights
        return Rows(x, weights[..., 0], weights[..., 1:], noise)


def require_data(nodes: Nodes, solver: str) -> None:
    """Raises ValueError where a step starts from noise alone, for solvers that divide by alpha."""
    if not bool((nodes.starts[0] > 0).all()):
        raise ValueError(f"solver={solver!r}: alpha is 0 at the grid's first time; begin a little later, or choose 'ddim'")


def ending_denoised(nodes: Nodes, rows: Rows) -> Rows:
    """The same, but steps that end at sigma = 0 end at the denoised estimate."""
    alpha, sigma = nodes.ends
    clean = sigma == 0
    x, d = torch.where(clean, 0.0, rows.x), torch.where(clean, alpha, rows.d)
    return rows._replace(x=x, d=d, noise=None if rows.noise is None else torch.where(clean, 0.0, rows.noise))
