"""Flash attention of float32 and bfloat16 on the CPU: the compiled tiles, forward and backward, and what they are told.

Knows tensors and how they lie. Does not know what calls it: `nn.flash` checks arguments and has the twin.
"""

import ctypes
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from fewstep.nn.kernels.kernel import DTYPES, Kernel, default_kernel

GRAIN, KEYS = 48, 192  # as in flash.c: keys that are skipped at a time, keys of a tile
UNITS = 8  # of backward: pieces of its work, where heads are fewer
LIMIT = 2**31 - 1  # of a segment's number
_Segments = tuple[Tensor, Tensor] | None


@final
class _View(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("batch", "head", "token"))]

    @classmethod
    def of(cls, x: Tensor) -> "_View":
        return cls(x.data_ptr(), *x.stride()[:3])


@final
class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("batch", "heads", "kv_heads", "queries", "keys", "key_width", "value_width")),
        *((name, ctypes.c_long) for name in ("causal", "bf16")),
        ("scale", ctypes.c_float),
        *((name, _View) for name in ("q", "k", "v", "y")),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("bias_batch", "bias_head", "bias_row")),
        *((name, ctypes.c_void_p) for name in ("q_segments", "k_segments", "spans", "lse", "dlse")),
        *((name, _View) for name in ("dy", "dq", "dk", "dv")),
        ("dbias", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("batch_groups", "head_groups", "piece")),
    ]


@final
@dataclass(frozen=True, eq=False)
class _Plan:
    """What is not differentiated."""

    kernel: Kernel
    causal: bool
    scale: float
    segments: tuple[Tensor, Tensor, Tensor] | None  # of queries [B,T], of keys [B,whole grains], spans [B,grains,2]


def takes(q: Tensor, k: Tensor, v: Tensor, segments: _Segments) -> bool:
    """Whether the kernel computes what `flash` is asked for."""
    if not q.is_cpu or q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype or default_kernel() is None:
        return False
    return segments is None or all(int(each.max()) <= LIMIT for each in segments if each.numel())


def flash(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, segments: _Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`nn.flash.flash_attention` where `takes` says so, arguments checked; bfloat16 is computed in float32."""
    kernel = default_kernel()
    assert kernel is not None, "takes() has asked"
    plan = _Plan(kernel, causal, scale, None if segments is None else _packed(*segments))
    if bias is not None:
        bias = bias.float() if bias.ndim == 4 else bias.float().expand(*q.shape[:2], -1)
        bias = bias.contiguous()
    y, lse = _Flash.apply(_dense(q), _dense(k), _dense(v), bias, plan)
    return y, lse


def _dense(x: Tensor) -> Tensor:
    """`x` with its last dimension dense."""
    return x if x.stride(3) == 1 else x.contiguous()


def _packed(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Segments as the kernel reads them, and what each grain of keys spans; a padded query is like no padded key."""
    k = pad(k, (0, -k.shape[1] % GRAIN), value=-1).to(torch.int32)
    grains = k.unflatten(1, (-1, GRAIN))
    spans = torch.stack([grains.masked_fill(grains < 0, LIMIT).amin(2), grains.amax(2)], 2)
    q = q.to(torch.int32)
    return q.masked_fill(q < 0, -2), k.masked_fill(k < 0, -1), spans


@final
class _Flash(torch.autograd.Function):
    """q, k, v and a bias [B or 1,H or 1,T,S] or by distance [B,H,T+S-1] -> outputs, heads behind tokens, logarithms of sums."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, plan: _Plan) -> tuple[Tensor, Tensor]:
        batch, heads, queries, _ = q.shape
        y = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)  # as a projection of all heads reads it
        lse = torch.empty(batch, heads, queries)
        _call(plan, _told(plan, q, k, v, bias, y, lse))
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, bias, y, lse)
        return y, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, y, lse = ctx.saved_tensors
        dy, dlse, learned = _dense(dy), dlse.contiguous(), bias is not None and ctx.needs_input_grad[3]
        told, dbias = _told(ctx.plan, q, k, v, bias, y, lse), None
        shared = bias.shape if learned and bias.ndim == 4 else q.shape
        told.batch_groups, told.head_groups = shared[0], 1 if shared[1] == 1 else k.shape[1]
        pieces = -(-UNITS // (told.batch_groups * told.head_groups))
        told.piece = max(1, -(-max(q.shape[2], k.shape[2]) // (pieces * KEYS))) * KEYS
        if learned:
            dbias = torch.empty_like(bias) if bias.ndim == 4 else torch.zeros_like(bias)
            told.dbias = dbias.data_ptr() + _first(bias, q)
        dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
        told.dlse = dlse.data_ptr()
        told.dy, told.dq, told.dk, told.dv = map(_View.of, (dy, dq, dk, dv))
        _call(ctx.plan, told)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, None


def _told(plan: _Plan, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, y: Tensor, lse: Tensor) -> _Arguments:
    """What the kernel is told of a forward pass; it holds no tensor."""
    told = _Arguments(*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], plan.causal)
    told.bf16, told.scale, told.lse = q.dtype == torch.bfloat16, plan.scale, lse.data_ptr()
    told.q, told.k, told.v, told.y = map(_View.of, (q, k, v, y))
    if plan.segments is not None:
        told.q_segments, told.k_segments, told.spans = (each.data_ptr() for each in plan.segments)
    if bias is not None:
        steps = (step if count > 1 else 0 for step, count in zip(bias.stride()[:2], bias.shape[:2], strict=True))
        told.bias_batch, told.bias_head = steps
        told.bias, told.bias_row = bias.data_ptr() + _first(bias, q), k.shape[2] if bias.ndim == 4 else -1
    return told


def _first(bias: Tensor, q: Tensor) -> int:
    """How many bytes into a bias query 0 and key 0 meet."""
    return 0 if bias.ndim == 4 else (q.shape[2] - 1) * bias.itemsize


def _call(plan: _Plan, told: _Arguments) -> None:
    if plan.kernel.flash_attention(ctypes.byref(told), torch.get_num_threads()):
        raise MemoryError("no memory for the tiles of a flash attention: free some, or take fewer threads")
