"""RMSNorm whose rows do not depend on one another. Knows tensors and the ATen twin. Does not know modules; has no gradient."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.nn.kernels.kernel import DTYPES, OPERATORS, Kernel, default_kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x weight / sqrt(mean(x^2) + eps) over the last dimension, in float32 with one rounding at the end.

    With the kernel, a row's result is bitwise the same whatever rows stand beside it.

    Args:
        x: [..., D], bfloat16 or float32, on the CPU.
        weight: float32 [D], contiguous.
        eps: at least 0.

    Returns: [..., D] in x's dtype.

    Raises:
        ValueError: another width, dtype or device, or a gradient is wanted.

    Cost: two passes over x. Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    if x.shape[-1:] != weight.shape or weight.dtype != torch.float32 or not weight.is_contiguous():
        raise ValueError(
            f"x and weight have shapes {tuple(x.shape)} and {tuple(weight.shape)}, weight is {weight.dtype}: "
            "expected [..., D] and a contiguous float32 [D]"
        )
    if x.dtype not in DTYPES or not (x.is_cpu and weight.is_cpu):
        raise ValueError(f"x is {x.dtype} on {x.device}: expected bfloat16 or float32 on the CPU, or use F.rms_norm")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x requires a gradient, which this norm does not have: call it under torch.no_grad() or use F.rms_norm")
    if torch.compiler.is_compiling():
        return torch.ops.fewstep.rms_norm(x, weight, eps)
    return _operator(x, weight, eps)


def _operator(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    kernel = default_kernel()
    if kernel is None:
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
    return _run(kernel, x, weight, eps)


def _run(kernel: Kernel, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    width = weight.shape[0]
    rows = x.numel() // width if width else 0
    kernel.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, width, eps, x.dtype == torch.bfloat16)
    return y


OPERATORS.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
OPERATORS.impl("rms_norm", _operator, "CPU")


@torch.library.register_fake("fewstep::rms_norm", lib=OPERATORS)
def _shape(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)
