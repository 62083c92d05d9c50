"""The compiled kernels as Python sees them: typed C functions, memory for what they stream, and the choice of path.

Knows ctypes, huge pages and the environment switch. Does not know layers: `skinny` and `attention` do.
"""

import ctypes
import mmap
import os
import sys
import threading
import warnings
from contextlib import suppress
from functools import cache
from math import prod
from typing import final

import torch
from torch import Tensor

from fewstep.nn.kernels import build

DTYPES = (torch.bfloat16, torch.float32)

# define and impl, not torch.library.custom_op: that wrapper costs 15 us more a call and takes dynamo's import at the first
OPERATORS = torch.library.Library("fewstep", "FRAGMENT")


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
        with suppress(OSError):  # a system without huge pages: the memory is as good as any other
            memory.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(memory, dtype=torch.uint8)
        start = -block.data_ptr() % self.PAGE
        return block[start : start + count]


@final
class Kernel:
    """The library of one instruction-set path.

    Args:
        path: one of `build.paths()`.

    Raises: as `build.load`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.memory = HugePages()
        library = build.load(path)
        pointer, size, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        self.skinny_linear = library.skinny_linear
        self.skinny_linear.argtypes = (*[pointer] * 4, *[size] * 3, *[flag] * 3)
        self.decode_attention = library.decode_attention
        self.decode_attention.argtypes = (*[pointer] * 5, ctypes.POINTER(size), ctypes.c_float, *[flag] * 2)
        self.rms_norm = library.rms_norm
        self.rms_norm.argtypes = (*[pointer] * 3, *[size] * 2, ctypes.c_float, flag)
        self.rms_norm.restype = None
        self.join_rows = library.join_rows
        self.join_rows.argtypes = (*[pointer] * 8, *[size] * 5, *[flag] * 2)
        self.largest = library.largest
        self.largest.argtypes = (*[pointer] * 2, *[size] * 2, flag)
        self.largest.restype = None
        self.draft_tree = library.draft_tree
        self.draft_tree.argtypes = (pointer,) * 3
        self.run_steps = library.run_steps
        self.run_steps.argtypes = (pointer,)
        self.keep_slots = library.keep_slots
        self.keep_slots.argtypes = (pointer, *[size] * 4, *[pointer] * 2, size, pointer)
        self.selective_scan = library.selective_scan
        self.selective_scan.argtypes = (pointer, flag)
        self.wkv4 = library.wkv4
        self.wkv4.argtypes = (pointer, flag)
        self.wkv4.restype = None
        self.flash_attention = library.flash_attention
        self.flash_attention.argtypes = (pointer, flag)


@cache
def default_kernel() -> Kernel | None:
    """The kernel of $FEWSTEP_KERNELS (a path's name, "auto" or "off"; default: auto, the best path), None where ATen must do.

    Raises: ValueError for any other value. A kernel that cannot be built is a warning, given once.
    """
    wanted = os.environ.get("FEWSTEP_KERNELS") or "auto"
    if wanted == "off":
        return None
    if wanted not in ("auto", *build.PATHS):
        raise ValueError(f"FEWSTEP_KERNELS is {wanted!r}: set it to auto, off or one of {', '.join(build.PATHS)}")
    try:
        return Kernel(build.paths()[0] if wanted == "auto" else wanted)
    except build.BuildError as error:
        notice = f"fewstep decodes with PyTorch's own operators, slower here: {error} (FEWSTEP_KERNELS=off silences this)"
        warnings.warn(notice, RuntimeWarning, stacklevel=2)
        return None


def outpaces(dtype: torch.dtype) -> bool:
    """Whether the kernel beats PyTorch's matrix products on many rows too: in bfloat16 on a CPU without arithmetic for it."""
    kernel = default_kernel()
    return kernel is not None and dtype == torch.bfloat16 and kernel.path in ("avx2", "avx512")


def available() -> bool:
    """Whether the compiled kernel is in use; the first call may compile it."""
    return default_kernel() is not None
