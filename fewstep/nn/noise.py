"""What a language model is told about its input's corruption: an embedding of the share of noise. This file knows no model."""

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

_SLOWEST, _FASTEST = 0.25, 64.0  # turns as the share goes from 0 to 1


@final
class NoiseEmbedding(nn.Module):
    """Waves of the share of noise through one hidden layer; a clean token is told nothing. Cost: 2 D^2 a level.

    Source: Fourier features, Tancik et al. 2020, arXiv 2006.10739, at fixed frequencies.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * (width // 2), width)
        self.down = nn.Linear(width, width)

    def forward(self, noise: Tensor) -> Tensor:
        """`noise` [B,N] in [0, 1] -> [B,N,D]."""
        count = self.hidden.in_features // 2
        turns = torch.logspace(math.log2(_SLOWEST), math.log2(_FASTEST), count, base=2.0, device=noise.device, dtype=noise.dtype)
        angle = 2 * math.pi * noise.unsqueeze(-1) * turns
        told = self.down(silu(self.hidden(torch.cat([angle.cos(), angle.sin()], -1).to(self.hidden.weight))))
        return torch.where(noise.unsqueeze(-1) > 0, told, 0.0)
