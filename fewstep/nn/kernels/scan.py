"""The selective scan of Mamba over chains, with gradients, and over token trees, with a PyTorch twin.

Knows tensors and the twin. Does not know mixers, states or how the inputs come about.
"""

import ctypes
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fewstep.nn import scan
from fewstep.nn.kernels.kernel import Kernel, default_kernel
from fewstep.nn.triton import fused

STEPS, SHARE = 32, 128  # as in scan.c: tokens between kept states; channels whose gradients of b and c are one sum


@final
class _Scan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("batch", "length", "width", "states")),
        *((name, ctypes.c_void_p) for name in ("u", "delta", "a", "b", "c", "start", "begins", "parent", "y", "last", "kept")),
        *((name, ctypes.c_void_p) for name in ("dy", "dlast", "du", "ddelta", "da", "db", "dc", "dstart")),
    ]


def selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, begins: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t a) h_{t-1} + delta_t u_t b_t and y_t = c_t h_t over chains of tokens.

    Float32 on the CPU is the kernel's, forward and backward; the twin takes anything else, block after block.

    Args:
        u, delta: [B,T,D], T >= 1; delta at least 0.
        a: [N,D], at most 0.
        b, c: [B,T,N].
        start: [B,N,D], the states before the first token.
        begins: bool [B,T], tokens that know none before them (packed sequences); None: there is no such token.

    Returns: y [B,T,D] and the states [B,N,D] after the last token.

    Raises: ValueError for shapes that do not fit.

    Cost: about ten operations for each of B T D N elements, one exponential of them (backward: 25 and one); memory for backward
        is a 32nd of the states, and one block of all of them. Source: Gu and Dao 2023, arXiv 2312.00752, algorithm 2.
    """
    _check(u, delta, a, b, c, start)
    if gpu := fused(u, delta, a, b, c, start):
        return gpu.selective_scan(u, delta, a, b, c, start, begins)
    kernel = _kernel(u)
    if kernel is None:
        return selective_blocks(u, delta, a, b, c, start, begins)
    tensors = tuple(x.contiguous() for x in (u, delta, a, b, c, start))
    marks = None if begins is None else begins.contiguous().view(torch.uint8)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _Selective.apply(kernel, marks, *tensors)
    return _forward(kernel, tensors, marks, None)


def selective_tree(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, parent: Tensor) -> Tensor:
    """What the tokens of a tree read: y [B,T,D] of `selective_scan` along each token's own path.

    Args:
        u, delta, a, b, c, start: as there.
        parent: int64 [B,T], an earlier token, -1: it follows `start`, -2: it follows nothing.

    Raises: ValueError for shapes that do not fit. Cost: as there; memory: the states of all tokens of 8 or 16 channels.
    """
    _check(u, delta, a, b, c, start)
    tensors = (u, delta, a, b, c, start)
    kernel = _kernel(u)
    if kernel is not None and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return _forward(kernel, tuple(x.contiguous() for x in tensors), None, parent.contiguous())[0]
    return _read(scan.tree(*_steps(u, delta, a, b), start, parent), c)


def _kernel(u: Tensor) -> Kernel | None:
    return default_kernel() if u.is_cpu and u.dtype == torch.float32 else None


def _forward(
    kernel: Kernel, tensors: tuple[Tensor, ...], marks: Tensor | None, parent: Tensor | None, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    u, _, a, _, _, start = tensors
    y, last = torch.empty_like(u), torch.empty_like(start)
    _call(kernel, (*u.shape, a.shape[0]), (*tensors, marks, parent, y, last, kept))
    return y, last


def _call(kernel: Kernel, sizes: tuple[int, ...], arrays: tuple[Tensor | None, ...]) -> None:
    addresses = (None if x is None else x.data_ptr() for x in arrays)
    if kernel.selective_scan(ctypes.byref(_Scan(*sizes, *addresses)), torch.get_num_threads()):
        raise MemoryError(f"no memory for the states of {sizes[1]} tokens: feed fewer tokens at a time")


@final
class _Selective(torch.autograd.Function):
    """The kernel under autograd: forward keeps the states before each block of tokens, backward runs the blocks again."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, marks: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        u, a = tensors[0], tensors[2]
        (batch, count, width), states = u.shape, a.shape[0]
        kept = u.new_empty(batch, -(-count // STEPS), states, -(-width // 16) * 16)
        ctx.kernel, ctx.marks = kernel, marks
        ctx.save_for_backward(*tensors, kept)
        return _forward(kernel, tensors, marks, None, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        u, _, a, b, _, start = tensors
        (batch, count, width), states = u.shape, a.shape[0]
        du, ddelta, dstart = (torch.empty_like(x) for x in (u, u, start))
        da, db = u.new_empty(batch, states, width), b.new_empty(-(-width // SHARE), *b.shape)
        gradients = (du, ddelta, da, db, torch.empty_like(db), dstart)
        arrays = (*tensors, ctx.marks, None, None, None, kept, dy.contiguous(), dlast.contiguous(), *gradients)
        _call(ctx.kernel, (batch, count, width, states), arrays)
        return None, None, du, ddelta, da.sum(0), db.sum(0), gradients[4].sum(0), dstart


def selective_blocks(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, begins: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The twin. Under autograd a block's states are computed again in backward: all of them would be N times the activations."""
    outputs, recompute = [], torch.is_grad_enabled() and u.shape[1] > STEPS
    for first in range(0, u.shape[1], STEPS):
        piece = slice(first, first + STEPS)
        marks = None if begins is None else begins[:, piece]
        arguments = (u[:, piece], delta[:, piece], a, b[:, piece], c[:, piece], start, marks)
        y, start = checkpoint(_block, *arguments, use_reentrant=False) if recompute else _block(*arguments)
        outputs.append(y)
    return torch.cat(outputs, 1), start


def _block(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, begins: Tensor | None
) -> tuple[Tensor, Tensor]:
    decay, added = _steps(u, delta, a, b)
    if begins is not None:
        decay = torch.where(begins[:, :, None, None], 0, decay)
    states = scan.chain(decay, added, start)
    return _read(states, c), states[:, -1]


def _steps(u: Tensor, delta: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What each token does to the states, as factors and summands [B,T,N,D]."""
    return (delta.unsqueeze(2) * a).exp(), (delta * u).unsqueeze(2) * b.unsqueeze(3)


def _read(states: Tensor, c: Tensor) -> Tensor:
    return (c.unsqueeze(2) @ states).squeeze(2)


def _check(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor) -> None:
    (batch, count, width), states = u.shape, a.shape[0]
    fits = delta.shape == u.shape and a.shape == (states, width) and start.shape == (batch, states, width) and count > 0
    if not fits or b.shape != c.shape or b.shape != (batch, count, states):
        shapes = ", ".join(str(tuple(x.shape)) for x in (u, delta, a, b, c, start))
        raise ValueError(f"u, delta, a, b, c, start have shapes {shapes}: expected [B,T,D] twice, [N,D], [B,T,N] twice, [B,N,D]")
    if any(x.dtype != u.dtype or x.device != u.device for x in (delta, a, b, c, start)):
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (u, delta, a, b, c, start))
        raise ValueError(f"u, delta, a, b, c, start are {kinds}: expected one dtype and device; convert them")
