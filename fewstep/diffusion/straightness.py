"""How straight the paths are that lead from noise to data. This file knows no network and no solver."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.process import Process


def straightness(process: Process, grid: Tensor, path: Sequence[Tensor]) -> Tensor:
    """[B]: the integral of |whole - v|^2 over a path, v its velocity and `whole` their mean; 0 for a straight one at even speed.

    `path`: x [B, ...] at the K+1 places of `grid`, from noise to data. Measured on flow matching's clock, whatever the process,
    between the grid's ends as if they were 0 and 1; v is constant within a step. Raises ValueError for a path of another length.
    Source: Liu et al. 2023, arXiv 2209.03003, equation 3.
    """
    if len(path) != len(grid):
        raise ValueError(f"path: {len(path)} places, the grid has {len(grid)}; give x at each of them")
    size = process.alpha(grid) + process.sigma(grid)
    t = process.sigma(grid) / size
    places = torch.stack([x.flatten(1).double() / along for x, along in zip(path, size, strict=True)])
    lengths = (t[:-1] - t[1:]) / (t[0] - t[-1])
    velocity = (places[:-1] - places[1:]) / lengths.view(-1, 1, 1)
    return (lengths.view(-1, 1) * (velocity - (places[0] - places[-1])).square().sum(2)).sum(0)
