"""Linformer: keys and values of a whole sequence are projected along it to a few, so that attention costs no square."""

from typing import ClassVar, Literal, NoReturn, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fewstep.core.mixer import Aux, Context, Full, State
from fewstep.core.position import NoPosition, fitted
from fewstep.core.recipe import Config
from fewstep.nn.mixers.packing import apart
from fewstep.nn.mixers.scores import check_mask
from fewstep.nn.recurrent import even_heads

Sharing = Literal["none", "heads", "keys_and_values"]


@final
class LinformerConfig(Config):
    """Attention over `rank` projected tokens, for sequences of at most `length`.

    `sharing` of the projections: "none": each head has its own for keys and values; "heads": all heads share one for keys and
    one for values; "keys_and_values": and one serves both.
    """

    kind: ClassVar[str] = "linformer"
    source: ClassVar[str] = "Wang et al. 2020, arXiv 2006.04768"

    length: int = Field(default=512, ge=1)
    rank: int = Field(default=64, ge=1)
    sharing: Sharing = "keys_and_values"
    bias: bool = False

    @model_validator(mode="after")
    def _is_low(self) -> "LinformerConfig":
        if self.rank > self.length:
            raise ValueError(f"rank={self.rank}: must be at most length={self.length}; lower it")
        return self

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        """(heads, head width). Raises ValueError where they do not divide."""
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "Linformer":
        return Linformer(self, width, heads, position)


@final
class Linformer(nn.Module):
    """softmax(Q (E K)' / sqrt(e)) F V over [B,T,D]; a sequence shorter than `length` takes the first columns of E and F.

    It looks both ways and knows no step: a projected key mixes tokens of all places. Cost: 4 T rank D. Source: arXiv 2006.04768,
    eq. 7. Differs: keys are turned by their positions before they are mixed, where an encoding does that.
    """

    modes = frozenset({"bidirectional"})
    masks = frozenset({Full})
    encodings = frozenset({"rotate"})

    def __init__(self, config: LinformerConfig, width: int, heads: int, position: NoPosition | None) -> None:
        super().__init__()
        self.config, self.heads = config, heads
        self.position = fitted(position, config.kind, self.encodings)
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.out = nn.Linear(width, width, bias=config.bias)
        kinds = {"none": 2 * heads, "heads": 2, "keys_and_values": 1}[config.sharing]
        self.along = nn.Parameter(torch.randn(kinds, config.rank, config.length) * config.rank**-0.5)  # E, then F

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        self._refuse()

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Aux]:
        assert ctx.positions is not None, "a parallel pass has no state to count positions"
        check_mask(self.config.kind, ctx.mask, self.masks)
        return self.out(apart(self._attend, self.qkv(x), ctx.positions, ctx.segments, exact=True)), {}

    def extend(self, x: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
        self._refuse()

    def _attend(self, features: Tensor, positions: Tensor) -> Tensor:
        """[B,T,D] over one sequence a row, from projected tokens [B,T,3D]."""
        count, length = features.shape[1], self.config.length
        if count > length:
            raise ValueError(
                f"length={length}: a sequence has {count} tokens; shorten it or build linformer with a larger length"
            )
        q, k, v = features.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.position.rotate(q, k, positions, positions, {})
        along = self.along[..., :count]
        e, f = (along, along) if len(along) == 1 else along.chunk(2)
        return scaled_dot_product_attention(q, e @ k, f @ v).transpose(1, 2).flatten(2)

    def _refuse(self) -> NoReturn:
        raise ValueError(f"mixer={self.config.kind!r}: looks both ways and has no cached form; choose a causal mixer to decode")
