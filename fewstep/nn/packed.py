"""Linear layers whose weights are packed for decoding on a CPU. This file knows no model: it replaces layers anywhere."""

from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.nn import kernels


@final
class PackedLinear(nn.Module):
    """A linear layer for inference that reads its packed weight once for a few rows.

    The weight lives in packed form only; `weight` and `state_dict` unpack a copy. Raises ValueError when a gradient is asked for.
    """

    def __init__(self, linear: nn.Linear, saved: bool = True) -> None:
        """`saved`: whether `state_dict` has the weight, i.e. whether no other module saves it (tied embeddings)."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = kernels.pack(linear.weight, linear.bias)
        self._saved, self._biased = saved, linear.bias is not None

    @property
    def weight(self) -> Tensor:
        """[out, in], unpacked anew."""
        return self._packed.unpack()

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("packed weights have no gradient; load the model with packed=False to train it")
        return kernels.linear(x, self._packed)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._saved:
            destination[f"{prefix}weight"] = self.weight
        if self._biased:
            destination[f"{prefix}bias"] = self._packed.bias


def pack_linears(module: nn.Module) -> nn.Module:
    """`module` with every linear layer on the CPU in bfloat16 or float32 packed, in place; unchanged where there is no kernel.

    Cost: one pass over the weights. The plain weights are freed, so the memory stays about the same.
    """
    shared = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and child.weight.is_cpu and child.weight.dtype in kernels.DTYPES
    ]
    if found and kernels.available():
        for parent, name, child in found:
            setattr(parent, name, PackedLinear(child, saved=id(child.weight) not in shared))
    return module
