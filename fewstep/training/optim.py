"""Optimizers: AdamW for everything, or Muon for hidden matrices and AdamW for the rest. No schedule, no model."""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.recipe import Config
from fewstep.training.precision import arithmetic


@final
class Optimizers:
    """The optimizers of a run as one: they step together, and their state is a flat mapping of tensors by parameter name."""

    def __init__(self, members: Iterable[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> None:
        self._members = tuple(members)
        self._names = names
        self._peaks = [[group["lr"] for group in member.param_groups] for member in self._members]

    def gradients(self) -> list[Tensor]:
        """The gradients there are, themselves."""
        params = (param for member in self._members for group in member.param_groups for param in group["params"])
        return [param.grad for param in params if param.grad is not None]

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak learning rates."""
        for member, peaks in zip(self._members, self._peaks, strict=True):
            for group, peak in zip(member.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            member.step()

    def zero_grad(self) -> None:
        for member in self._members:
            member.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The state by "parameter name/entry", the tensors themselves."""
        return {
            f"{self._names[param]}/{entry}": value
            for member in self._members
            for param, entries in member.state.items()
            for entry, value in entries.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state that `state` gave. Raises ValueError when it holds an entry for an unknown parameter."""
        owner = {
            self._names[param]: (member, param) for member in self._members for g in member.param_groups for param in g["params"]
        }
        for key, value in state.items():
            name, entry = key.rsplit("/", 1)
            if name not in owner:
                raise ValueError(
                    f"optimizer state {key!r}: the model has no such trained parameter; resume with the recipe of the run"
                )
            member, param = owner[name]
            member.state[param][entry] = value.to(param.device, copy=True)


class Optim(Config):
    """The base of the optimizer configs; `lr` is the peak learning rate, which a schedule multiplies."""

    lr: float = Field(1e-3, gt=0)

    @abstractmethod
    def build(self, model: nn.Module) -> Optimizers:
        """The optimizers of the parameters of `model` that require a gradient."""


@final
class AdamWConfig(Optim):
    """AdamW; weight decay acts on matrices, never on vectors (norms, biases).

    Cost: 8 bytes of state per parameter.
    """

    kind = "adamw"
    source = "Loshchilov and Hutter, arXiv:1711.05101; betas and decay as DeepSeek LLM, arXiv:2401.02954"

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)

    def build(self, model: nn.Module) -> Optimizers:
        names = _trained(model)
        return Optimizers([_adamw(list(names), self.lr, self.betas, self.eps, self.weight_decay)], names)


@final
class MuonConfig(Optim):
    """Muon for the matrices of linear layers, AdamW for embeddings, heads, norms and vectors.

    A matrix goes to AdamW when a part of its dotted name is in `adamw_names`. `scale`: "match_rms_adamw" multiplies the update
    by 0.2 sqrt(max(rows, columns)), so that both optimizers share one learning rate (2502.16982); "original" by
    sqrt(max(1, rows / columns)). `adamw_lr`: None takes `lr`.

    Cost: 4 bytes of state per matrix entry; about 20 min(rows, columns) FLOPs per entry and step.
    """

    kind = "muon"
    source = "Jordan et al., Muon, kellerjordan.github.io/posts/muon; Moonlight, arXiv:2502.16982"

    lr: float = Field(2e-3, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    ns_steps: int = Field(5, gt=0, lt=100)
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    weight_decay: float = Field(0.1, ge=0)
    adamw_lr: float | None = Field(None, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    adamw_names: tuple[str, ...] = ("embed", "embedding", "head", "lm_head", "unembed")

    def build(self, model: nn.Module) -> Optimizers:
        names = _trained(model)
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        hidden = [
            param
            for param, name in names.items()
            if param.ndim == 2 and id(param) not in embeddings and not set(name.split(".")) & set(self.adamw_names)
        ]
        chosen = {id(param) for param in hidden}
        rest = [param for param in names if id(param) not in chosen]
        members: list[torch.optim.Optimizer] = []
        if hidden:
            members.append(
                BatchedMuon(
                    hidden,
                    lr=self.lr,
                    weight_decay=self.weight_decay,
                    momentum=self.momentum,
                    nesterov=self.nesterov,
                    ns_steps=self.ns_steps,
                    adjust_lr_fn=self.scale,
                )
            )
        if rest:
            members.append(_adamw(rest, self.adamw_lr or self.lr, self.betas, self.eps, self.weight_decay))
        return Optimizers(members, names)


@final
class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with matrices of one shape orthogonalised together.

    Differs: Newton-Schulz runs in bf16 only where the device has bf16 arithmetic, else in fp32, many times faster there.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            pairs = [(param, param.grad) for param in group["params"] if param.grad is not None]
            if pairs:
                self._update(group, pairs)
        return loss

    def _update(self, group: Mapping[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
        params, grads = [param for param, _ in pairs], [grad for _, grad in pairs]
        buffers = []
        for param in params:
            if "momentum_buffer" not in self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
            buffers.append(self.state[param]["momentum_buffer"])
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, param in enumerate(params):
            by_shape[(param.shape[0], param.shape[1])].append(index)
        for (rows, columns), members in by_shape.items():
            stacked = torch.stack([updates[i] for i in members])
            update = orthogonalise(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(params[0].dtype)
            original = group["adjust_lr_fn"] in (None, "original")
            scale = math.sqrt(max(1, rows / columns)) if original else 0.2 * math.sqrt(max(rows, columns))
            torch._foreach_add_([params[i] for i in members], list(update.unbind()), alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Push the singular values of `matrices` [N,A,B] towards 1 by `steps` quintic Newton-Schulz iterations.

    In bf16 where the device has its arithmetic, else fp32. Cost: steps x (4 a^2 b + 2 a^3) FLOPs a matrix, a = min(A,B).
    Source: Jordan et al., Muon (coefficients 3.4445, -4.7750, 2.0315: singular values end in about [0.7, 1.2]).
    """
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16 if arithmetic(torch.bfloat16, matrices.device) else torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _trained(model: nn.Module) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters() if param.requires_grad}
    if not names:
        raise ValueError(f"model={type(model).__name__}: no parameter requires a gradient; unfreeze what is to be trained")
    return names


def _adamw(params: list[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=lr, betas=betas, eps=eps, fused=True)


OPTIMS: Mapping[str, type[Optim]] = MappingProxyType({config.kind: config for config in (AdamWConfig, MuonConfig)})
