"""The skinny matmul's Python face: weights packed once, then `linear` for a few rows at the price of one.

Knows tensors, layouts and when to leave the work to ATen. Does not know modules, caches or models, and has no gradient.
"""

import ctypes
import mmap
import os
import sys
import threading
import warnings
from functools import cache
from math import prod
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.nn.kernels import build

PANEL = 16  # outputs per panel, as in skinny.c
DTYPES = (torch.bfloat16, torch.float32)


@final
class HugePages:
    """Memory in huge pages for weights that are streamed, shared by as many tensors as fit a block.

    Small pages cost a stream up to half of its bandwidth: prefetchers stop at each page's end. Blocks live as long as any
    tensor made from them, and the unused rest of a block is address space only, not memory.

    Args:
        block: bytes mapped at a time, or more for a larger tensor.
    """

    PAGE = 2 << 20

    def __init__(self, block: int = 32 << 20) -> None:
        self._size = block
        self._lock = threading.Lock()
        self._block = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A zero tensor whose memory starts on a cache line."""
        count = prod(shape) * dtype.itemsize
        whole = -(-count // 64) * 64
        with self._lock:
            if self._block.numel() < whole:
                self._block = self._map(max(whole, self._size))
            taken, self._block = self._block[:count], self._block[whole:]
        return taken.view(dtype).view(shape)

    def _map(self, count: int) -> Tensor:
        if sys.platform != "linux":
            return torch.zeros(count, dtype=torch.uint8)
        memory = mmap.mmap(-1, count + self.PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without huge pages: the memory is as good as any other
            pass
        block = torch.frombuffer(memory, dtype=torch.uint8)
        start = -block.data_ptr() % self.PAGE
        return block[start : start + count]


@final
class Packed:
    """A linear layer's weight and bias in the order the kernel reads them, or as they came where there is no kernel.

    Args:
        data: panels [ceil(out / 16), steps, 16] of float32 or [ceil(out / 16), steps, 16, 2] of bfloat16; or the weight [out, in].
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


@final
class Kernel:
    """The compiled kernel of one instruction-set path.

    Args:
        path: one of `build.paths()`.

    Raises: as `build.load`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.memory = HugePages()
        self._call = build.load(path).skinny_linear
        pointers, sizes, flags = [ctypes.c_void_p] * 4, [ctypes.c_long] * 3, [ctypes.c_int] * 3
        self._call.argtypes = pointers + sizes + flags
        self._call.restype = ctypes.c_int

    def pack(self, weight: Tensor, bias: Tensor | None) -> Packed:
        """A checked weight [out, in] in panels."""
        outputs, inputs = weight.shape
        pair = 2 if weight.dtype == torch.bfloat16 else 1
        padded = F.pad(weight.detach(), (0, -inputs % pair, 0, -outputs % PANEL))
        lines = padded.view(-1, PANEL, padded.shape[1] // pair, pair).transpose(1, 2)
        lines = lines if pair == 2 else lines.squeeze(3)
        data = self.memory.zeros(tuple(lines.shape), weight.dtype).copy_(lines)
        return Packed(data, None if bias is None else bias.detach().float().contiguous(), (outputs, inputs))

    def linear(self, x: Tensor, data: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        """x [..., in] of bfloat16 or float32 times panels: [..., out] in x's dtype."""
        *lead, inputs = x.shape
        x = x.contiguous()
        y = x.new_empty(*lead, outputs)  # sizes one by one: a tuple takes PyTorch's parser 0.7 us more
        failed = self._call(
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


@cache
def default_kernel() -> Kernel | None:
    """The kernel of $FEWSTEP_KERNELS (a path's name, "auto" or "off"; default: auto, the best path), None where ATen must do.

    Raises: ValueError for any other value. A kernel that cannot be built is a warning, given once.
    """
    wanted = os.environ.get("FEWSTEP_KERNELS", "auto")
    if wanted == "off":
        return None
    if wanted not in ("auto", *build.PATHS):
        raise ValueError(f"FEWSTEP_KERNELS is {wanted!r}: set it to auto, off or one of {', '.join(build.PATHS)}")
    try:
        return Kernel(build.paths()[0] if wanted == "auto" else wanted)
    except build.BuildError as error:
        notice = f"fewstep decodes with PyTorch's own linear layers, slower here: {error} (FEWSTEP_KERNELS=off silences this)"
        warnings.warn(notice, RuntimeWarning, stacklevel=2)
        return None


def available() -> bool:
    """Whether the compiled kernel is in use; the first call may compile it."""
    return default_kernel() is not None


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
    if (kernel := default_kernel()) is not None:
        return kernel.pack(weight, bias)
    detached = None if bias is None else bias.detach().to(weight.dtype)
    return Packed(weight.detach(), detached, (weight.shape[0], weight.shape[1]))


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
        return skinny_linear(x, packed.data, packed.bias, packed.shape[0])
    kernel = default_kernel()
    if kernel is None:
        return _aten(x, packed)
    return kernel.linear(x, packed.data, packed.bias, packed.shape[0])


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


@torch.library.custom_op("fewstep::skinny_linear", mutates_args=(), device_types="cpu")
def skinny_linear(x: Tensor, data: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """The kernel as an operator that torch.compile keeps whole; eager code calls it directly, which is five times cheaper."""
    kernel = default_kernel()
    if kernel is None:
        return _aten(x, Packed(data, bias, (outputs, x.shape[-1])))
    return kernel.linear(x, data, bias, outputs)


@skinny_linear.register_fake
def _shape(x: Tensor, data: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))
