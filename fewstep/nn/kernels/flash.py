"""Flash attention of float32 on the CPU: the compiled tiles, forward and backward, and the layouts that they read.

Knows tensors and layouts. Does not know what calls it: `nn.flash` checks arguments and has the twin.
"""

import ctypes
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from fewstep.nn.kernels.kernel import DTYPES, Kernel, default_kernel

PANEL, ROWS, GRAIN, KEYS = 16, 12, 48, 192  # as in flash.c: what widths, queries and keys are padded to; keys of a tile
UNITS = 4  # of backward: threads that share its work, where heads are fewer; each holds gradients of all queries
_Arrays = dict[str, Tensor | None]  # by the name of the field that points to them
LIMIT = 2**31 - 1  # of a segment's number


@final
class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("batch", "heads", "kv_heads", "queries", "keys", "rows", "columns")),
        *((name, ctypes.c_long) for name in ("key_width", "value_width", "causal", "pieces")),
        *((name, ctypes.c_void_p) for name in ("q", "k_lanes", "values", "bias")),
        *((name, ctypes.c_long) for name in ("bias_batch", "bias_head", "bias_row")),
        *((name, ctypes.c_void_p) for name in ("q_segments", "k_segments", "spans", "y", "lse")),
        *((name, ctypes.c_void_p) for name in ("rest", "dy", "dy_panels", "q_panels", "k_panels", "dq", "dk", "dv", "dbias")),
        *((name, ctypes.c_long) for name in ("dbias_piece", "bias_batches", "bias_heads")),
    ]


@final
@dataclass(frozen=True, eq=False)
class _Plan:
    """What is not differentiated: lengths before padding, and which keys a query sees."""

    kernel: Kernel
    queries: int
    keys: int
    causal: bool
    segments: tuple[Tensor, Tensor, Tensor] | None  # of queries [B,rows], of keys [B,columns], spans [B,columns / 48,2]


def takes(q: Tensor, segments: tuple[Tensor, Tensor] | None) -> bool:
    """Whether the kernel computes what `flash` is asked for."""
    if not q.is_cpu or q.dtype not in DTYPES or default_kernel() is None:
        return False
    return segments is None or all(int(each.max()) <= LIMIT for each in segments if each.numel())


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    segments: tuple[Tensor, Tensor] | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`nn.flash.flash_attention` where `takes` says so, arguments checked; bfloat16 is computed in float32."""
    kernel = default_kernel()
    assert kernel is not None, "takes() has asked"
    queries, keys, width = q.shape[2], k.shape[2], v.shape[3]
    rows, columns = -queries % ROWS, -keys % GRAIN
    plan = _Plan(kernel, queries, keys, causal, None if segments is None else _packed(*segments, rows, columns))
    if bias is not None:
        bias = bias.float() if bias.ndim == 4 else bias.float().expand(*q.shape[:2], -1)
        bias = bias.contiguous()
    y, lse = _Flash.apply(_padded(q.float() * scale, rows), _padded(k.float(), columns), _padded(v.float(), columns), bias, plan)
    return y[:, :, :queries, :width].to(q.dtype), lse


def _padded(x: Tensor, rows: int) -> Tensor:
    """With so many more rows and whole panels, zeros."""
    more = -x.shape[3] % PANEL
    return (pad(x, (0, more, 0, rows)) if more or rows else x).contiguous()


def _packed(q: Tensor, k: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Segments as the kernel reads them, and what each grain of keys spans."""
    k = pad(k, (0, columns), value=-1).to(torch.int32)
    grains = k.unflatten(1, (-1, GRAIN))
    spans = torch.stack([grains.masked_fill(grains < 0, LIMIT).amin(2), grains.amax(2)], 2)
    q = pad(q, (0, rows), value=-1).to(torch.int32)
    return q.masked_fill(q < 0, -2), k.masked_fill(k < 0, -1), spans


def _lanes(x: Tensor) -> Tensor:
    """[B,G,S,E] -> [B,G,S/16,E,16]: panels of rows."""
    return x.unflatten(2, (-1, PANEL)).mT.contiguous()


def _panels(x: Tensor) -> Tensor:
    """[B,G,S,E] -> [B,G,E/16,S,16]: panels of columns."""
    return x.unflatten(3, (-1, PANEL)).transpose(2, 3).contiguous()


def _summed(x: Tensor, dim: int) -> Tensor:
    """The sum over `dim`, without a copy where that is a single entry."""
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim)


@final
class _Flash(torch.autograd.Function):
    """Padded q (scaled), k, v and a bias [B or 1,H or 1,T,S] or by distance [B,H,T+S-1] -> padded outputs, logarithms of sums."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, plan: _Plan) -> tuple[Tensor, Tensor]:
        y, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*q.shape[:2], plan.queries)
        arrays: _Arrays = {"q": q, "k_lanes": _lanes(k), "values": _panels(v), "y": y, "lse": lse}
        _call(plan, (q, k, v), bias, arrays)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, bias, y, lse)
        return y, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, bias, y, lse), plan, dy = ctx.saved_tensors, ctx.plan, dy.contiguous()
        shared = bias.shape[:2] if bias is not None and ctx.needs_input_grad[3] else q.shape[:2]
        pieces = min(-(-UNITS // shared.numel()), -(-k.shape[2] // KEYS))
        dbias = None
        if bias is not None and ctx.needs_input_grad[3]:
            dbias = bias.new_zeros(pieces, *bias.shape) if bias.ndim == 3 else torch.empty_like(bias).unsqueeze(0)
        dq, dk, dv = q.new_zeros(pieces, *q.shape), *(x.new_zeros(*q.shape[:2], *x.shape[2:]) for x in (k, v))
        rest = dlse - (dy * y).sum(-1)[..., : plan.queries]
        arrays: _Arrays = {"q": q, "k_lanes": _lanes(k), "values": _lanes(v), "lse": lse, "rest": rest, "dy": dy, "dbias": dbias}
        arrays |= {"dy_panels": _panels(dy), "q_panels": _panels(q), "k_panels": _panels(k), "dq": dq, "dk": dk, "dv": dv}
        sizes = {"pieces": pieces, "bias_batches": shared[0], "bias_heads": shared[1]}
        if dbias is not None and len(dbias) > 1:
            sizes["dbias_piece"] = dbias.stride(0)
        _call(plan, (q, k, v), bias, arrays, sizes)
        dk, dv = (_summed(x.unflatten(1, (k.shape[1], -1)), 2) for x in (dk, dv))
        return _summed(dq, 0), dk, dv, None if dbias is None else _summed(dbias, 0), None


def _call(
    plan: _Plan,
    qkv: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    arrays: _Arrays,
    sizes: dict[str, int] | None = None,
) -> None:
    q, k, v = qkv
    told = _Arguments(
        *q.shape[:2], k.shape[1], plan.queries, plan.keys, q.shape[2], k.shape[2], q.shape[3], v.shape[3], plan.causal
    )
    for name, size in (sizes or {}).items():
        setattr(told, name, size)
    segments = plan.segments or (None, None, None)
    arrays = arrays | {"bias": bias} | dict(zip(("q_segments", "k_segments", "spans"), segments, strict=True))
    first = 0  # of a bias, where query 0 and key 0 meet
    if bias is not None:
        told.bias_batch, told.bias_head = (
            step if count > 1 else 0 for step, count in zip(bias.stride(), bias.shape[:2], strict=False)
        )
        told.bias_row, first = (plan.keys, 0) if bias.ndim == 4 else (-1, plan.queries - 1)
    for name, array in arrays.items():
        offset = first * array.itemsize if array is not None and name in ("bias", "dbias") else 0
        setattr(told, name, None if array is None else array.data_ptr() + offset)
    if plan.kernel.flash_attention(ctypes.byref(told), torch.get_num_threads()):
        raise MemoryError("no memory for the tiles of a flash attention: free some, or take fewer threads")
