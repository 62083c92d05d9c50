"""The residual block of a decoder: mixer and MLP, each behind its own norm. This file knows no mixer by name."""

from typing import Any, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from fewstep.core.mixer import Aux, Context, State
from fewstep.core.recipe import Config

Norm = Literal["rms", "layer"]
Activation = Literal["swiglu", "gelu"]


def norm(kind: Norm, width: int, eps: float) -> nn.Module:
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) over the last dimension."""
    return nn.RMSNorm(width, eps=eps) if kind == "rms" else nn.LayerNorm(width, eps=eps)


@final
class MLP(nn.Module):
    """Position-wise network of inner width `hidden`: SwiGLU (arXiv 2002.05202; gate and up in one matrix) or GELU."""

    def __init__(self, width: int, hidden: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.gated = activation == "swiglu"
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=bias)  # gate first when gated
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if not self.gated:
            return self.down(gelu(h))
        gate, up = h.chunk(2, -1)
        return self.down(silu(gate) * up)


class BlockConfig(Config):
    """What every block of a model shares. `hidden` is the inner width of the MLP; 0: there is none (gated units need none)."""

    norm: Norm = "rms"
    eps: float = Field(default=1e-6, gt=0)
    activation: Activation = "swiglu"
    hidden: int = Field(default=688, ge=0)
    mlp_bias: bool = False


@final
class Block(nn.Module):
    """x + mixer(norm(x)), then, unless `hidden` is 0, x + MLP(norm(x))."""

    def __init__(self, config: BlockConfig, width: int, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer: Any = mixer  # fulfils core.mixer.Mixer; nn.Module attributes defeat structural typing
        self.mixer_norm = norm(config.norm, width, config.eps)
        self.mlp_norm = norm(config.norm, width, config.eps) if config.hidden else nn.Identity()
        self.mlp = MLP(width, config.hidden, config.activation, config.mlp_bias) if config.hidden else None
        self.packed: Any = None  # packed.PackedBlocks of this one: `extend` as one call, where the parts allow it

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        state: State = self.mixer.init_state(batch, capacity, device=device, dtype=dtype)
        return state

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Aux]:
        mixed, aux = self.mixer(self.mixer_norm(x), ctx)
        return self.feed_forward(x + mixed), aux

    def extend(self, x: Tensor, ctx: Context, state: Any) -> tuple[Tensor, State]:
        if self.packed is not None and self.packed.takes(x, x.shape[1], ctx, state.caches):
            return self.packed.extend(x, ctx, state)
        mixed, state = self.mixer.extend(self.mixer_norm(x), ctx, state)
        return self.feed_forward(x + mixed), state

    def feed_forward(self, x: Tensor) -> Tensor:
        """x [B,T,D] past the MLP, where there is one."""
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))
