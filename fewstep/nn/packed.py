"""Modules packed for decoding on a CPU: linear layers, norms, and blocks whose step is one call. This file knows no model."""

from abc import abstractmethod
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.core.mixer import Context
from fewstep.core.position import NoPosition
from fewstep.nn import kernels
from fewstep.nn.blocks import Block
from fewstep.nn.mixers.attention import Attention, AttentionState, few
from fewstep.nn.position import Rope


class PackedModule(nn.Module):
    """A module that keeps its weights as the kernels read them, outside of `parameters`."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the weights that one call reads, as `state_dict` has them."""


@final
class PackedLinear(PackedModule):
    """A linear layer for inference that reads its packed weight once for a few rows.

    The weight lives in packed form only; `weight` and `state_dict` unpack a copy. Raises ValueError when a gradient is asked for.
    """

    def __init__(self, linear: nn.Linear, saved: bool = True) -> None:
        """`saved`: whether `state_dict` has the weight, i.e. whether no other module saves it (tied embeddings)."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = kernels.pack(linear.weight, linear.bias)
        self._saved = saved

    @property
    def weight(self) -> Tensor:
        """[out, in], unpacked anew."""
        return self.packed.unpack()

    @property
    def bias(self) -> Tensor | None:
        """[out] in the weight's dtype."""
        return None if self.packed.bias is None else self.packed.bias.to(self.packed.dtype)

    @property
    def nbytes(self) -> int:
        inputs = self.in_features + (self.packed.bias is not None)
        return inputs * self.out_features * self.packed.dtype.itemsize

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("packed weights have no gradient; load the model with packed=False to train it")
        return kernels.linear(x, self.packed)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._saved:
            destination[f"{prefix}weight"] = self.weight
        if (bias := self.bias) is not None:
            destination[f"{prefix}bias"] = bias


@final
class PackedNorm(PackedModule):
    """An RMSNorm for inference over the last dimension. Raises ValueError when a gradient is asked for."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.gain = kernels.Gain(weight.detach().to(torch.float32, copy=True), eps)
        self._dtype = weight.dtype

    @property
    def weight(self) -> Tensor:
        """[D], in the dtype it came in."""
        return self.gain.weight.to(self._dtype)

    @property
    def nbytes(self) -> int:
        return self.gain.weight.numel() * self._dtype.itemsize

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("packed weights have no gradient; load the model with packed=False to train it")
        return kernels.rms_norm(x, *self.gain)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight


@final
class PackedBlock(PackedModule):
    """`Block.extend` of a few tokens as one call of the kernel; it shares the weights of the block's packed modules.

    `ctx.shared` key: ("block", position, slots in use, id of the mask), the kernel's view of the call.
    """

    def __init__(self, parts: kernels.Parts, nbytes: int) -> None:
        super().__init__()
        self._step, self._nbytes = kernels.BlockStep(parts), nbytes

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def takes(self, x: Tensor, state: AttentionState) -> bool:
        """Whether the call is one for the kernel. Depends on no other row of the batch."""
        dtype, cache = self._step.dtype, state.cache
        fits = x.dtype == dtype and cache.dtype == dtype and not cache.requires_grad
        return fits and few(x, x.shape[1]) and not torch.compiler.is_compiling()

    def forward(self, x: Tensor, ctx: Context, state: AttentionState, mixer: Attention) -> tuple[Tensor, AttentionState]:
        state, visible = mixer.reserve(ctx, state, x.shape[1])
        key = ("block", mixer.position, state.slots.end, id(visible))
        if key not in ctx.shared:
            position, (batch, count, _) = mixer.position, x.shape
            turn = position.shared_table(ctx.positions, x.dtype, ctx.shared) if isinstance(position, Rope) else None
            ctx.shared[key] = kernels.Scene(batch, count, state.slots.end, visible, turn)
        return self._step(x, state.cache, ctx.shared[key]), state


def pack(module: nn.Module) -> nn.Module:
    """`module` with every linear layer, RMSNorm and block that the kernels take packed, in place; unchanged without kernels.

    That is what lies on the CPU in bfloat16 or float32; of blocks, those of attention with rotary or no positions.

    Cost: one pass over the weights. The plain weights are freed, so the memory stays about the same.
    """
    if not kernels.available():
        return module
    shared = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if (packed := _packed(child, shared)) is not None:
                setattr(parent, name, packed)
    for block in list(module.modules()):
        if isinstance(block, Block):
            block.packed = _packed_block(block)
    return module


def _packed(module: nn.Module, shared: set[int]) -> PackedModule | None:
    if not isinstance(module, nn.Linear | nn.RMSNorm) or module.weight is None:
        return None
    weight = module.weight
    if not weight.is_cpu or weight.dtype not in kernels.DTYPES:
        return None
    if isinstance(module, nn.Linear):
        return PackedLinear(module, saved=id(weight) not in shared)
    return PackedNorm(weight, module.eps) if weight.ndim == 1 and module.eps is not None else None


def _packed_block(block: Block) -> PackedBlock | None:
    """The block's one-call step, None where the kernel cannot take a part of it."""
    mixer, mlp = block.mixer, block.mlp
    if not isinstance(mixer, Attention) or not (isinstance(mixer.position, Rope) or type(mixer.position) is NoPosition):
        return None
    linears: tuple[nn.Module, ...] = (mixer.qkv, mixer.out, mlp.up, mlp.down)
    norms: tuple[nn.Module | None, ...] = (block.mixer_norm, block.mlp_norm, mixer.q_norm, mixer.k_norm)
    layers = [layer for layer in linears if isinstance(layer, PackedLinear)]
    gains = [norm.gain if isinstance(norm, PackedNorm) else None for norm in norms]
    plain = any(norm is not None and gain is None for norm, gain in zip(norms, gains, strict=True))
    if plain or len(layers) < len(linears) or len({layer.packed.dtype for layer in layers}) > 1:
        return None
    qkv, out, up, down = (layer.packed for layer in layers)
    before_mixer, before_mlp, q_norm, k_norm = gains
    assert before_mixer is not None and before_mlp is not None
    heads, kv_heads = mixer.heads, mixer.kv_heads
    parts = kernels.Parts(qkv, out, up, down, before_mixer, before_mlp, q_norm, k_norm, heads, kv_heads, mlp.gated)
    read = [part.nbytes for part in (*linears, *norms) if isinstance(part, PackedModule)]
    return PackedBlock(parts, sum(read))
