"""The weights of decoder blocks, checked, and as the kernel of `step.c` sees them. Knows tensors; does not know modules."""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from fewstep.nn.kernels.kernel import DTYPES
from fewstep.nn.kernels.skinny import Packed


class Gain(NamedTuple):
    """An RMSNorm: its float32 `weight` [D], contiguous, and its `eps`."""

    weight: Tensor
    eps: float


@final
class LayerStruct(ctypes.Structure):
    """The struct `layer` of the C files."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("inputs", ctypes.c_long), ("outputs", ctypes.c_long)]


@final
class NormStruct(ctypes.Structure):
    """The struct `norm` of the C files; no weight: no norm."""

    _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_float)]


@final
class BlockStruct(ctypes.Structure):
    """The struct `block` of `step.c`."""

    _fields_ = [
        *((name, LayerStruct) for name in ("qkv", "out", "up", "down")),
        *((name, NormStruct) for name in ("mixer", "mlp", "q", "k")),
        *((name, ctypes.c_long) for name in ("heads", "kv_heads", "head_width", "window")),
        ("gated", ctypes.c_int),
    ]


@final
@dataclass(frozen=True, eq=False, slots=True)
class Parts:
    """The weights of a block of width D: E = head width, H = `heads`, G = `kv_heads`, all layers of one dtype and in panels.

    `qkv` [(H+2G) E, D], `out` [D, H E], `up` [2 hidden (gate first) or hidden, D], `down` [D, hidden]; norms before the mixer
    and before the MLP [D], of queries and keys [E] (None: none). `gated`: SwiGLU, else the exact GELU. `window`: how many tokens
    back a token sees, itself included; None: all.
    """

    qkv: Packed
    out: Packed
    up: Packed
    down: Packed
    mixer_norm: Gain
    mlp_norm: Gain
    q_norm: Gain | None
    k_norm: Gain | None
    heads: int
    kv_heads: int
    gated: bool
    window: int | None = None

    @property
    def head_width(self) -> int:
        return self.qkv.shape[0] // (self.heads + 2 * self.kv_heads)

    def check(self, width: int, dtype: torch.dtype) -> None:
        """Raises ValueError where the parts do not fit together, or blocks of `width` and `dtype`."""
        layers = (self.qkv, self.out, self.up, self.down)
        heads, head_width, hidden = self.heads, self.head_width, self.down.shape[1]
        shapes = (
            ((heads + 2 * self.kv_heads) * head_width, width),
            (width, heads * head_width),
            ((2 if self.gated else 1) * hidden, width),
            (width, hidden),
        )
        gains = [(gain, width) for gain in (self.mixer_norm, self.mlp_norm)]
        gains += [(gain, head_width) for gain in (self.q_norm, self.k_norm) if gain is not None]
        if any(layer.shape != shape for layer, shape in zip(layers, shapes, strict=True)) or heads % self.kv_heads:
            raise ValueError(f"layers have shapes {[layer.shape for layer in layers]}: expected {shapes} for qkv, out, up, down")
        if any(layer.dtype != dtype or dtype not in DTYPES or not layer.panels for layer in layers):
            raise ValueError("layers: expected one dtype, bfloat16 or float32, and panels of the kernel; pack them anew")
        for gain, size in gains:
            if gain.weight.shape != (size,) or gain.weight.dtype != torch.float32 or not gain.weight.is_contiguous():
                raise ValueError(f"a norm's weight is {gain.weight.dtype} {tuple(gain.weight.shape)}: expected float32 ({size},)")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: must be at least 1, or None for all")

    def struct(self) -> BlockStruct:
        """Addresses and sizes for the kernel; it keeps nothing alive."""
        layers = (layer_struct(layer) for layer in (self.qkv, self.out, self.up, self.down))
        norms = (norm_struct(gain) for gain in (self.mixer_norm, self.mlp_norm, self.q_norm, self.k_norm))
        return BlockStruct(*layers, *norms, self.heads, self.kv_heads, self.head_width, self.window or 0, self.gated)


@final
class Ends:
    """What stands before and behind a stack of width D: an embedding, the last norm and the unembedding.

    Args:
        table: [V,D], the embedding, contiguous.
        norm: over D.
        head: [V,D], the unembedding, in panels, of the table's dtype.

    Raises: ValueError where they do not fit together.
    """

    def __init__(self, table: Tensor, norm: Gain, head: Packed) -> None:
        self.table, self.norm, self.head = table, norm, head
        self.dtype, (self.vocab, self.width) = head.dtype, head.shape
        same = table.shape == head.shape and table.dtype == head.dtype and norm.weight.shape == (self.width,)
        if not same or not table.is_contiguous() or not head.panels:
            raise ValueError(
                f"table is {tuple(table.shape)} {table.dtype}, head {head.shape} {head.dtype}, norm {tuple(norm.weight.shape)}: "
                "expected the same [V,D] and dtype, a norm over D, and panels of the kernel"
            )
        self._structs = norm_struct(norm), layer_struct(head)
        self.addresses = tuple(ctypes.addressof(struct) for struct in self._structs)

    def __reduce__(self) -> tuple[type["Ends"], tuple[Tensor, Gain, Packed]]:
        return Ends, (self.table, self.norm, self.head)  # a copy has weights and addresses of its own


def layer_struct(packed: Packed) -> LayerStruct:
    """Addresses and sizes for a kernel; it keeps nothing alive."""
    bias = None if packed.bias is None else packed.bias.data_ptr()
    return LayerStruct(packed.data.data_ptr(), bias, packed.shape[1], packed.shape[0])


def norm_struct(gain: Gain | None) -> NormStruct:
    """Address and epsilon for a kernel; it keeps nothing alive."""
    return NormStruct(None, 0.0) if gain is None else NormStruct(gain.weight.data_ptr(), gain.eps)
