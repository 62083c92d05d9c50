"""A greedy draft with sequential modules as one call: some thirty operators a module, whose dispatch outlasts their work.

Knows tensors and the structs of `modules.c`. Does not know modules, drafters or slot tables, and has no gradient.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, final

import torch
from torch import Tensor

from fewstep.nn.kernels.ends import Join
from fewstep.nn.kernels.kernel import default_kernel
from fewstep.nn.kernels.parts import Gain, LayerStruct, NormStruct, layer_struct, norm_struct
from fewstep.nn.kernels.skinny import Packed
from fewstep.nn.kernels.step import Caches, Steps


@final
class Module(NamedTuple):
    """A draft module: what it reads, its one block, and the norm before the unembedding."""

    join: Join
    block: Steps
    norm: Gain


@final
@dataclass(frozen=True, eq=False, slots=True)
class Seat:
    """Where a module stands: its cache, the committed tokens `lengths` [B] int64 there, and the first free slot `base`."""

    caches: Caches
    lengths: Tensor
    base: int


@final
class Certain(NamedTuple):
    """What is known before a draft: the activations `hidden` [B,W,D] that the first module reads, of which the last `real` [B]
    of a row are; the tokens that follow them, the tree's root last, int64 [B,W]; and `carry` [modules - 1,B,1,D], what each
    module but the last made of the position before them."""

    hidden: Tensor
    tokens: Tensor
    real: Tensor
    carry: Tensor


@final
class _Module(ctypes.Structure):
    _fields_ = [*((name, NormStruct) for name in ("embed", "hidden", "last")), ("join", LayerStruct), ("block", ctypes.c_void_p)]


@final
class _Seat(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cache", "lengths")),
        *((name, ctypes.c_long) for name in ("base", "slots")),
    ]


@final
class _Draft(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("batch", "certain", "width", "depth", "nodes")),
        ("table", ctypes.c_void_p),
        ("head", LayerStruct),
        *((name, ctypes.c_void_p) for name in ("hidden", "tokens", "count", "carry", "budget", "branching", "cos", "sin")),
        ("angles", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("drafted", "parent", "carries")),
        *((name, ctypes.c_int) for name in ("bf16", "threads")),
    ]


@final
class Modules:
    """Sequential draft modules that share an embedding and an unembedding.

    Args:
        modules: in order, each of width D and in one dtype.
        table: [V,D], the embedding, contiguous in that dtype.
        head: [V,D], the unembedding, in panels.

    Raises: ValueError where they do not fit together.
    """

    def __init__(self, modules: Sequence[Module], table: Tensor, head: Packed) -> None:
        self.modules, self.table, self.head = tuple(modules), table, head
        self.dtype, (self.vocab, self.width) = head.dtype, head.shape
        fits = all(
            module.join.layer.shape == (self.width, 2 * self.width)
            and module.block.width == self.width
            and module.join.layer.dtype == module.block.dtype == self.dtype
            and len(module.block) == 1
            for module in self.modules
        )
        if not fits or table.shape != head.shape or table.dtype != head.dtype or not table.is_contiguous() or not head.panels:
            raise ValueError(
                f"table is {tuple(table.shape)} {table.dtype}, head {head.shape} {head.dtype}: expected the same, and modules of "
                "their width and dtype, one block each, in panels"
            )
        self._head = layer_struct(head)
        self._modules = (_Module * len(self.modules))(*(_module(module) for module in self.modules))

    def __reduce__(self) -> tuple[type["Modules"], tuple[tuple[Module, ...], Tensor, Packed]]:
        return Modules, (self.modules, self.table, self.head)  # a copy has weights and addresses of its own

    def __call__(
        self,
        certain: Certain,
        seats: Sequence[Seat],
        branching: tuple[int, ...],
        budget: Tensor,
        turn: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tree that the modules draft greedily, and the next call's `carry`.

        Args:
            certain: what is known before.
            seats: of the modules used; their caches get the new keys and values behind `base`, W first, then the drafted.
            branching: children of each node, level by level; as many levels as seats.
            budget: int64 [B]; nodes at or beyond it are padding.
            turn: cosines and signed sines [R,E] by position; None: nothing turns.

        Returns: tokens [B,N] and parents [B,N] as in `core.mixer.Tree`, breadth first, siblings by likelihood; [modules-1,B,1,D].

        Raises: ValueError for shapes, dtypes or tokens that do not fit; MemoryError where memory is lacking.
        Cost: the modules' and per module the unembedding's bytes, while rows are few.
        """
        kernel, (batch, width, _) = default_kernel(), certain.hidden.shape
        nodes = level = 1
        for branch in branching:
            nodes += (level := level * branch)
        if kernel is None or not self._fit(certain, budget, seats, branching, width - 1 + nodes):
            shapes = [tuple(x.shape) for x in certain]
            raise ValueError(
                f"hidden, tokens, real, carry have shapes {shapes}, {certain.hidden.dtype}; branching {branching}, {len(seats)} "
                f"seats: expected [B,W,{self.width}] {self.dtype}, [B,W], [B], [levels-1,B,1,{self.width}], a level a seat, room"
            )
        made = [certain.tokens.new_empty(batch, nodes) for _ in range(2)]
        made.append(certain.hidden.new_empty(len(seats) - 1, batch, 1, self.width))
        kept = [x.contiguous() for x in (*certain, budget)]
        levels = (ctypes.c_long * len(branching))(*branching)
        call = _Draft(
            batch,
            width,
            self.width,
            len(seats),
            nodes,
            self.table.data_ptr(),
            self._head,
            *(x.data_ptr() for x in kept),
            ctypes.addressof(levels),
            *((None, None, 0) if turn is None else (turn[0].data_ptr(), turn[1].data_ptr(), turn[0].shape[0])),
            *(x.data_ptr() for x in made),
            self.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        structs = (self._modules, (_Seat * len(seats))(*map(_seat, seats)), call)
        code = kernel.draft_tree(*(ctypes.addressof(struct) for struct in structs))
        if code > 0:
            raise ValueError(
                f"tokens={certain.tokens.tolist()} or positions out of range (code {code}): give known ones and room"
            )
        if code:
            raise MemoryError(f"no memory for the activations of {batch} rows: draft for fewer at a time")
        return made[0], made[1], made[2]

    def _fit(self, certain: Certain, budget: Tensor, seats: Sequence[Seat], branching: tuple[int, ...], end: int) -> bool:
        """Whether a call is whole; `end`: certain and drafted nodes of a row."""
        hidden, tokens, real, carry = certain
        batch, width, channels = hidden.shape
        if channels != self.width or hidden.dtype != self.dtype or carry.dtype != self.dtype or tokens.shape != (batch, width):
            return False
        if not 0 < len(seats) == len(branching) <= len(self.modules) or carry.shape != (len(seats) - 1, batch, 1, channels):
            return False
        if any(x.shape != (batch,) or x.dtype != torch.int64 for x in (real, budget)) or tokens.dtype != torch.int64:
            return False
        return all(map(self._sits, self.modules, seats, repeat((batch, end))))

    def _sits(self, module: Module, seat: Seat, room: tuple[int, int]) -> bool:
        """Whether a module can sit there, with `room` = (rows, nodes)."""
        (batch, end), caches = room, seat.caches
        whole = caches.batch == batch and caches.capacity >= seat.base + end and seat.lengths.shape == (batch,)
        return whole and caches.dtype == self.dtype and caches.layouts == module.block.layouts


def _module(module: Module) -> _Module:
    norms = (norm_struct(gain) for gain in (*module.join.norms, module.norm))
    return _Module(*norms, layer_struct(module.join.layer), module.block.address)


def _seat(seat: Seat) -> _Seat:
    return _Seat(seat.caches.address, seat.lengths.data_ptr(), seat.base, seat.caches.capacity)
