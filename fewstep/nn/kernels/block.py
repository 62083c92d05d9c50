"""A decoder block's step over a cache as one call: what PyTorch does in some 25 operators, whose dispatch outlasts their work.

Knows tensors and the structs of `block.c`. Does not know modules, trees or positions, and has no gradient.
"""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from fewstep.nn.kernels.kernel import DTYPES, default_kernel
from fewstep.nn.kernels.skinny import Packed


class Gain(NamedTuple):
    """An RMSNorm: its float32 `weight` [D], contiguous, and its `eps`."""

    weight: Tensor
    eps: float


@final
@dataclass(frozen=True, eq=False, slots=True)
class Parts:
    """The weights of a block of width D: E = head width, H = `heads`, G = `kv_heads`, all layers of one dtype and in panels.

    `qkv` [(H+2G) E, D], `out` [D, H E], `up` [2 hidden (gate first) or hidden, D], `down` [D, hidden]; norms before the mixer
    and before the MLP [D], of queries and keys [E] (None: none). `gated`: SwiGLU, else the exact GELU.
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


@final
class _Layer(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("inputs", ctypes.c_long), ("outputs", ctypes.c_long)]


@final
class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_float)]


@final
class _Block(ctypes.Structure):
    _fields_ = [
        *((name, _Layer) for name in ("qkv", "out", "up", "down")),
        *((name, _Norm) for name in ("mixer", "mlp", "q", "k")),
        *((name, ctypes.c_long) for name in ("heads", "kv_heads", "head_width")),
        *((name, ctypes.c_int) for name in ("gated", "bf16")),
    ]


@final
class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("batch", "queries", "start")),
        ("visible", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("visible_batch", "visible_row")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_long) for name in ("turn_batch", "turn_row")),
        ("threads", ctypes.c_int),
    ]


@final
class Scene:
    """What the blocks of one call share.

    Args:
        batch: rows B.
        count: new tokens T a row.
        slots: slots in use, of which the new tokens take the last T.
        visible: bool [B or 1,1,T,slots]: the slots that each token sees; None: all.
        turn: the cosines and signed sines [B or 1,1,T,E] of the rotation of queries and keys; None: none.

    Raises: ValueError for other shapes, dtypes, strides or devices.
    """

    __slots__ = ("_call", "_kept", "address", "batch", "count", "slots", "turned")

    def __init__(self, batch: int, count: int, slots: int, visible: Tensor | None, turn: tuple[Tensor, Tensor] | None) -> None:
        self.batch, self.count, self.slots = batch, count, slots
        self.turned = None if turn is None else (turn[0].shape[-1], turn[0].dtype)
        self._kept = (visible, turn)
        absent: tuple[int | None, int, int] = (None, 0, 0)
        mask = absent if visible is None else self._laid_out("visible", visible, slots, torch.bool)
        cos = sin = absent
        if turn is not None:
            width, dtype = turn[0].shape[-1], turn[0].dtype
            cos, sin = (self._laid_out(name, x, width, dtype) for name, x in zip(("cos", "sin"), turn, strict=True))
            if width % 2 or cos[1:] != sin[1:]:
                raise ValueError(f"cos and sin have width {width}, strides {cos[1:]} and {sin[1:]}: expected even, and the same")
        if not 0 <= count <= slots:
            raise ValueError(f"count={count}: must lie in 0 .. slots={slots}, which hold the new tokens too")
        self._call = _Call(batch, count, slots - count, *mask, cos[0], *sin, torch.get_num_threads())
        self.address = ctypes.addressof(self._call)

    def _laid_out(self, name: str, x: Tensor, width: int, dtype: torch.dtype) -> tuple[int | None, int, int]:
        """Address and strides over rows and tokens of x [B or 1,1,T,width]; one row serves all."""
        if x.shape not in ((self.batch, 1, self.count, width), (1, 1, self.count, width)) or x.dtype != dtype or not x.is_cpu:
            wanted = f"[{self.batch} or 1,1,{self.count},{width}] {dtype} on the CPU"
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}: expected {wanted}")
        row, _, token, element = x.stride()
        if element != 1:
            raise ValueError(f"{name} has strides {x.stride()}: the last must be 1; make it contiguous")
        return x.data_ptr(), row if x.shape[0] > 1 else 0, token


@final
class BlockStep:
    """x + attention(norm(x)), then x + MLP(norm(x)), over a cache, in one call of the kernel.

    Args:
        parts: the weights, kept alive here.

    Raises: ValueError where shapes, dtypes or layouts do not fit together, or there is no kernel.

    Differs: float32 within a norm, a turn and an activation, each rounded once to x's dtype, where PyTorch's operators round
        after every step.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.dtype, self.width = parts.qkv.dtype, parts.qkv.shape[1]
        self.head_width = parts.qkv.shape[0] // (parts.heads + 2 * parts.kv_heads)
        self._sides = 2 * parts.kv_heads
        self._check(parts)
        self._block = _Block(
            *(_layer(layer) for layer in (parts.qkv, parts.out, parts.up, parts.down)),
            *(_norm(gain) for gain in (parts.mixer_norm, parts.mlp_norm, parts.q_norm, parts.k_norm)),
            parts.heads,
            parts.kv_heads,
            self.head_width,
            parts.gated,
            self.dtype == torch.bfloat16,
        )
        self._address = ctypes.addressof(self._block)

    def __reduce__(self) -> tuple[type["BlockStep"], tuple[Parts]]:
        return BlockStep, (self.parts,)  # a copy has weights and addresses of its own

    def __call__(self, x: Tensor, cache: Tensor, scene: Scene) -> Tensor:
        """The block's output for new tokens, whose keys and values are written to the last of the slots in use.

        A token's result, and what it leaves in the cache, are bitwise the same whatever tokens, rows, hidden slots and threads
        share the call.

        Args:
            x: [B,T,D] in the weights' dtype, on the CPU.
            cache: [B,2G,S,E] (keys first) in that dtype, contiguous; written in place.
            scene: the slots, and what is seen of them.

        Returns: [B,T,D].

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, or a gradient is wanted; nothing is written.
            MemoryError: no memory for the activations; the new slots may have been written.

        Cost: the weights' and the visible keys' bytes while rows are few.
        """
        kernel = default_kernel()
        if kernel is None or self._unfit(x, cache, scene):
            self._refuse(x, cache, scene)
        assert kernel is not None
        x = x.contiguous()
        y = torch.empty_like(x)
        if kernel.block_step(self._address, scene.address, x.data_ptr(), y.data_ptr(), cache.data_ptr(), cache.shape[2]):
            raise MemoryError(f"no memory for the activations of {scene.batch * scene.count} tokens: feed fewer at a time")
        return y

    def _check(self, parts: Parts) -> None:
        layers, width, inner = (parts.qkv, parts.out, parts.up, parts.down), self.width, parts.heads * self.head_width
        hidden = parts.down.shape[1]
        shapes = (
            ((parts.heads + 2 * parts.kv_heads) * self.head_width, width),
            (width, inner),
            ((2 if parts.gated else 1) * hidden, width),
            (width, hidden),
        )
        gains = [(gain, width) for gain in (parts.mixer_norm, parts.mlp_norm)]
        gains += [(gain, self.head_width) for gain in (parts.q_norm, parts.k_norm) if gain is not None]
        if any(layer.shape != shape for layer, shape in zip(layers, shapes, strict=True)) or parts.heads % parts.kv_heads:
            raise ValueError(f"layers have shapes {[layer.shape for layer in layers]}: expected {shapes} for qkv, out, up, down")
        if any(layer.dtype != self.dtype or self.dtype not in DTYPES or not layer.panels for layer in layers):
            raise ValueError("layers: expected one dtype, bfloat16 or float32, and panels of the kernel; pack them anew")
        for gain, size in gains:
            if gain.weight.shape != (size,) or gain.weight.dtype != torch.float32 or not gain.weight.is_contiguous():
                raise ValueError(f"a norm's weight is {gain.weight.dtype} {tuple(gain.weight.shape)}: expected float32 ({size},)")

    def _unfit(self, x: Tensor, cache: Tensor, scene: Scene) -> bool:
        dtype, (rows, sides, capacity, head_width) = self.dtype, cache.shape
        if x.shape != (scene.batch, scene.count, self.width) or x.dtype != dtype or not x.is_cpu:
            return True
        if rows != scene.batch or sides != self._sides or head_width != self.head_width or capacity < scene.slots:
            return True
        if cache.dtype != dtype or not cache.is_cpu or not cache.is_contiguous():
            return True
        if scene.turned is not None and scene.turned != (head_width, dtype):
            return True
        return torch.is_grad_enabled() and (x.requires_grad or cache.requires_grad)

    def _refuse(self, x: Tensor, cache: Tensor, scene: Scene) -> None:
        if default_kernel() is None:
            raise ValueError("kernels are off: a block steps by its modules then; unset FEWSTEP_KERNELS or load the model anew")
        if torch.is_grad_enabled() and (x.requires_grad or cache.requires_grad):
            raise ValueError("x or cache requires a gradient, which this step does not have: call it under torch.no_grad()")
        if scene.turned is not None and scene.turned != (self.head_width, self.dtype):
            raise ValueError(f"turn has width and dtype {scene.turned}: expected {self.head_width} and {self.dtype}")
        raise ValueError(
            f"x and cache are {tuple(x.shape)} {x.dtype} on {x.device}, {tuple(cache.shape)} {cache.dtype} on {cache.device}: "
            f"expected [{scene.batch},{scene.count},{self.width}] and a contiguous [{scene.batch},{self._sides},"
            f"{scene.slots} or more,{self.head_width}], {self.dtype} on the CPU"
        )


def _layer(packed: Packed) -> _Layer:
    bias = None if packed.bias is None else packed.bias.data_ptr()
    return _Layer(packed.data.data_ptr(), bias, packed.shape[1], packed.shape[0])


def _norm(gain: Gain | None) -> _Norm:
    return _Norm(None, 0.0) if gain is None else _Norm(gain.weight.data_ptr(), gain.eps)
