"""Number formats of training: fp32, bf16 and fp16 with fp32 master weights, and the dynamic loss scale of fp16.

Where the CPU has no arithmetic of a format, its matmuls are emulated: operands, results and their gradients are rounded to the
format, products are summed in fp32, as the hardware does. This file knows no model and no optimizer.
"""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, final

import torch
from pydantic import Field
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.core.recipe import Config


def arithmetic(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` multiplies matrices of `dtype` in hardware."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return any(name in capability and bool(present) for capability, present in torch.cpu.get_capabilities().items())


@final
class LossScale:
    """The factor on an fp16 loss that keeps small gradients above underflow; it follows `torch.amp.GradScaler`'s rules.

    Source: Micikevicius et al., arXiv:1710.03740, section 3.2.
    """

    def __init__(self, value: float, growth: float, backoff: float, interval: int) -> None:
        self.value = value
        self._growth = growth
        self._backoff = backoff
        self._interval = interval
        self._clean = 0

    def update(self, overflow: bool) -> None:
        """Shrink after a step whose gradients overflowed, grow after `interval` steps in a row that did not."""
        self._clean = 0 if overflow else self._clean + 1
        if overflow:
            self.value *= self._backoff
        elif self._clean == self._interval:
            self.value, self._clean = self.value * self._growth, 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "clean": self._clean}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value, self._clean = float(state["value"]), int(state["clean"])


class Precision(Config):
    """The base of the precision configs. Weights and optimizer state stay in fp32."""

    @abstractmethod
    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which a forward pass runs."""

    def backward(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which a backward pass runs: autocast leaves its formats in the graph, emulation must be on again."""
        return self.context(device) if self.emulated(device) else nullcontext()

    def emulated(self, device: torch.device) -> bool:
        """Whether matmuls are emulated on `device` for want of arithmetic."""
        return False

    def scale(self) -> LossScale | None:
        """A fresh loss scale, None where gradients need none."""
        return None


@final
class FP32(Precision):
    """Single precision throughout."""

    kind = "fp32"
    source = "none: the format every other is compared with"

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()


class _Half(Precision):
    """Autocast to a 16-bit format, or its emulation."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        return Rounded(self.dtype) if self.emulated(device) else torch.autocast(device.type, self.dtype)

    def emulated(self, device: torch.device) -> bool:
        return not arithmetic(self.dtype, device)


@final
class BF16(_Half):
    """Matmuls in bfloat16, fp32 master weights."""

    kind = "bf16"
    source = "Kalamkar et al., arXiv:1905.12322"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


@final
class FP16(_Half):
    """Matmuls in float16, fp32 master weights, dynamic loss scaling; `init_scale=1` with `growth=1` trains without scaling."""

    kind = "fp16"
    source = "Micikevicius et al., arXiv:1710.03740"

    init_scale: float = Field(65536.0, gt=0)
    growth: float = Field(2.0, ge=1)
    backoff: float = Field(0.5, gt=0, lt=1)
    interval: int = Field(2000, gt=0)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16

    def scale(self) -> LossScale:
        return LossScale(self.init_scale, self.growth, self.backoff, self.interval)


PRECISIONS: Mapping[str, type[Precision]] = MappingProxyType({config.kind: config for config in (FP32, BF16, FP16)})


_aten = torch.ops.aten
_MATMULS = frozenset({_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.convolution_backward})
_ATTENTION = frozenset(
    {_aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_flash_attention_for_cpu_backward}
)


@final
class Rounded(TorchDispatchMode):
    """Inside this mode, forwards and backwards, matmuls see and return numbers of `dtype` and sum in fp32.

    Differs from autocast: elementwise operations between matmuls stay in fp32; attention rounds queries, keys, values and results
    but not the probabilities inside.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in _MATMULS:
            return self._round(func(*self._round(args, 0), **kwargs), 0)
        if packet in _ATTENTION:  # 4-D: all but the logarithms of the softmax's sums, which the hardware keeps in fp32 as well
            return self._round(func(*self._round(args, 4), **kwargs), 4)
        return func(*args, **kwargs)

    def _round(self, value: Any, least: int) -> Any:
        if isinstance(value, tuple | list):
            return tuple(self._round(item, least) for item in value)
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim >= least:
            return value.to(self._dtype).to(torch.float32)
        return value
