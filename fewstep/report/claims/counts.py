"""What a computation costs, counted and not timed: multiply-adds, and bytes of the tensors that it makes.

This file knows no mixer. What a fused kernel needs beside its results is not seen.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(call: Callable[[], object]) -> int:
    """Of the matrix products and fused attentions of `call`; a causal one counts the pairs of tokens that see each other."""
    with FlopCounterMode(display=False, custom_mapping={_FUSED: _flops_of_fused}) as counter:
        call()
    return counter.get_total_flops() // 2


def most_bytes(call: Callable[[], object], known: Sequence[Tensor]) -> int:
    """The most that the tensors made by `call` hold at any moment, without those `known` beforehand."""
    with _Ledger(known) as ledger:
        call()
    return ledger.most


_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _flops_of_fused(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    dropout: float = 0.0,
    causal: bool = False,
    *,
    out_shape: object = None,
    **ignored: object,
) -> int:
    (batch, heads, queries, width), keys = q, k[2]
    pairs = sum(min(keys, i + 1) for i in range(queries)) if causal else queries * keys
    return 2 * batch * heads * pairs * (width + v[3])


@final
class _Ledger(TorchDispatchMode):
    """Counts each storage when an operator first gives it and until it is freed."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.live = self.most = 0
        self._seen = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._seen:
                self._enter(x.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size
