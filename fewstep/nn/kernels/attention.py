"""Softmax attention of few queries over a cache, whose result depends on the keys a query sees and on nothing else.

Knows tensors, masks and the ATen twin. Does not know trees, positions or models, and has no gradient.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewstep.nn.kernels.kernel import DTYPES, OPERATORS, Kernel, default_kernel

Sizes = ctypes.c_long * 17  # the struct `layout` of attention.c


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    """softmax(scale q k') v over the visible keys.

    With the kernel, a query's result is bitwise the same whatever hidden slots lie between or behind its keys, and whatever
    queries, rows and threads share the call: a node of a tree, and the same token decoded alone, agree in every bit.

    Args:
        q: [B,H,T,E], bfloat16 or float32, on the CPU; any strides, the last one 1.
        k: [B,G,S,E], G a divisor of H; as q.
        v: as k.
        visible: bool [B or 1, 1, T, S]; None: every key. A query that sees no key gives zeros.
        scale: default 1 / sqrt(E).

    Returns: [B,T,H E], heads merged, in q's dtype.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, or a gradient is wanted.

    Cost: 2 B H T S E multiply-adds; keys hidden from all the T queries of a row cost nothing; memory 4 H T S bytes a row.
    Source: Vaswani et al. 2017, arXiv 1706.03762; grouped queries arXiv 2305.13245.
    Differs: two passes with the exact maximum, not an online softmax, whose rescaling would depend on where blocks end. Without
        the kernel it is PyTorch's fused attention, which orders its sums as it likes.
    """
    if _unfit(q, k, v, visible):
        _refuse(q, k, v, visible)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling():
        return torch.ops.fewstep.decode_attention(q, k, v, visible, scale)
    return decode_attention(q, k, v, visible, scale)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """The operator `fewstep::decode_attention`, on arguments that `attend` has checked."""
    kernel = default_kernel()
    return _aten(q, k, v, visible, scale) if kernel is None else _run(kernel, q, k, v, visible, scale)


def _run(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, width = q.shape
    _, kv_heads, keys, _ = k.shape
    y = q.new_empty(batch, queries, heads * width)
    row, cell, mask = 0, 0, None
    if visible is not None:
        strides, mask = visible.stride(), visible.data_ptr()
        row, cell = strides[0] if visible.shape[0] > 1 else 0, strides[2]
    sizes = Sizes(batch, heads, kv_heads, queries, keys, width, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], row, cell)
    threads = torch.get_num_threads()
    failed = kernel.decode_attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), mask, y.data_ptr(), sizes, scale, q.dtype == torch.bfloat16, threads
    )
    if failed:
        raise MemoryError(f"no memory for the scores of {queries} queries over {keys} keys: feed fewer queries at a time")
    return y


def _aten(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    mask = None
    if visible is not None:
        mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
    y = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if visible is not None:
        y = y.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return y.transpose(1, 2).flatten(2)


def _unfit(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> bool:
    batch, heads, queries, width = q.shape
    rows, kv_heads, keys, k_width = k.shape
    dtype = q.dtype
    if rows != batch or k_width != width or k.shape != v.shape or heads % kv_heads:
        return True
    if dtype not in DTYPES or k.dtype != dtype or v.dtype != dtype or not (q.is_cpu and k.is_cpu and v.is_cpu):
        return True
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        return True
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return True
    if visible is None:
        return False
    if visible.shape not in ((batch, 1, queries, keys), (1, 1, queries, keys)):
        return True
    return visible.dtype != torch.bool or visible.stride(3) != 1 or not visible.is_cpu


def _refuse(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> None:
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dtype not in DTYPES or x.dtype != q.dtype or not x.is_cpu:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}: expected bfloat16 or float32, the same for q, k and v, on the CPU"
            )
        if x.stride(3) != 1:
            raise ValueError(f"{name} has strides {x.stride()}: the last must be 1; make it contiguous")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which this attention does not have: call it under torch.no_grad()")
    if visible is not None and (visible.dtype != torch.bool or not visible.is_cpu or visible.stride(3) != 1):
        raise ValueError(f"visible is {visible.dtype} on {visible.device}: expected bool on the CPU, its last stride 1")
    mask = None if visible is None else tuple(visible.shape)
    raise ValueError(
        f"q, k, v, visible have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, {mask}: "
        "expected [B,H,T,E], [B,G,S,E] twice with G a divisor of H, [B or 1,1,T,S]"
    )


OPERATORS.define("decode_attention(Tensor q, Tensor k, Tensor v, Tensor? visible, float scale) -> Tensor")
OPERATORS.impl("decode_attention", decode_attention, "CPU")


@torch.library.register_fake("fewstep::decode_attention", lib=OPERATORS)
def _shape(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1] * q.shape[3]))
