"""Softmax attention of whole sequences, and the one rule for who computes it: fewstep's flash attention or PyTorch's.

This file knows no mixer, and of encodings only that they may add to the scores.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from fewstep.core.mixer import Causal, Context, Full
from fewstep.nn.flash import flash_attention
from fewstep.nn.mixers.scores import parallel_bias, parallel_seen


def flash_pays(q: Tensor, v: Tensor, bias: Tensor | None, ctx: Context) -> bool:
    """Whether attention is fewstep's own, which adds a bias, keeps packed sequences apart and takes unequal widths tile by tile.

    For these PyTorch on a CPU needs a mask of T x T numbers, all scores at once where the bias is learned, or zeros in place of
    the missing widths (`benchmarks/attention.py` times both). Without them it is as fast, and other masks are left to it.
    """
    special = bias is not None or ctx.segments is not None or q.shape[3] != v.shape[3]
    return special and q.is_cpu and isinstance(ctx.mask, Causal | Full)


def whole_attention(
    q: Tensor, k: Tensor, v: Tensor, ctx: Context, bias: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """[B,H,T,F] of queries [B,H,T,E] over the keys [B,G,T,E] and values [B,G,T,F] of the same tokens, as mask and segments allow.

    Args:
        q, k, v: as above, G a divisor of H.
        ctx: of a parallel pass.
        bias: [B or 1,H,T,T] added to the scores; None: nothing.
        scale: default 1 / sqrt(E).

    What padding gets is free. Cost: 2 B H T^2 (E + F) multiply-adds, half of them where causal, few where packed; no T x T
    numbers but for masks that flash attention does not take. `ctx.shared` keys: those of `scores`.
    """
    causal = isinstance(ctx.mask, Causal)
    if flash_pays(q, v, bias, ctx):
        return flash_attention(q, k, v, bias, segments=ctx.segments, causal=causal, scale=scale)[0]
    if bias is None and ctx.segments is None and isinstance(ctx.mask, Causal | Full):
        return fused_attention(q, k, v, causal=causal, scale=scale)
    if bias is None:
        return fused_attention(q, k, v, parallel_bias(ctx, q), scale=scale)
    seen = parallel_seen(ctx, q[:, 0])
    bias = bias.to(q.dtype) if seen is None else bias.to(q.dtype).masked_fill(~seen, -torch.inf)
    return fused_attention(q, k, v, bias, scale=scale)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """[B,H,T,F] by PyTorch's kernel, which takes equal widths: zeros change no score and no value. `bias` holds the mask, too."""
    width, grouped = v.shape[3], q.shape[1] != k.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    apart = q.shape[3] - width
    if apart > 0:
        v = pad(v, (0, apart))
    elif apart < 0:
        q, k = pad(q, (0, -apart)), pad(k, (0, -apart))
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped)[..., :width]
