"""What the Triton kernels share: views of tensors, tiles of them, sizes to choose from, how exactly products are taken.

Knows Triton and PyTorch. Does not know a kernel.
"""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, final

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # on a CPU, number by number: small tiles, and nothing to time


@final
class View(NamedTuple):
    """A tensor on the device and how far its rows, heads and tokens lie apart; the last dimension is dense."""

    at: Any
    batch: int
    head: int
    token: int


def configs(names: tuple[str, ...], *choices: tuple[int, ...], small: int = 16) -> list[triton.Config]:
    """What a kernel is timed with at its first call: a size for each of its names, then warps and the stages of its loops.

    `small`: every size in the interpreter.
    """
    if INTERPRETED:
        return [triton.Config(dict.fromkeys(names, small))]
    return [
        triton.Config(dict(zip(names, sizes, strict=True)), num_warps=warps, num_stages=stages)
        for *sizes, warps, stages in choices
    ]


def lanes(width: int) -> int:
    """The least power of two that holds `width` and that a matrix product takes."""
    return max(16, triton.next_power_of_2(width))


def precision(dtype: torch.dtype) -> str:
    """How products are taken: of float32 in tf32 as far as `torch.set_float32_matmul_precision` allows PyTorch's own, else in
    three products of it that lose nothing to speak of; a product in float32 itself has no tensor core and compiles for minutes.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def dense(x: Tensor) -> Tensor:
    """`x` with its last dimension dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on(x: Tensor) -> AbstractContextManager[None]:
    """Launches go to the device of `x`, not to the current one."""
    return torch.cuda.device_of(x)


@triton.jit
def load(x: tl.tuple, place: tl.tuple, tokens: tl.tensor, count: tl.tensor, lane: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """A tile of the view x at place (row, head), zeros from token `count` and lane WIDTH on."""
    at = x.at + place[0] * x.batch + place[1] * x.head + tokens[:, None] * x.token + lane[None, :]
    inside = (tokens < count)[:, None]
    if lane.shape[0] != WIDTH:
        inside &= (lane < WIDTH)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store(
    x: tl.tuple, place: tl.tuple, tokens: tl.tensor, count: tl.tensor, lane: tl.tensor, tile: tl.tensor, WIDTH: tl.constexpr
) -> None:
    """Writes a tile where `load` reads it."""
    at = x.at + place[0] * x.batch + place[1] * x.head + tokens[:, None] * x.token + lane[None, :]
    tl.store(at, tile.to(x.at.dtype.element_ty), mask=(tokens < count)[:, None] & (lane < WIDTH)[None, :])


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """Sums begin here: float32."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)
