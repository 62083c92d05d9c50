"""Kernels that make a few rows cost one: linear layers packed once, attention of few queries over a cache, a whole block's step.

They are C, built by the system's compiler at first use; without a compiler the same calls run on ATen (a block's step: on the
modules it stands for).
"""

from fewstep.nn.kernels.attention import attend
from fewstep.nn.kernels.block import BlockStep, Gain, Parts, Scene
from fewstep.nn.kernels.kernel import DTYPES, available
from fewstep.nn.kernels.norm import rms_norm
from fewstep.nn.kernels.skinny import Packed, linear, pack

__all__ = ["DTYPES", "BlockStep", "Gain", "Packed", "Parts", "Scene", "attend", "available", "linear", "pack", "rms_norm"]
