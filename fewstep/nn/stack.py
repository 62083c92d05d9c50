"""Blocks one after another, and their state: one slot table for all caches of keys and values, beside other layers' states."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from fewstep.core.mixer import Context, State
from fewstep.nn import kernels
from fewstep.nn.blocks import Block
from fewstep.nn.mixers.attention import AttentionState
from fewstep.nn.slots import Slots


@final
class StackState:
    """Per-layer states that move together. A layer that keeps its tokens in slots is held as its bare cache.

    `slots` counts the tokens of the whole stack. On the CPU the caches commit in one call of a kernel.
    """

    def __init__(self, layers: Sequence[State | Tensor], slots: Slots, caches: kernels.Caches | None = None) -> None:
        """`caches`: the kernel's view of the same tensors, if it was made before."""
        self.slots = slots
        self._layers = tuple(layer.cache if isinstance(layer, AttentionState) else layer for layer in layers)
        self._caches = caches

    def layer(self, i: int) -> State:
        """The state of layer i."""
        layer = self._layers[i]
        return AttentionState(layer, self.slots) if isinstance(layer, Tensor) else layer

    @property
    def caches(self) -> kernels.Caches | None:
        """The kernel's view of all layers; None where one of them is not its own."""
        if self._caches is None:
            tensors = [layer for layer in self._layers if isinstance(layer, Tensor) and kernels.Caches.fits(layer)]
            if len(tensors) == len(self._layers):
                self._caches = kernels.Caches(tensors)
        return self._caches

    @property
    def slotted(self) -> bool:
        """Whether every layer keeps its tokens in slots, where those that a rollback dropped can be taken up again."""
        return all(isinstance(layer, Tensor) for layer in self._layers)

    def extended(self, slots: Slots) -> "StackState":
        """After a kernel wrote the nodes that `slots` has beyond this table into the caches."""
        return StackState(self._layers, slots, self._caches)

    def commit(self, path: Tensor, keep: Tensor) -> "StackState":
        slots, caches = self.slots.commit(path, keep), self.caches
        if caches is not None:
            caches.keep(self.slots.base, self.slots.lengths, path, keep)
            return self.extended(slots)
        return self._each(lambda layer: layer.commit(path, keep), slots)

    def rollback(self) -> "StackState":
        if self._caches is not None:
            return self.extended(self.slots.rollback())
        return self._each(lambda layer: layer.rollback(), self.slots.rollback())

    def fork(self, rows: Tensor) -> "StackState":
        return self._each(lambda layer: layer.fork(rows), self.slots.fork(rows))

    def join(self, other: "StackState") -> "StackState":
        layers = [self.layer(i).join(other.layer(i)) for i in range(len(self._layers))]
        return StackState(layers, self.slots.join(other.slots))

    def nbytes(self) -> int:
        return sum(layer.nbytes if isinstance(layer, Tensor) else layer.nbytes() for layer in self._layers)

    def _each(self, change: Callable[[State], State], slots: Slots) -> "StackState":
        return StackState([change(self.layer(i)) for i in range(len(self._layers))], slots)


@final
class Stack(nn.Module):
    """Blocks one after another, named by their numbers."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__()
        listed = list(blocks)
        for i, block in enumerate(listed):
            self.add_module(str(i), block)
        self._count = len(listed)
        self.packed: Any = None  # packed.PackedBlocks of them all: a few tokens pass in one call, where the parts allow it

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(self._count))

    def __getitem__(self, i: int) -> Block:
        return cast(Block, self._modules[str(range(self._count)[i])])

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> StackState:
        layers = [block.init_state(batch, capacity, device=device, dtype=dtype) for block in self]
        return StackState(layers, Slots.empty(batch, capacity, device))

    def extend(
        self, x: Tensor, ctx: Context, state: StackState, layers: range, taps: tuple[str, ...] = ()
    ) -> tuple[Tensor, dict[str, Tensor], StackState]:
        """x [B,T,D] through the blocks `layers`: the output, the tapped residuals "layer.i", and the state.

        A layer left out never sees these nodes, which can only be rolled back.
        """
        hidden: dict[str, Tensor] = {}
        slots = state.slots.extend(ctx.parent, x.shape[1])
        if self.packed is not None and self.packed.takes(x, x.shape[1], ctx, state.caches):
            for first, last in _runs(layers, taps):
                x = self.packed(x, ctx, state.caches, slots, first, last)
                hidden[f"layer.{last - 1}"] = x
            return x, hidden, state.extended(slots)
        new = [state.layer(i) for i in range(len(self))]
        for i in layers:
            x, new[i] = self[i].extend(x, ctx, new[i])
            hidden[f"layer.{i}"] = x
        return x, hidden, StackState(new, slots)


def _runs(layers: range, taps: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """`layers` as runs (first, last + 1) without a gap that end at the tapped ones."""
    first = layers.start
    for i in layers:
        if i + 1 not in layers or f"layer.{i}" in taps:
            yield first, i + 1
            first = i + layers.step
