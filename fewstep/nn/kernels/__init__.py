"""Kernels that make a few rows cost one: linear layers packed once, and attention of few queries over a cache.

They are C, built by the system's compiler at first use; without a compiler the same calls run on ATen.
"""

from fewstep.nn.kernels.attention import attend
from fewstep.nn.kernels.kernel import DTYPES, available
from fewstep.nn.kernels.skinny import Packed, linear, pack

__all__ = ["DTYPES", "Packed", "attend", "available", "linear", "pack"]
