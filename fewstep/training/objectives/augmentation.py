"""Images transformed at random, and the numbers that tell how, so that nothing of it leaks into samples.

This file knows no network and no loss.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fewstep.core.random import Rng

_STRETCH, _SHIFT = 0.2, 0.125  # deviations: of log2 of a scale, and of a shift as a share of the side


def augment(x: Tensor, share: float, rng: Rng) -> tuple[Tensor, Tensor]:
    """Images `x` [B,C,H,W] transformed, and [B,9] what was done: zeros where nothing was.

    With probability `share` each: mirrored from left to right; upside down; scaled; turned; stretched in one direction; shifted.
    The numbers are two flips, log2 of the scale, cos - 1 and sin of the turn, log2 of the stretch along two axes, two shifts.
    Source: Karras et al. 2022, arXiv 2206.00364, appendix F.2 and table 6. Differs: bilinear sampling without wavelets; borders
    are mirrored; the stretch leaves the other axis alone, and the numbers determine the transformation. Cost: one bilinear
    sampling. Raises ValueError for arrays that are no images.
    """
    if x.dim() != 4:
        raise ValueError(f"objective.augmented: rows of shape {tuple(x.shape[1:])} are no images; set it to 0")
    told = _drawn(share, rng).to(x)
    theta = torch.cat((_matrix(told[:, :7], x.shape[3] / x.shape[2]), 2 * told[:, 7:].unsqueeze(2)), 2)
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    moved = grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return torch.where((told != 0).any(1)[:, None, None, None], moved, x), told


def _drawn(share: float, rng: Rng) -> Tensor:
    """[B,9] float64."""
    done = (rng.split("whether").uniform(6) < share).double()
    flips, scale, turned, stretched, shifted = done.split([2, 1, 1, 1, 1], 1)
    sizes, (turn, direction) = rng.split("size").normal(4), (2 * math.pi * rng.split("angle").uniform(2)).split(1, 1)
    turn = turn * turned
    stretch = _STRETCH * sizes[:, 1:2] * stretched
    parts = (_STRETCH * sizes[:, :1] * scale, turn.cos() - 1, turn.sin(), stretch * direction.cos(), stretch * direction.sin())
    return torch.cat((flips, *parts, _SHIFT * sizes[:, 2:] * shifted), 1)


def _matrix(told: Tensor, aspect: float) -> Tensor:
    """[B,2,2]: where a place of the new image was in the old one, of width over height `aspect`, in halves of its sides."""
    flips, size, cos, sin = 1 - 2 * told[:, :2], 2 ** -told[:, 2], 1 + told[:, 3], told[:, 4]
    turn = torch.stack((cos, -sin, sin, cos), 1).view(-1, 2, 2)
    strength = torch.linalg.vector_norm(told[:, 5:7], dim=1)
    along = told[:, 5:7] / strength.clamp(min=1e-12).unsqueeze(1)
    stretch = torch.eye(2).to(told) + (2**-strength - 1).view(-1, 1, 1) * along.unsqueeze(2) * along.unsqueeze(1)
    sides = told.new_tensor([[1.0, 1 / aspect], [aspect, 1.0]])
    return torch.diag_embed(flips) @ (size.view(-1, 1, 1) * (turn @ stretch)) * sides
