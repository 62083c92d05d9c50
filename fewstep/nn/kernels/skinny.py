"""Linear layers for few rows: weights packed once, then `linear` reads each of them once whatever the rows.

Knows tensors, the panels of `skinny.c` and the ATen twin. Does not know modules or models, and has no gradient.
"""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.nn.kernels.kernel import DTYPES, OPERATORS, HugePages, Kernel, default_kernel

PANEL = 16  # outputs per panel, as in skinny.c


@final
class Packed:
    """A linear layer's weight and bias in the order the kernel reads them, or as they came where there is no kernel.

    Args:
        data: panels [ceil(out / 16), in, 16] of float32 or [ceil(out / 16), ceil(in / 2), 16, 2] of bfloat16; or the weight.
        bias: [out], float32 beside panels, else in the weight's dtype.
        shape: (out, in).
    """

    __slots__ = ("bias", "data", "shape")

    def __init__(self, data: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> None:
        self.data = data
        self.bias = bias
        self.shape = shape

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype: bfloat16 or float32."""
        return self.data.dtype

    @property
    def panels(self) -> bool:
        """Whether the data lie in the kernel's panels."""
        return self.data.ndim > 2

    @property
    def nbytes(self) -> int:
        """Bytes held, padding and bias included; the memory traffic of one `linear` of few rows."""
        return self.data.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def unpack(self) -> Tensor:
        """The weight [out, in] as it came: a copy where the data lie in panels."""
        if not self.panels:
            return self.data
        outputs, inputs = self.shape
        rows = self.data.transpose(1, 2).reshape(self.data.shape[0] * PANEL, -1)
        return rows[:outputs, :inputs]


def pack(weight: Tensor, bias: Tensor | None = None) -> Packed:
    """Prepares a linear layer for `linear`; done once, when a model is loaded.

    Args:
        weight: [out, in], bfloat16 or float32, on the CPU.
        bias: [out].

    Raises:
        ValueError: another shape, dtype or device.

    Cost: one pass over the weight; as many bytes as the weight, with `out` rounded up to 16 and `in` to 2.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected [out, in], both at least 1")
    if weight.dtype not in DTYPES or weight.device.type != "cpu":
        raise ValueError(f"weight is {weight.dtype} on {weight.device}: expected bfloat16 or float32 on the CPU, or use F.linear")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected [{weight.shape[0]}], the weight's outputs")
    shape = (weight.shape[0], weight.shape[1])
    if (kernel := default_kernel()) is not None:
        return Packed(_panels(weight, kernel.memory), None if bias is None else bias.detach().float().contiguous(), shape)
    detached = None if bias is None else bias.detach().to(weight.dtype)
    return Packed(weight.detach(), detached, shape)


def _panels(weight: Tensor, memory: HugePages) -> Tensor:
    outputs, inputs = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    padded = F.pad(weight.detach(), (0, -inputs % pair, 0, -outputs % PANEL))
    lines = padded.view(-1, PANEL, padded.shape[1] // pair, pair).transpose(1, 2)
    lines = lines if pair == 2 else lines.squeeze(3)
    return memory.zeros(tuple(lines.shape), weight.dtype).copy_(lines)


def linear(x: Tensor, packed: Packed) -> Tensor:
    """y = x w' + b, each weight read from memory once for up to a few rows.

    With the kernel, a row's result is bitwise the same whatever rows stand beside it and however many threads compute it.

    Args:
        x: [..., in], bfloat16 or float32, on the CPU; float32 activations keep their precision against bfloat16 weights.
        packed: the layer, from `pack`.

    Returns: [..., out] in x's dtype; sums are float32.

    Raises:
        ValueError: another width, dtype or device, or a gradient is wanted.

    Cost: the weight's bytes at the memory's bandwidth while rows are few; rows x out x in multiply-adds when they are many.
    Differs: without the kernel it is `F.linear` (in float32 where dtypes differ), which orders its sums as it likes.
    """
    if x.shape[-1] != packed.shape[1] or x.dtype not in DTYPES or not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
        _refuse(x, packed)
    if not packed.panels:
        return _aten(x, packed)
    if torch.compiler.is_compiling():
        return torch.ops.fewstep.skinny_linear(x, packed.data, packed.bias, packed.shape[0])
    kernel = default_kernel()
    if kernel is None:
        return _aten(x, packed)
    return _run(kernel, x, packed.data, packed.bias, packed.shape[0])


def _run(kernel: Kernel, x: Tensor, data: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    *lead, inputs = x.shape
    x = x.contiguous()
    y = x.new_empty(*lead, outputs)  # sizes one by one: a tuple takes PyTorch's parser 0.7 us more
    failed = kernel.skinny_linear(
        data.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        y.numel() // outputs,
        inputs,
        outputs,
        data.dtype == torch.bfloat16,
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for {x.numel()} activations of a linear layer: feed fewer rows at a time")
    return y


def _refuse(x: Tensor, packed: Packed) -> None:
    if x.shape[-1] != packed.shape[1]:
        raise ValueError(f"x has width {x.shape[-1]}: expected {packed.shape[1]}, the weight's inputs")
    if x.dtype not in DTYPES or not x.is_cpu:
        raise ValueError(f"x is {x.dtype} on {x.device}: expected bfloat16 or float32 on the CPU, or use F.linear")
    raise ValueError("x requires a gradient, which packed layers do not have: call them under torch.no_grad() or use F.linear")


def _aten(x: Tensor, packed: Packed) -> Tensor:
    weight, bias = packed.unpack(), packed.bias
    if x.dtype == weight.dtype:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def skinny_linear(x: Tensor, data: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """The operator `fewstep::skinny_linear`, which torch.compile keeps whole; eager code spares itself the dispatcher."""
    kernel = default_kernel()
    if kernel is None:
        return _aten(x, Packed(data, bias, (outputs, x.shape[-1])))
    return _run(kernel, x, data, bias, outputs)


OPERATORS.define("skinny_linear(Tensor x, Tensor data, Tensor? bias, int outputs) -> Tensor")
OPERATORS.impl("skinny_linear", skinny_linear, "CPU")


@torch.library.register_fake("fewstep::skinny_linear", lib=OPERATORS)
def _shape(x: Tensor, data: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))
