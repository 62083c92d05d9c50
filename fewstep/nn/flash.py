"""FlashAttention: attention tile by tile with an online softmax, so that memory is linear in the lengths.

It takes what PyTorch's fused kernel does not on a CPU: a learned bias, packed sequences, values of another width than keys; and
it gives the logarithms of the softmax's sums, with which parts over different keys are merged. Float32 and bfloat16 on the CPU
are the compiled kernel's; its twin in PyTorch's operators, here, takes anything else. This file knows no mixer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewstep.nn.kernels.flash import flash, takes
from fewstep.nn.triton import fused

Segments = Tensor | tuple[Tensor, Tensor]


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    segments: Segments | None = None,
    causal: bool = False,
    scale: float | None = None,
    block: int = 256,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k' + bias) v over the keys a query sees, and the logarithm of that softmax's sum.

    Args:
        q: [B,H,T,E].
        k: [B,G,S,E], G a divisor of H.
        v: [B,G,S,F].
        bias: [B or 1,H or 1,T,S]; or by distance, [H or 1,T+S-1]: key j adds entry T - 1 + j - i to the score of query i.
        segments: [B,T] where T = S, or a pair [B,T], [B,S]: tokens of different segments do not see each other, -1 is padding.
        causal: a query sees no later key, the last query being level with the last key.
        scale: default 1 / sqrt(E).
        block: queries and keys of a tile of the twin.

    Returns: [B,H,T,F] in q's dtype and [B,H,T] in float32 or wider; zeros and -inf for a query that sees no key.

    Raises: ValueError for shapes that do not fit.

    Cost: 2 B H T S (E + F) multiply-adds, 2.5 times that backward, but for tiles of which nothing is seen; memory beyond the
        arguments' own B H (T (E + F) + block^2) numbers; with the kernel outputs, gradients in float32 and a few tiles a thread.
        Gradients of all tensors, of the logarithms too; none of gradients.
    Source: Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4; one division at the end, queries outside: arXiv 2307.08691.
    """
    _check(q, k, v, bias, segments)
    if isinstance(segments, Tensor):
        segments = (segments, segments)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if gpu := fused(q, k, v):
        return gpu.flash_attention(q, k, v, bias, segments=segments, causal=causal, scale=scale)
    if takes(q, k, v, segments):
        return flash(q, k, v, bias, segments, causal, scale)
    return flash_tiles(q, k, v, bias, segments, causal, scale, block)


def flash_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    segments: tuple[Tensor, Tensor] | None,
    causal: bool,
    scale: float,
    block: int = 256,
) -> tuple[Tensor, Tensor]:
    """The twin of `flash_attention`, on arguments that it has checked."""
    tiling = _Tiling(q.shape[2], k.shape[2], causal, segments, block, scale)
    y, lse = _Flash.apply(q.unflatten(1, (k.shape[1], -1)), k, v, bias, tiling)
    return y.flatten(1, 2), lse.flatten(1, 2)


def merge(y: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: outputs [...,F] and logarithms of sums [...] as `flash_attention`
    gives them. Splits of a long cache are computed apart and merged in any order."""
    largest = torch.maximum(lse, other_lse).detach()
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    mine, theirs = (lse - largest).exp(), (other_lse - largest).exp()
    total = mine + theirs
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    y_merged = y * (mine / total).unsqueeze(-1).to(y.dtype) + other * (theirs / total).unsqueeze(-1).to(y.dtype)
    return y_merged, (largest + total.log()).masked_fill(nothing, -torch.inf)


def segments_of(starts: Tensor) -> Tensor:
    """[1,T] the segments of sequences packed one after another, from their `starts` [N+1]: 0, ..., T (cu_seqlens)."""
    lengths = starts.diff()
    return torch.arange(len(lengths), device=starts.device).repeat_interleave(lengths).unsqueeze(0)


@final
@dataclass(frozen=True, eq=False)
class _Tiling:
    """Which tiles of T x S scores are computed and what is hidden in them."""

    queries: int
    keys: int
    causal: bool
    segments: tuple[Tensor, Tensor] | None
    block: int
    scale: float

    def rows(self) -> Iterator[slice]:
        """Blocks of queries."""
        return (slice(start, min(start + self.block, self.queries)) for start in range(0, self.queries, self.block))

    def columns(self, rows: slice, device: torch.device) -> Iterator[tuple[slice, Tensor | None]]:
        """Blocks of keys that some of the queries see, with what is hidden of the tile [B or 1,1,1,M,N] (None: nothing)."""
        ahead = self.keys - self.queries
        end = min(self.keys, rows.stop + ahead) if self.causal else self.keys
        for start in range(0, end, self.block):
            columns = slice(start, min(start + self.block, end))
            hidden = None
            if self.causal and columns.stop - 1 > rows.start + ahead:
                query, key = (torch.arange(part.start, part.stop, device=device) for part in (rows, columns))
                hidden = (key > query.unsqueeze(1) + ahead)[None, None, None]
            if self.segments is not None:
                query, key = self.segments[0][:, rows, None], self.segments[1][:, None, columns]
                apart = ((query != key) | (query < 0))[:, None, None]
                hidden = apart if hidden is None else hidden | apart
                if bool(hidden.all()):
                    continue
            yield columns, hidden

    def scores(self, q: Tensor, k: Tensor, bias: Tensor | None, rows: slice, columns: slice, hidden: Tensor | None) -> Tensor:
        """[B,G,R,M,N] of a tile, -inf where hidden."""
        scores = _times(_wide(q[..., rows, :]) * self.scale, _wide(k[:, :, columns]).mT)
        if bias is not None and bias.ndim == 4:
            tile = bias[:, :, rows, columns]
            scores += tile.unsqueeze(2) if tile.shape[1] == 1 else tile.unflatten(1, scores.shape[1:3])
        elif bias is not None:
            tile = bias[:, self.distance(rows, columns, bias.device)]
            scores += tile if len(tile) == 1 else tile.unflatten(0, scores.shape[1:3])
        return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)

    def distance(self, rows: slice, columns: slice, device: torch.device) -> Tensor:
        """[M,N] the entries of a bias by distance."""
        query, key = (torch.arange(part.start, part.stop, device=device) for part in (rows, columns))
        return key - query.unsqueeze(1) + self.queries - 1


@final
class _Flash(torch.autograd.Function):
    """q [B,G,R,T,E], k, v -> outputs [B,G,R,T,F] and logarithms of sums [B,G,R,T]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, tiling: _Tiling) -> tuple[Tensor, Tensor]:
        y = q.new_empty(*q.shape[:4], v.shape[3])
        lse = torch.empty(q.shape[:4], dtype=_wide(q[..., :0, :]).dtype, device=q.device)
        for rows in tiling.rows():
            y[..., rows, :], lse[..., rows] = _attend(q, k, v, bias, tiling, rows)
        ctx.tiling = tiling
        ctx.save_for_backward(q, k, v, bias, y, lse)
        return y, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, bias, y, lse), tiling, (dy, dlse) = ctx.saved_tensors, ctx.tiling, grads
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        dbias = torch.zeros_like(bias, dtype=lse.dtype) if bias is not None and ctx.needs_input_grad[3] else None
        known = lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)
        rest = (dlse - (_wide(dy) * _wide(y)).sum(-1)).unsqueeze(-1)
        for rows in tiling.rows():
            q_rows, dy_rows = _wide(q[..., rows, :]), _wide(dy[..., rows, :])
            for columns, hidden in tiling.columns(rows, q.device):
                p = tiling.scores(q, k, bias, rows, columns, hidden).sub_(known[..., rows, :]).exp_()
                ds = _times(dy_rows, _wide(v[:, :, columns]).mT).add_(rest[..., rows, :]).mul_(p)
                dv[:, :, columns] += p.flatten(2, 3).mT @ dy_rows.flatten(2, 3)
                dk[:, :, columns] += ds.flatten(2, 3).mT @ q_rows.flatten(2, 3) * tiling.scale
                dq[..., rows, :] += _times(ds, _wide(k[:, :, columns])) * tiling.scale
                if dbias is not None:
                    _add_bias(dbias, ds.flatten(1, 2), tiling, rows, columns)
        dbias = None if dbias is None or bias is None else dbias.to(bias.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, None


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, tiling: _Tiling, rows: slice) -> tuple[Tensor, Tensor]:
    """A block of queries over all keys they see: running maximum, sum and weighted values."""
    shape = (*q.shape[:3], rows.stop - rows.start, 1)
    wide = _wide(q[..., :0, :]).dtype
    largest = torch.full(shape, -torch.inf, dtype=wide, device=q.device)
    total, y = torch.zeros_like(largest), largest.new_zeros(*shape[:-1], v.shape[3])
    for columns, hidden in tiling.columns(rows, q.device):
        scores = tiling.scores(q, k, bias, rows, columns, hidden)
        new = torch.maximum(largest, scores.amax(-1, keepdim=True))
        finite = new.masked_fill(new == -torch.inf, 0.0)
        p, fading = scores.sub_(finite).exp_(), (largest - finite).exp()
        total = total * fading + p.sum(-1, keepdim=True)
        y = y * fading + _times(p, _wide(v[:, :, columns]))
        largest = new
    seen = total.masked_fill(total == 0, 1.0)
    return (y / seen).to(q.dtype), (largest + seen.log()).squeeze(-1)


def _add_bias(dbias: Tensor, ds: Tensor, tiling: _Tiling, rows: slice, columns: slice) -> None:
    """Adds what a tile's scores [B,H,M,N] leave for the bias, summed where it was broadcast."""
    if dbias.ndim == 4:
        dbias[:, :, rows, columns] += ds.sum_to_size(*dbias.shape[:2], *ds.shape[2:])
        return
    by_head = ds.sum(0).sum_to_size(len(dbias), *ds.shape[2:])
    dbias.index_add_(1, tiling.distance(rows, columns, dbias.device).flatten(), by_head.flatten(1))


def _times(x: Tensor, y: Tensor) -> Tensor:
    """x [B,G,R,M,A] times y [B,G,A,N]: the R query heads of a group are rows of one product."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, segments: Segments | None) -> None:
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    if k.shape[0] != batch or k.shape[3] != width or v.shape[:3] != k.shape[:3] or heads % k.shape[1]:
        raise ValueError(
            f"q, k, v: shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; give [B,H,T,E], [B,G,S,E], [B,G,S,F], G | H"
        )
    if bias is not None:
        dense = (
            bias.ndim == 4 and bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads) and bias.shape[2:] == (queries, keys)
        )
        if not dense and not (bias.ndim == 2 and bias.shape[0] in (1, heads) and bias.shape[1] == queries + keys - 1):
            raise ValueError(f"bias: shape {tuple(bias.shape)}; give [B or 1,H or 1,T,S] or, by distance, [H or 1,T+S-1]")
    pair = (segments, segments) if isinstance(segments, Tensor) else segments
    if pair is not None and (pair[0].shape != (batch, queries) or pair[1].shape != (batch, keys)):
        raise ValueError(f"segments: shapes {[tuple(each.shape) for each in pair]}; give [B,T] of queries and [B,S] of keys")
