"""Normalizing flows: an invertible map with a tractable log-determinant. Contract only."""

from typing import Protocol

from torch import Tensor

from fewstep.core.random import Rng


class Bijection(Protocol):
    """z is flat [B,d] in latent order (multi-scale pieces concatenated); log|det| is [B]."""

    def forward(self, x: Tensor, c: Tensor | None, rng: Rng | None = None) -> tuple[Tensor, Tensor]: ...

    def inverse(self, z: Tensor, c: Tensor | None, rng: Rng | None = None) -> tuple[Tensor, Tensor]: ...
