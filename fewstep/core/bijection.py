"""Normalizing flows: an invertible map with a tractable log-determinant. Contract only."""

from typing import Protocol

from torch import Tensor

from fewstep.core.random import Rng


class Bijection(Protocol):
    """An invertible map of rows x [B,d] to z [B,d], given c [B,context]; what is conditional on nothing ignores c.

    Rows are flat, images too: whoever needs their shape was built with it. Then a mask, a permutation, a squeeze and the latent
    order of a multi-scale flow are all sets of indices, and maps compose without knowing one another. Each direction gives
    log|det| [B] of its own Jacobian, in nats; no row depends on another. `rng` serves estimators alone.
    """

    size: int  # d
    context: int  # width of c; 0: unconditional

    def forward(self, x: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        """Data to latents: z and log|dz/dx|."""
        ...

    def inverse(self, z: Tensor, c: Tensor | None = None, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        """Latents to data: x and log|dx/dz|."""
        ...
