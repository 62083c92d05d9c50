"""Modules packed for decoding on a CPU: linear layers, norms, and blocks whose step is one call. This file knows no model."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.core.mixer import Blocks, Causal, Context, Window
from fewstep.core.position import NoPosition
from fewstep.nn import kernels
from fewstep.nn.blocks import Block
from fewstep.nn.heads import SequentialHeads, SequentialModule
from fewstep.nn.mixers.attention import FEW, Attention, AttentionState, few
from fewstep.nn.position import Rope
from fewstep.nn.slots import Slots
from fewstep.nn.stack import Stack

_MASKS = Causal | Window | Blocks


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
class PackedBlocks(PackedModule):
    """`extend` of a few tokens through blocks, one after another, as one call of the kernel.

    It shares the weights of the blocks' packed modules. `ctx.shared` key: ("scene", slot table), the kernel's
    views of the call.
    """

    def __init__(self, parts: Sequence[kernels.Parts], rope: Rope | None, nbytes: int) -> None:
        """`rope` turns the queries and keys of every block (None: nothing does)."""
        super().__init__()
        self.parts = tuple(parts)
        self.steps, self._nbytes = kernels.Steps(self.parts), nbytes
        self._rope = (rope,)  # in a tuple: the module that owns it is another

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def rope(self) -> Rope | None:
        """What turns queries and keys."""
        return self._rope[0]

    def takes(self, x: Tensor, count: int, ctx: Context, caches: kernels.Caches | None) -> bool:
        """Whether `count` tokens a row with activations like x are for the kernel. Depends on no other row of the batch."""
        fits = caches is not None and x.dtype == self.steps.dtype == caches.dtype and isinstance(ctx.mask, _MASKS)
        apart = count <= FEW or not isinstance(ctx.mask, Blocks)  # a block cannot be cut: its tokens see those behind them
        return fits and apart and _ours(x, count) and not torch.compiler.is_compiling()

    def forward(
        self, x: Tensor, ctx: Context, caches: kernels.Caches, slots: Slots, first: int = 0, last: int | None = None
    ) -> Tensor:
        """x [B,T,D], the last pending nodes of `slots`, through blocks first .. last-1; keys and values go to `caches`."""
        scenes = self.scenes(x, ctx, slots)
        if len(scenes) == 1:
            return self.steps(x, caches, scenes[0], first, last)
        pieces = x.split(scenes[0].count, 1)
        return torch.cat([self.steps(piece, caches, scene, first, last) for piece, scene in zip(pieces, scenes, strict=True)], 1)

    def extend(self, x: Tensor, ctx: Context, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """`Block.extend` where the blocks are one."""
        state = state.reserve(ctx.parent, x.shape[1])
        assert state.caches is not None
        return self(x, ctx, state.caches, state.slots), state

    def scenes(self, x: Tensor, ctx: Context, slots: Slots) -> list[kernels.Scene]:
        """The kernel's views of a call on x [B,T,...], or of its pieces where many tokens pass."""
        key = ("scene", slots)
        if key in ctx.shared:
            scenes: list[kernels.Scene] = ctx.shared[key]
            return scenes
        (batch, count), positions, parent = x.shape[:2], ctx.positions, slots.parent
        turn = None
        if self.rope is not None:
            turn = self.rope.rows(slots.end if positions is None else int(positions.max()) + 1, x.device, self.steps.dtype)
        assert isinstance(ctx.mask, _MASKS)
        piece = count if count <= FEW else max(1, FEW // batch)
        scenes = []
        for start in range(0, count, piece):
            size = min(piece, count - start)
            pending = slots.pending - count + start + size
            tree = None if parent is None else parent[:, :pending]
            place = None if positions is None else positions[:, start : start + size]
            scenes.append(kernels.Scene(size, slots.base, pending, slots.lengths, tree, place, turn, ctx.mask))
        ctx.shared[key] = scenes
        return scenes


@final
class PackedCall(PackedModule):
    """A few tokens from their embeddings to their scores as one call of the kernel; it shares the packed modules' weights."""

    def __init__(self, blocks: PackedBlocks, ends: kernels.Ends, nbytes: int) -> None:
        super().__init__()
        self.ends, self._blocks, self._nbytes = ends, (blocks,), nbytes  # in a tuple: the module that owns it is another

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def takes(self, count: int, ctx: Context, caches: kernels.Caches | None) -> bool:
        """Whether the call is one for the kernel. Depends on no other row of the batch."""
        return count <= FEW and self._blocks[0].takes(self.ends.table, count, ctx, caches)

    def forward(self, tokens: Tensor, ctx: Context, caches: kernels.Caches, slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
        """As `kernels.Steps.scores` for tokens [B,T], the last pending nodes of `slots`."""
        blocks = self._blocks[0]
        (scene,) = blocks.scenes(tokens, ctx, slots)
        return blocks.steps.scores(tokens, caches, scene, self.ends)


@final
class PackedJoin(PackedModule):
    """`SequentialModule.join` of a few positions as one call of the kernel; it shares the weights of the packed modules."""

    def __init__(self, join: kernels.Join, nbytes: int) -> None:
        super().__init__()
        self.join, self._nbytes = join, nbytes

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def takes(self, x: Tensor) -> bool:
        """Whether the call is one for the kernel. Depends on no other row of the batch."""
        return x.dtype == self.join.layer.dtype and _ours(x, x.shape[1]) and not torch.compiler.is_compiling()

    def forward(self, embedded: Tensor, hidden: Tensor, reads: Tensor | None) -> Tensor:
        return self.join(embedded, hidden, reads)


@final
class PackedModules(PackedModule):
    """A greedy draft with sequential modules as one call of the kernel; it shares the weights of the packed modules."""

    def __init__(self, modules: kernels.Modules, rope: Rope | None, nbytes: int) -> None:
        super().__init__()
        self.draft, self._rope, self._nbytes = modules, (rope,), nbytes  # in a tuple: the module that owns it is another

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def takes(self, x: Tensor) -> bool:
        """Whether the call is one for the kernel. Depends on no other row of the batch."""
        return x.dtype == self.draft.dtype and few(x, x.shape[1]) and not torch.compiler.is_compiling()

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        count: Tensor,
        states: Sequence[AttentionState],
        carry: Tensor,
        branching: tuple[int, ...],
        budget: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `kernels.Modules`, over the modules' `states`."""
        seats = []
        for state in states:
            assert state.caches is not None, "it was made where kernels are in use"
            seats.append(kernels.Seat(state.caches, state.slots.lengths, state.slots.base))
        turn, rope = None, self._rope[0]
        if rope is not None:
            room = hidden.shape[1] + len(branching)
            turn = rope.rows(max(seat.base for seat in seats) + room, hidden.device, hidden.dtype)
        return self.draft(kernels.Certain(hidden, tokens, count, carry), seats, branching, budget, turn)


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
    for part in list(module.modules()):
        if isinstance(part, Block):
            part.packed = _packed_blocks([part])
    for part in list(module.modules()):
        if isinstance(part, Stack):
            part.packed = _packed_blocks(list(part))
        elif isinstance(part, SequentialModule):
            part.packed = _packed_join(part)
    return module


def _ours(x: Tensor, count: int) -> bool:
    """Whether `count` tokens with activations like x pass through the kernels: a few always, many where these are the faster."""
    return few(x, min(count, FEW) if kernels.outpaces(x.dtype) else count)


def _packed(module: nn.Module, shared: set[int]) -> PackedModule | None:
    if not isinstance(module, nn.Linear | nn.RMSNorm) or module.weight is None:
        return None
    weight = module.weight
    if not weight.is_cpu or weight.dtype not in kernels.DTYPES:
        return None
    if isinstance(module, nn.Linear):
        return PackedLinear(module, saved=id(weight) not in shared)
    return PackedNorm(weight, module.eps) if weight.ndim == 1 and module.eps is not None else None


def _packed_blocks(blocks: Sequence[nn.Module]) -> PackedBlocks | None:
    """The blocks' one-call step, None where the kernel cannot take a part of it."""
    listed = [block for block in blocks if isinstance(block, Block)]
    parts = [part for part in map(_parts, listed) if part is not None]
    if len(parts) < len(blocks):
        return None
    kinds = {(part.qkv.dtype, part.qkv.shape[1], id(block.mixer.position)) for part, block in zip(parts, listed, strict=True)}
    if len(kinds) != 1:
        return None
    position = listed[0].mixer.position
    read = [part.nbytes for block in blocks for part in block.modules() if isinstance(part, PackedLinear | PackedNorm)]
    return PackedBlocks(parts, position if isinstance(position, Rope) else None, sum(read))


def _packed_join(module: SequentialModule) -> PackedJoin | None:
    layer, first, second = module.get_submodule("proj"), module.get_submodule("embed_norm"), module.get_submodule("hidden_norm")
    if isinstance(layer, PackedLinear) and isinstance(first, PackedNorm) and isinstance(second, PackedNorm):
        read = layer.nbytes + first.nbytes + second.nbytes
        return PackedJoin(kernels.Join(layer.packed, first.gain, second.gain), read)
    return None


def packed_call(blocks: PackedBlocks | None, embedding: nn.Embedding, norm: nn.Module, head: nn.Module) -> PackedCall | None:
    """The call between the ends of a packed model; None where no kernel can."""
    table = embedding.weight.detach()
    if blocks is None or not isinstance(norm, PackedNorm) or not isinstance(head, PackedLinear) or not head.packed.panels:
        return None
    if table.dtype != head.packed.dtype or not table.is_contiguous() or head.bias is not None:
        return None
    return PackedCall(blocks, kernels.Ends(table, norm.gain, head.packed), blocks.nbytes + norm.nbytes + head.nbytes)


def packed_modules(heads: SequentialHeads, depth: int, embedding: nn.Module, head: nn.Module) -> PackedModules | None:
    """The call that drafts with the first `depth` modules between the ends of their packed model; None where no kernel can."""
    stages = [heads.module(k) for k in range(1, depth + 1)]
    made = [
        kernels.Module(stage.packed.join, stage.block.packed.steps, stage.norm.gain)
        for stage in stages
        if stage.packed is not None and stage.block.packed is not None and isinstance(stage.norm, PackedNorm)
    ]
    if len(made) < len(stages) or not isinstance(embedding, nn.Embedding) or not isinstance(head, PackedLinear):
        return None
    table = embedding.weight.detach()
    if table.dtype != head.packed.dtype or not table.is_contiguous():
        return None
    read = sum(stage.packed.nbytes + stage.block.packed.nbytes + head.nbytes for stage in stages)
    norms = sum(stage.norm.nbytes for stage in stages if isinstance(stage.norm, PackedNorm))
    return PackedModules(kernels.Modules(made, table, head.packed), stages[0].block.packed.rope, read + norms)


def _parts(block: Block) -> kernels.Parts | None:
    mixer, mlp = block.mixer, block.mlp
    if mlp is None or not isinstance(mixer, Attention):
        return None
    if not (isinstance(mixer.position, Rope) or type(mixer.position) is NoPosition):
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
    window = mixer.config.window
    return kernels.Parts(
        qkv, out, up, down, before_mixer, before_mlp, q_norm, k_norm, mixer.heads, mixer.kv_heads, mlp.gated, window
    )
