"""A short causal convolution, channel by channel, along a token's path. This file knows no mixer."""

from typing import final

import torch
from torch import Tensor, nn


@final
class ShortConv(nn.Module):
    """y_t[c] = bias[c] + sum_r weight[r,c] x_{t-R+r}[c], the token itself last; R + 1 = `size` taps.

    Cost: `size` multiply-adds a channel. Differs: nothing is known of a layout in memory; the taps [size,C] are those of
    `nn.Conv1d(C, C, size, groups=C)` with its weight [C,1,size] transposed.
    """

    def __init__(self, channels: int, size: int, bias: bool) -> None:
        super().__init__()
        bound = size**-0.5  # as nn.Conv1d draws them
        self.weight = nn.Parameter(torch.empty(size, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x [B,T,C] and what stood at the R tokens before each, [B,T,R,C] with the nearest last."""
        y = x * self.weight[-1]
        for past, weight in zip(before.unbind(2), self.weight[:-1], strict=True):
            y = torch.addcmul(y, past, weight)
        return y if self.bias is None else y + self.bias
