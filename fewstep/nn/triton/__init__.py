"""Kernels in Triton for CUDA devices: flash attention, linear attention with decays chunk by chunk, the selective scan.

Whoever owns the work asks `fused` for them and, where that gives None, does it with PyTorch's operators: its kernel's twin.
Triton is imported when a call on such a device first asks; PyTorch's builds for CUDA bring it along.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, final

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Pair = tuple[Tensor, Tensor]


@final
class Kernels(NamedTuple):
    """Each takes its twin's arguments and checks nothing."""

    flash_attention: Callable[..., Pair]
    sweep: Callable[..., Pair]
    selective_scan: Callable[..., Pair]


def fused(*tensors: Tensor) -> Kernels | None:
    """The kernels, if they take `tensors`: on a CUDA device, all of one dtype, at most 32 bits; None where a twin must do."""
    device, dtype = tensors[0].device, tensors[0].dtype
    if device.type != "cuda" or dtype not in DTYPES or any(x.dtype != dtype or x.device != device for x in tensors):
        return None
    return load()


@cache
def load() -> Kernels | None:
    """The kernels unless $FEWSTEP_KERNELS is "off". Without Triton there are none, which is a warning, given once."""
    if os.environ.get("FEWSTEP_KERNELS") == "off":
        return None
    try:
        from fewstep.nn.triton.decay import sweep
        from fewstep.nn.triton.flash import flash_attention
        from fewstep.nn.triton.scan import selective_scan
    except ImportError as error:
        notice = f"fewstep runs on PyTorch's own operators, slower here: {error}; install fewstep[gpu]"
        warnings.warn(f"{notice} (FEWSTEP_KERNELS=off silences this)", RuntimeWarning, stacklevel=2)
        return None
    return Kernels(flash_attention, sweep, selective_scan)
