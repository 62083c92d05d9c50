"""Kernels that make a few rows cost one: linear layers packed once, attention of few queries over a cache, whole stacks' steps.

They are C, built by the system's compiler at first use; without a compiler the same calls run on ATen (a stack's step: on the
modules it stands for).
"""

from fewstep.nn.kernels.attention import attend
from fewstep.nn.kernels.ends import Join, argmax
from fewstep.nn.kernels.kernel import DTYPES, available, outpaces
from fewstep.nn.kernels.modules import Certain, Module, Modules, Seat
from fewstep.nn.kernels.norm import rms_norm
from fewstep.nn.kernels.parts import Ends, Gain, Parts
from fewstep.nn.kernels.scan import selective_scan, selective_tree
from fewstep.nn.kernels.skinny import Packed, linear, pack
from fewstep.nn.kernels.step import Caches, Scene, Steps
from fewstep.nn.kernels.wkv import wkv, wkv_after, wkv_empty, wkv_fresh, wkv_tree

__all__ = [
    "DTYPES",
    "Caches",
    "Certain",
    "Ends",
    "Gain",
    "Join",
    "Module",
    "Modules",
    "Packed",
    "Parts",
    "Scene",
    "Seat",
    "Steps",
    "argmax",
    "attend",
    "available",
    "linear",
    "outpaces",
    "pack",
    "rms_norm",
    "selective_scan",
    "selective_tree",
    "wkv",
    "wkv_after",
    "wkv_empty",
    "wkv_fresh",
    "wkv_tree",
]
