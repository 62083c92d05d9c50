"""Kernels that make a few rows cost one: `pack` a linear layer once, then `linear`.

The kernel is C, built by the system's compiler at first use; without a compiler the same calls run on ATen.
"""

from fewstep.nn.kernels.skinny import Packed, available, linear, pack

__all__ = ["Packed", "available", "linear", "pack"]
