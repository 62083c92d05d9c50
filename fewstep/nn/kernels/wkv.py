"""RWKV-4's weighted mean over chains, with gradients, over token trees and over chains with gaps, with a PyTorch twin.

Knows tensors and the twin. Does not know mixers nor how the inputs come about.
"""

import ctypes
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewstep.nn.kernels.kernel import Kernel, default_kernel

Sums = tuple[Tensor, Tensor, Tensor]  # [B,D] each: the sums with and without values over their largest term; its logarithm

STEPS = 32  # as in wkv.c: tokens between kept states
BLOCK = 16  # tokens that the twin weighs against one another
NOTHING = -1e30  # the logarithm of an empty sum, finite so that differences of two are


@final
class _Wkv(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("batch", "length", "width")),
        *((name, ctypes.c_void_p) for name in ("k", "v", "fading", "bonus", "above", "below", "most", "begins")),
        *((name, ctypes.c_void_p) for name in ("y", "last_above", "last_below", "last_most", "kept")),
        *((name, ctypes.c_void_p) for name in ("dy", "dlast_above", "dlast_below")),
        *((name, ctypes.c_void_p) for name in ("dk", "dv", "dfading", "dbonus", "dabove", "dbelow")),
    ]


def wkv_empty(batch: int, width: int, like: Tensor) -> Sums:
    """The sums before the first token, of the dtype and on the device of `like`."""
    none = like.new_zeros(batch, width)
    return none, none, torch.full_like(none, NOTHING)


def wkv_fresh(sums: Sums, rows: Tensor) -> Sums:
    """The same with nothing in these `rows` (bool [B,1])."""
    above, below, most = sums
    return torch.where(rows, 0, above), torch.where(rows, 0, below), torch.where(rows, NOTHING, most)


def wkv(k: Tensor, v: Tensor, fading: Tensor, bonus: Tensor, start: Sums, begins: Tensor | None = None) -> tuple[Tensor, Sums]:
    """y_t = (A_t + e^{u + k_t} v_t) / (B_t + e^{u + k_t}), A_t = sum_{i<t} e^{k_i - (t-1-i) w} v_i and B_t the same without v.

    Float32 on the CPU is the kernel's, forward and backward; the twin takes anything else, block after block.

    Args:
        k, v: [B,T,D], T >= 1.
        fading, bonus: [D], w at least 0 and u.
        start: A and B before the first token, over e^m, and m. No gradient passes through an m: it says how A and B are written.
        begins: bool [B,T], tokens that know none before them (packed sequences); None: there is no such token.

    Returns: y [B,T,D], and `start` for the tokens behind the last.

    Raises: ValueError for shapes, dtypes or devices that do not fit.

    Cost: two exponentials and about twenty operations for each of B T D elements (backward: twice that); memory for backward is a
        tenth of an activation. Source: Peng et al. 2023, arXiv 2305.13048, appendix D.
    """
    _check(k, v, fading, bonus, *start)
    kernel = default_kernel() if k.is_cpu and k.dtype == torch.float32 else None
    if kernel is None:
        return wkv_blocks(k, v, fading, bonus, start, begins)
    marks = None if begins is None else begins.contiguous().view(torch.uint8)
    tensors = tuple(x.contiguous() for x in (k, v, fading, bonus, *start))
    y, above, below, most = _Means.apply(kernel, marks, *tensors)
    return y, (above, below, most)


@final
class _Means(torch.autograd.Function):
    """The kernel under autograd: forward keeps the sums before each block of tokens, backward runs the blocks again."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, marks: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        k, _, _, _, *start = tensors
        batch, count, width = k.shape
        kept = k.new_empty(batch, -(-count // STEPS), 3, width) if any(ctx.needs_input_grad) else None
        y, last = torch.empty_like(k), tuple(torch.empty_like(x) for x in start)
        _call(kernel, k, (*tensors, marks, y, *last, kept))
        ctx.kernel, ctx.marks = kernel, marks
        ctx.save_for_backward(*tensors, kept)
        ctx.mark_non_differentiable(last[2])
        return y, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dabove: Tensor, dbelow: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        k, start = tensors[0], tensors[4]
        dk, dv, *others = (torch.empty_like(x) for x in (k, k, start, start, start, start))
        given = (x.contiguous() for x in (dy, dabove, dbelow))
        _call(ctx.kernel, k, (*tensors, ctx.marks, None, None, None, None, kept, *given, dk, dv, *others))
        dfading, dbonus, *dstart = others
        return None, None, dk, dv, dfading.sum(0), dbonus.sum(0), *dstart, None


def _call(kernel: Kernel, k: Tensor, arrays: tuple[Tensor | None, ...]) -> None:
    kernel.wkv4(ctypes.byref(_Wkv(*k.shape, *(None if x is None else x.data_ptr() for x in arrays))), torch.get_num_threads())


def wkv_blocks(k: Tensor, v: Tensor, fading: Tensor, bonus: Tensor, start: Sums, begins: Tensor | None) -> tuple[Tensor, Sums]:
    """The twin."""
    outputs = []
    for first in range(0, k.shape[1], BLOCK):
        k_b, v_b = k[:, first : first + BLOCK], v[:, first : first + BLOCK]
        order = torch.arange(k_b.shape[1], device=k.device)
        number = torch.zeros_like(k_b[..., 0]) if begins is None else begins[:, first : first + BLOCK].cumsum(1)
        sees = (order <= order[:, None]) & (number.unsqueeze(2) == number.unsqueeze(1))
        outputs.append(wkv_tree(k_b, v_b, fading, bonus, start, sees, number > 0))
        start = wkv_fresh(start, number[:, -1:] > 0)
        start = wkv_after(k_b, v_b, fading, start, number == number[:, -1:])
    return torch.cat(outputs, 1), start


def wkv_tree(k: Tensor, v: Tensor, fading: Tensor, bonus: Tensor, start: Sums, sees: Tensor, fresh: Tensor) -> Tensor:
    """What the tokens of a tree make of it: y [B,T,D] of `wkv` along each token's own path.

    Args:
        k, v, fading, bonus, start: as there.
        sees: bool [B,T,T], the token itself and those before it on its path.
        fresh: bool [B,T], tokens whose path begins with nothing, not with `start`.

    Cost: T exponentials for each of B T D elements, and as much memory.
    """
    above, below, most = (x.unsqueeze(1) for x in start)
    own = torch.eye(k.shape[1], dtype=torch.bool, device=k.device)
    strict = sees & ~own
    depth = strict.sum(-1)
    between = (depth.unsqueeze(2) - depth.unsqueeze(1) - 1).unsqueeze(-1)
    logs = (k.unsqueeze(1) - between * fading).masked_fill(~strict.unsqueeze(-1), -torch.inf)
    logs = torch.where(own.unsqueeze(-1), (bonus + k).unsqueeze(1), logs)
    carried = (most - depth.unsqueeze(-1) * fading).masked_fill(fresh.unsqueeze(-1), NOTHING)
    top = torch.maximum(logs.amax(2), carried).detach()  # cancels, so no gradient is lost
    weights, carried = (logs - top.unsqueeze(2)).exp(), (carried - top).exp()
    return ((weights * v.unsqueeze(1)).sum(2) + carried * above) / (weights.sum(2) + carried * below)


def wkv_after(k: Tensor, v: Tensor, fading: Tensor, start: Sums, real: Tensor) -> Sums:
    """The sums after a chain of tokens, of which only the `real` [B,T] are there. Cost: an exponential for each element."""
    above, below, most = start
    behind = real.sum(1, keepdim=True) - real.cumsum(1)
    logs = (k - behind.unsqueeze(-1) * fading).masked_fill(~real.unsqueeze(-1), -torch.inf)
    carried = most - real.sum(1, keepdim=True) * fading
    top = torch.maximum(logs.amax(1), carried).detach()
    weights, carried = (logs - top.unsqueeze(1)).exp(), (carried - top).exp()
    return (weights * v).sum(1) + carried * above, weights.sum(1) + carried * below, top


def _check(k: Tensor, v: Tensor, fading: Tensor, bonus: Tensor, *start: Tensor) -> None:
    batch, count, width = k.shape
    fits = v.shape == k.shape and count > 0 and fading.shape == bonus.shape == (width,)
    if not fits or any(x.shape != (batch, width) for x in start):
        shapes = ", ".join(str(tuple(x.shape)) for x in (k, v, fading, bonus, *start))
        raise ValueError(f"k, v, fading, bonus, start have shapes {shapes}: expected [B,T,D] twice, [D] twice, [B,D] three times")
    if any(x.dtype != k.dtype or x.device != k.device for x in (v, fading, bonus, *start)):
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (k, v, fading, bonus, *start))
        raise ValueError(f"k, v, fading, bonus, start are {kinds}: expected one dtype and device; convert them")
