"""The two ends of a call: what a draft module reads, and the best of a row of scores. Knows tensors; has no gradient."""

import ctypes
from typing import final

import torch
from torch import Tensor

from fewstep.nn.kernels.kernel import DTYPES, default_kernel
from fewstep.nn.kernels.parts import Gain, norm_struct
from fewstep.nn.kernels.skinny import Packed


@final
class Join:
    """w [norm(a); norm(b)] + bias: two activations of a position, normed each by itself, in one projection.

    Args:
        layer: [out, 2 D], bfloat16 or float32 in panels.
        a_norm, b_norm: RMSNorms over D; None: that side is taken as it is.

    Raises: ValueError where shapes do not fit together.
    """

    def __init__(self, layer: Packed, a_norm: Gain | None, b_norm: Gain | None) -> None:
        self.layer, self.norms, self.width = layer, (a_norm, b_norm), layer.shape[1] // 2
        for gain in self.norms:
            if gain is not None and gain.weight.shape != (self.width,):
                raise ValueError(
                    f"a norm's weight is {tuple(gain.weight.shape)}: expected ({self.width},), half the layer's inputs"
                )
        if not layer.panels or layer.shape[1] % 2:
            raise ValueError(f"layer is {layer.shape}: expected panels of the kernel over an even number of inputs; pack it anew")
        self._structs = [norm_struct(gain) for gain in self.norms]

    def __reduce__(self) -> tuple[type["Join"], tuple[Packed, Gain | None, Gain | None]]:
        return Join, (self.layer, *self.norms)  # a copy has weights and addresses of its own

    def __call__(self, a: Tensor, b: Tensor, reads: Tensor | None = None) -> Tensor:
        """[B,T,out] from `a` [B,T,D] and `b` [B,S,D], of which position t of a row reads entry `reads` [B,T] int64 (None: t).

        A row's result is bitwise the same whatever rows share the call. Raises ValueError for shapes, dtypes, devices or reads
        that do not fit, MemoryError where memory is lacking. Cost: the weights' bytes while rows are few.
        """
        kernel, layer, batch = default_kernel(), self.layer, a.shape[0]
        fits = a.shape[-1] == b.shape[-1] == self.width and a.dtype == b.dtype == layer.dtype and a.is_cpu and b.is_cpu
        whole = b.shape == a.shape if reads is None else reads.shape == a.shape[:2] and reads.dtype == torch.int64
        if kernel is None or not fits or not whole or b.shape[0] != batch:
            raise ValueError(
                f"a, b and reads are {tuple(a.shape)} {a.dtype}, {tuple(b.shape)} {b.dtype}, "
                f"{None if reads is None else tuple(reads.shape)}: expected [B,T,{self.width}], [B,S,{self.width}] in "
                f"{layer.dtype} and int64 [B,T] on the CPU, and kernels in use"
            )
        a, b = a.contiguous(), b.contiguous()
        reads = None if reads is None else reads.contiguous()
        y = a.new_empty(batch, a.shape[1], layer.shape[0])
        code = kernel.join_rows(
            *(ctypes.addressof(struct) for struct in self._structs),
            layer.data.data_ptr(),
            None if layer.bias is None else layer.bias.data_ptr(),
            a.data_ptr(),
            b.data_ptr(),
            None if reads is None else reads.data_ptr(),
            y.data_ptr(),
            batch,
            a.shape[1],
            b.shape[1],
            self.width,
            layer.shape[0],
            layer.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        if code > 0:
            raise ValueError(f"reads={None if reads is None else reads.tolist()}: must lie in 0 .. {b.shape[1] - 1}")
        if code:
            raise MemoryError(f"no memory for the activations of {batch * a.shape[1]} positions: feed fewer at a time")
        return y


def argmax(x: Tensor) -> Tensor:
    """The index of the largest entry along the last dimension, the first of several: [...] int64. Cost: one pass.

    As `torch.argmax`, which takes 12 us for a row of 2048 in bfloat16.
    """
    kernel = default_kernel()
    if kernel is None or x.dtype not in DTYPES or not x.is_cpu or torch.compiler.is_compiling() or not x.shape[-1]:
        return x.argmax(-1)
    x = x.contiguous()
    y = x.new_empty(x.shape[:-1], dtype=torch.int64)
    kernel.largest(x.data_ptr(), y.data_ptr(), y.numel(), x.shape[-1], x.dtype == torch.bfloat16)
    return y
