"""The step of a stack of decoder blocks over its caches as one call: all blocks in one parallel region of the kernel.

Knows tensors and the structs of `slots.c`. Does not know modules or slot tables, and has no gradient.
"""

import ctypes
from collections.abc import Sequence
from typing import NoReturn, final

import torch
from torch import Tensor

from fewstep.core.mixer import Blocks, Causal, Window
from fewstep.nn.kernels.kernel import DTYPES, default_kernel
from fewstep.nn.kernels.parts import BlockStruct, Ends, Parts


@final
class _Cache(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("sides", ctypes.c_long), ("slot_bytes", ctypes.c_long)]


@final
class _Scene(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("batch", "queries", "base", "pending")),
        *((name, ctypes.c_void_p) for name in ("lengths", "parent")),
        ("parent_row", ctypes.c_long),
        ("positions", ctypes.c_void_p),
        ("position_row", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_long) for name in ("angles", "window", "block")),
        ("threads", ctypes.c_int),
    ]


@final
class _Steps(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("blocks", "caches")),
        ("depth", ctypes.c_long),
        ("scene", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("width", "slots")),
        ("bf16", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("x", "table", "tokens")),
        *((name, ctypes.c_long) for name in ("token_row", "vocab")),
        *((name, ctypes.c_void_p) for name in ("join", "y", "last", "head")),
        ("tail", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("final", "scores")),
    ]


@final
class Caches:
    """The key-value caches of a stack, checked once.

    Args:
        tensors: one per block, each [B,2G,S,E] (keys first), contiguous, on the CPU, all bfloat16 or all float32, of the same B
            and S; read and written in place, kept alive here.

    Raises: ValueError for other shapes, dtypes, layouts or devices, or where a gradient is wanted.
    """

    __slots__ = ("_structs", "address", "batch", "capacity", "dtype", "layouts", "tensors")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            raise ValueError("tensors is empty: expected one cache [B,2G,S,E] per block")
        self.tensors, first = tuple(tensors), tensors[0]
        self.dtype = first.dtype
        for cache in self.tensors:
            fits = cache.ndim == first.ndim == 4 and cache.shape[0] == first.shape[0] and cache.shape[2] == first.shape[2]
            if not fits or cache.dtype != self.dtype or self.dtype not in DTYPES or not cache.is_cpu or not cache.is_contiguous():
                raise ValueError(
                    f"a cache is {tuple(cache.shape)} {cache.dtype} on {cache.device}, strides {cache.stride()}: expected "
                    "contiguous [B,2G,S,E] of one B, S and dtype, bfloat16 or float32, on the CPU"
                )
            if cache.requires_grad:
                raise ValueError("a cache requires a gradient, which this step does not have: detach it or step by the modules")
        self.batch, _, self.capacity, _ = first.shape
        self.layouts = tuple((cache.shape[1], cache.shape[3]) for cache in self.tensors)
        size = self.dtype.itemsize
        self._structs = (_Cache * len(self.tensors))(
            *(_Cache(x.data_ptr(), sides, width * size) for x, (sides, width) in zip(self.tensors, self.layouts, strict=True))
        )
        self.address = ctypes.addressof(self._structs)

    @classmethod
    def fits(cls, cache: Tensor) -> bool:
        """Whether the kernel is in use and can take a cache of this kind."""
        plain = cache.is_cpu and cache.dtype in DTYPES and cache.is_contiguous() and not cache.requires_grad
        return plain and not torch.is_grad_enabled() and default_kernel() is not None

    def __len__(self) -> int:
        return len(self.tensors)

    def keep(self, base: int, lengths: Tensor, path: Tensor, count: Tensor) -> None:
        """Copies the kept nodes to each row's end: slot base + path[b,j] to slot lengths[b] + j for j < count[b].

        Args:
            base: the first pending node's slot.
            lengths: int64 [B] on the CPU, committed tokens, at most `base`.
            path: int64 [B,K], increasing in j among the kept.
            count: int64 [B], 0 .. K.

        Raises: ValueError for what is out of range; nothing is written then.

        Cost: the kept slots' bytes, once read and once written.
        """
        kernel, batch = default_kernel(), self.batch
        if not _is_table(lengths, (batch,)) or not _is_table(count, (batch,)) or not _is_table(path, (batch, path.shape[-1])):
            raise ValueError(
                f"lengths, path and count have shapes {tuple(lengths.shape)}, {tuple(path.shape)}, {tuple(count.shape)}: "
                f"expected int64 [{batch}], [{batch},K], [{batch}] on the CPU"
            )
        if kernel is None:
            raise ValueError(OFF)
        if not 0 <= base <= self.capacity:
            raise ValueError(f"base={base}: must lie in 0 .. capacity={self.capacity}")
        lengths, path, count = lengths.contiguous(), path.contiguous(), count.contiguous()
        pointers = lengths.data_ptr(), path.data_ptr()
        nodes = path.shape[1]
        bad = kernel.keep_slots(self.address, len(self), batch, self.capacity, base, *pointers, nodes, count.data_ptr())
        if bad == 1:
            raise ValueError(f"lengths={lengths.tolist()}: must lie in 0 .. base={base}")
        if bad == 2:
            end = self.capacity - base - 1
            raise ValueError(f"path={path.tolist()}: must increase within 0 .. {end} up to count={count.tolist()}")
        if bad == 3:
            raise ValueError(f"count={count.tolist()}: must lie in 0 .. {nodes}, the path's width")


@final
class Scene:
    """What the blocks of one call share: which tokens are new, what each sees, where the rotary table is read.

    A new token sees the committed tokens of its row, its ancestors among the pending nodes and itself; in blocks, the pending
    nodes of its own block and of those before.

    Args:
        count: new tokens T a row, the last of the pending nodes.
        base: the first pending node's slot; node n lies in slot base + n.
        pending: pending nodes P, the new ones included.
        lengths: int64 [B] on the CPU, at most `base`: committed tokens, in slots 0 .. lengths[b]-1.
        parent: int64 [B or 1,P]: a node's parent among the pending nodes, an earlier one, or -1 for the last committed token,
            or -2 for padding, which sees what is committed and itself; None: a chain.
        positions: int64 [B or 1,T]: the table's rows to turn by; None: committed length + depth in the tree.
        turn: cosines and signed sines [R,E] by position, contiguous, in the blocks' dtype; None: nothing turns.
        mask: `Window`: how many tokens back a token sees, itself included, where a decoder block has no smaller one. `Blocks`:
            of how many tokens; windows are none then. Both count sequence indices: a committed slot's number, a pending node's
            committed length + depth.

    Raises: ValueError for other shapes, dtypes, layouts, devices or counts. The values in tensors are checked by each call.
    """

    __slots__ = ("_call", "_kept", "address", "batch", "count", "end", "turned")

    def __init__(
        self,
        count: int,
        base: int,
        pending: int,
        lengths: Tensor,
        parent: Tensor | None,
        positions: Tensor | None,
        turn: tuple[Tensor, Tensor] | None,
        mask: Causal | Window | Blocks = Causal(),
    ) -> None:
        batch = lengths.shape[0] if lengths.ndim else 0
        self.batch, self.count, self.end = batch, count, base + pending
        if not 0 <= count <= pending or base < 0:
            raise ValueError(f"count={count}, pending={pending}, base={base}: expected 0 <= count <= pending, base at least 0")
        window = mask.size if isinstance(mask, Window) else 0
        block = mask.size if isinstance(mask, Blocks) else 0
        if not isinstance(mask, Causal) and mask.size < 1:
            raise ValueError(f"mask={mask}: the size must be at least 1, or take Causal() for none")
        if not _is_table(lengths, (batch,)):
            _refuse_table("lengths", lengths, f"[{batch}]")
        lengths = lengths.contiguous()
        tree = place = None
        tree_row = place_row = 0
        if parent is not None:
            parent, tree_row = _rows("parent", parent, batch, pending)
            tree = parent.data_ptr()
        if positions is not None:
            positions, place_row = _rows("positions", positions, batch, count)
            place = positions.data_ptr()
        cos = sin = self.turned = None
        angles = 0
        if turn is not None:
            self.turned, angles = _check_turn(turn), turn[0].shape[0]
            cos, sin = turn[0].data_ptr(), turn[1].data_ptr()
        self._kept = (lengths, parent, positions, turn)
        self._call = _Scene(
            batch,
            count,
            base,
            pending,
            lengths.data_ptr(),
            tree,
            tree_row,
            place,
            place_row,
            cos,
            sin,
            angles,
            window,
            block,
            torch.get_num_threads(),
        )
        self.address = ctypes.addressof(self._call)

    def refuse(self, code: int) -> NoReturn:
        """Raises the ValueError of a value that the kernel found out of range."""
        lengths, parent, positions, _ = self._kept
        call = self._call
        if code == BAD_LENGTHS:
            raise ValueError(f"lengths={lengths.tolist()}: must lie in 0 .. base={call.base}")
        if code == BAD_PARENT:
            assert parent is not None
            raise ValueError(f"parent={parent.tolist()}: must be at least -2 and below the node's own index")
        where = "length + depth" if positions is None else f"{positions.tolist()}"
        raise ValueError(f"positions={where}: must lie in 0 .. {call.angles - 1}, the rotary table's rows; make a longer table")


@final
class Steps:
    """Decoder blocks one after another: x + attention(norm(x)), then x + MLP(norm(x)), over caches, in one call of the kernel.

    Args:
        parts: the blocks' weights, kept alive here.

    Raises: ValueError where shapes, dtypes or layouts do not fit together.

    Differs: float32 within a norm, a turn and an activation, each rounded once to x's dtype, where PyTorch's operators round
        after every step.
    """

    def __init__(self, parts: Sequence[Parts]) -> None:
        if not parts:
            raise ValueError("parts is empty: expected the weights of at least one block")
        self.parts = tuple(parts)
        self.dtype, self.width = self.parts[0].qkv.dtype, self.parts[0].qkv.shape[1]
        for part in self.parts:
            part.check(self.width, self.dtype)
        self.layouts = tuple((2 * part.kv_heads, part.head_width) for part in self.parts)
        self._widths = frozenset(width for _, width in self.layouts)
        self._blocks = (BlockStruct * len(self.parts))(*(part.struct() for part in self.parts))
        self.address, self._bf16 = ctypes.addressof(self._blocks), self.dtype == torch.bfloat16

    def __len__(self) -> int:
        return len(self.parts)

    def __reduce__(self) -> tuple[type["Steps"], tuple[tuple[Parts, ...]]]:
        return Steps, (self.parts,)  # a copy has weights and addresses of its own

    def __call__(self, x: Tensor, caches: Caches, scene: Scene, first: int = 0, last: int | None = None) -> Tensor:
        """The output of blocks first .. last-1 for new tokens, whose keys and values go to the last of the slots in use.

        A token's result, and what it leaves in the caches, are bitwise the same whatever tokens, rows, hidden slots and threads
        share the call.

        Args:
            x: [B,T,D] in the weights' dtype, on the CPU.
            caches: of all blocks of the stack, in the weights' dtype; those of the blocks run are written in place.
            scene: the new tokens, and what is seen of the slots.
            first: the first block to run.
            last: one behind the last; None: all that follow.

        Returns: [B,T,D].

        Raises:
            ValueError: shapes, dtypes, devices or values that do not fit, or a gradient is wanted; nothing is written.
            MemoryError: no memory for the activations; nothing is written.

        Cost: the weights' and the visible keys' bytes while rows are few.
        """
        kernel = default_kernel()
        last = len(self.parts) if last is None else last
        if kernel is None or x.shape[-1:] != (self.width,) or self._unfit(x, caches, scene, first, last):
            self._refuse(x, caches, scene, first, last)
        x = x.contiguous()
        y = torch.empty_like(x)
        blocks, seats = self.address + first * BLOCK_BYTES, caches.address + first * CACHE_BYTES
        call = _Steps(
            blocks, seats, last - first, scene.address, self.width, caches.capacity, self._bf16, x.data_ptr(), y=y.data_ptr()
        )
        _checked(kernel.run_steps(ctypes.addressof(call)), scene)
        return y

    def scores(self, tokens: Tensor, caches: Caches, scene: Scene, ends: Ends) -> tuple[Tensor, Tensor, Tensor]:
        """All blocks between the model's ends: the embeddings of new tokens go in, their scores come out.

        Args:
            tokens: int64 [B,T] on the CPU.
            caches: as in a call.
            scene: as in a call.
            ends: of this width and dtype.

        Returns: what the last block gave [B,T,D], the same normed, and the scores [B,T,V].

        Raises: as a call; ValueError for a token that has no embedding.

        Cost: the weights' and the visible keys' bytes while rows are few.
        """
        kernel, depth = default_kernel(), len(self.parts)
        if kernel is None or (ends.width, ends.dtype) != (self.width, self.dtype) or self._unfit(tokens, caches, scene, 0, depth):
            self._refuse(tokens, caches, scene, 0, depth)
        tokens, table = tokens.contiguous(), ends.table
        batch, count = scene.batch, scene.count
        y, normed, scores = (table.new_empty(batch, count, width) for width in (self.width, self.width, ends.vocab))
        given = None, table.data_ptr(), tokens.data_ptr(), count, ends.vocab, None
        made = y.data_ptr(), *ends.addresses, count, normed.data_ptr(), scores.data_ptr()
        call = _Steps(self.address, caches.address, depth, scene.address, self.width, caches.capacity, self._bf16, *given, *made)
        _checked(kernel.run_steps(ctypes.addressof(call)), scene, tokens)
        return y, normed, scores

    def _unfit(self, x: Tensor, caches: Caches, scene: Scene, first: int, last: int) -> bool:
        """Whether x, activations or tokens, does not fit in."""
        if x.shape[:2] != (scene.batch, scene.count) or x.dtype != (self.dtype if x.ndim == 3 else torch.int64) or not x.is_cpu:
            return True
        if caches.layouts != self.layouts or caches.dtype != self.dtype or caches.batch != scene.batch:
            return True
        if caches.capacity < scene.end or not 0 <= first < last <= len(self.parts):
            return True
        if scene.turned is not None and (scene.turned[1] != self.dtype or self._widths != {scene.turned[0]}):
            return True
        return x.requires_grad and torch.is_grad_enabled()

    def _refuse(self, x: Tensor, caches: Caches, scene: Scene, first: int, last: int) -> NoReturn:
        if default_kernel() is None:
            raise ValueError(OFF)
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("x requires a gradient, which this step does not have: call it under torch.no_grad()")
        if not 0 <= first < last <= len(self.parts):
            raise ValueError(f"first={first}, last={last}: expected 0 <= first < last <= {len(self.parts)}, the number of blocks")
        if scene.turned is not None and (scene.turned[1] != self.dtype or self._widths != {scene.turned[0]}):
            raise ValueError(f"turn has width and dtype {scene.turned}: expected {sorted(self._widths)} and {self.dtype}")
        plain = x.shape == (scene.batch, scene.count, self.width) and x.dtype == self.dtype
        tokens = x.shape == (scene.batch, scene.count) and x.dtype == torch.int64
        if not (plain or tokens) or not x.is_cpu:
            wanted = f"[{scene.batch},{scene.count},{self.width}] {self.dtype} on the CPU, or tokens and ends like that"
            raise ValueError(f"x is {tuple(x.shape)} {x.dtype} on {x.device}: expected {wanted}")
        raise ValueError(
            f"caches have batch {caches.batch}, capacity {caches.capacity}, {caches.dtype} and (2 kv heads, head width) "
            f"{caches.layouts}: expected {scene.batch}, {scene.end} or more, {self.dtype} and {self.layouts}"
        )


def _checked(code: int, scene: Scene, tokens: Tensor | None = None) -> None:
    """Raises the error that the kernel's answer stands for."""
    if code == BAD_TOKEN:
        raise ValueError(
            f"tokens={None if tokens is None else tokens.tolist()}: one has no embedding; encode with this model's tokenizer"
        )
    if code > 0:
        scene.refuse(code)
    if code:
        raise MemoryError(f"no memory for the activations of {scene.batch * scene.count} tokens: feed fewer at a time")


OFF = "kernels are off: blocks step by their modules then; unset FEWSTEP_KERNELS or load the model anew"
BLOCK_BYTES, CACHE_BYTES = ctypes.sizeof(BlockStruct), ctypes.sizeof(_Cache)
BAD_LENGTHS, BAD_PARENT, BAD_TOKEN = 1, 2, 4  # as in calls.h


def _is_table(x: Tensor, shape: tuple[int, ...]) -> bool:
    return x.shape == shape and x.dtype == torch.int64 and x.is_cpu


def _refuse_table(name: str, x: Tensor, shape: str) -> NoReturn:
    raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}: expected int64 {shape} on the CPU")


def _rows(name: str, x: Tensor, batch: int, width: int) -> tuple[Tensor, int]:
    """x [B or 1,width] contiguous, and the stride of its rows; one row serves all."""
    if not _is_table(x, (x.shape[0] if x.ndim else 0, width)) or x.shape[0] not in (batch, 1):
        _refuse_table(name, x, f"[{batch} or 1,{width}]")
    return x.contiguous(), width if x.shape[0] == batch else 0


def _check_turn(turn: tuple[Tensor, Tensor]) -> tuple[int, torch.dtype]:
    """Width and dtype of a rotary table."""
    cos, sin = turn
    plain = cos.is_contiguous() and sin.is_contiguous() and cos.is_cpu and sin.is_cpu
    if not plain or cos.ndim != 2 or cos.shape != sin.shape or cos.dtype != sin.dtype or cos.shape[1] % 2:
        raise ValueError(
            f"turn is {tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype}: expected two contiguous [R,E], E even, "
            "of one dtype on the CPU"
        )
    return cos.shape[1], cos.dtype
