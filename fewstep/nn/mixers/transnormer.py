"""TransNormer: linear attention whose denominator is replaced by a norm, and its companion, softmax within blocks."""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import elu

from fewstep.core.position import NoPosition, fitted
from fewstep.core.recipe import Config
from fewstep.nn import decay
from fewstep.nn.position.encoding import one_axis
from fewstep.nn.recurrent import Carry, Inputs, Links, Recurrent, even_heads, wide


@final
class TransNormerConfig(Config):
    """NormAttention, TransNormer's mixer of the later layers; its early ones have `diag_attention`."""

    kind: ClassVar[str] = "transnormer"
    source: ClassVar[str] = "Qin et al. 2022, arXiv 2210.10340"
    claims: ClassVar[tuple[str, ...]] = ("transnormer",)

    eps: float = Field(default=1e-6, gt=0)

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "NormAttention":
        return NormAttention(self, width, heads, position)


@final
class NormAttention(Recurrent):
    """y_i = RMSNorm(sum_j f(q_i) f(k_j) v_j) over j <= i with f = elu + 1: no denominator whose gradient could be without bound.

    Cost: 4 T E^2 a head; state: E^2 numbers a head. Differs: the norm runs over the heads together, with a gain, as in the
    authors' code; rotary positions turn the features.
    """

    encodings = frozenset({"rotate"})

    def __init__(self, config: TransNormerConfig, width: int, heads: int, position: NoPosition | None) -> None:
        super().__init__()
        self.config, self.heads, self.position = config, heads, fitted(position, config.kind, self.encodings)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm = nn.RMSNorm(width, eps=config.eps)
        self.out = nn.Linear(width, width, bias=False)

    @property
    def width(self) -> int:
        return self.out.out_features

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        q, k, v = wide(self.qkv(features)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = (elu(x).transpose(1, 2) + 1 for x in (q, k))
        q, k = self.position.rotate(q, k, positions, positions, {})
        return q.transpose(1, 2), k.transpose(1, 2), v

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        size = self.width // self.heads
        return (wide(torch.zeros(batch, self.heads, size, size, device=device, dtype=dtype)),)

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        q, k, v = inputs
        return decay.read(q, k, v, None, carry[0], links)

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        _, k, v = inputs
        return (decay.advance(k, v, None, carry[0], real),)

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        return self.out(self.norm(y.flatten(2)).to(features.dtype))


@final
class DiagAttentionConfig(Config):
    """DiagAttention, of TransNormer's early layers: softmax within blocks of `block` tokens, counted from the first one."""

    kind: ClassVar[str] = "diag_attention"
    source: ClassVar[str] = "Qin et al. 2022, arXiv 2210.10340"

    block: int = Field(default=64, ge=1)

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "DiagAttention":
        return DiagAttention(self, width, heads, position)


@final
class DiagAttention(Recurrent):
    """Causal softmax attention that sees the tokens of its own block alone.

    Cost: 2 T E (T + block) a head in chunks of T; state: the block's keys and values, 2 `block` E numbers a head.
    """

    encodings = frozenset({"rotate", "bias", "value"})

    def __init__(self, config: DiagAttentionConfig, width: int, heads: int, position: NoPosition | None) -> None:
        super().__init__()
        self.config, self.heads, self.position = config, heads, fitted(position, config.kind, self.encodings)
        self._biased = not self.position.parts.isdisjoint({"bias", "value"})
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    @property
    def width(self) -> int:
        return self.out.out_features

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        q, k, v = wide(self.qkv(features)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        q, k = self.position.rotate(q, k, positions, positions, {})
        places = [one_axis(positions, self.position.kind)] if self._biased else []
        return *(x.transpose(1, 2) for x in (q, k, v)), *places

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        """Keys and values of the begun block (and positions, if they bias) in their places, and the number of tokens [B]."""
        shape = (batch, self.config.block, self.heads, self.width // self.heads)
        none = wide(torch.zeros(shape, device=device, dtype=dtype))
        count = torch.zeros(batch, dtype=torch.int64, device=device)
        return none, none, *([count.new_zeros(shape[:2])] if self._biased else []), count

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        *known, count = carry
        k, v, *places = (torch.cat(pair, 1) for pair in zip(known, inputs[1:], strict=True))
        q, k, v = (x.transpose(1, 2) for x in (inputs[0], k, v))
        size = self.config.block
        before = torch.where(links.fresh, 0, count.unsqueeze(1))
        place = before + links.sees.sum(-1) - 1
        block = place // size
        slots = torch.arange(size, device=q.device)
        held = (slots < (before % size).unsqueeze(-1)) & (block == before // size).unsqueeze(-1)
        sees = torch.cat([held, links.sees & (block.unsqueeze(2) == block.unsqueeze(1))], 2)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        around = (places[0][:, size:], places[0]) if places else None
        if around and (bias := self.position.bias(q, k, *around)) is not None:
            scores = scores + bias
        # a finite floor: padding may see nothing, and its result must be a number
        weights = scores.masked_fill(~sees.unsqueeze(1), torch.finfo(q.dtype).min).softmax(-1) * sees.unsqueeze(1)
        y = weights @ v
        if around and (value := self.position.value(weights, *around)) is not None:
            y = y + value
        return y.transpose(1, 2)

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        *known, count = carry
        size, place = self.config.block, count.unsqueeze(1) + real.cumsum(1) - 1
        total = count + real.sum(1)
        first = (total // size * size).unsqueeze(1)  # of the block that is now begun
        into = (place % size).masked_fill(~real | (place < first), size)  # to the end, to be cut off
        stays = (count >= first.squeeze(1)).unsqueeze(1)
        held = []
        for x, new in zip(known, inputs[1:], strict=True):
            rest = (1,) * (x.ndim - 2)
            room = torch.cat([x * stays.view(-1, 1, *rest), x[:, :1]], 1)
            held.append(room.scatter(1, into.view(*into.shape, *rest).expand_as(new), new)[:, :size])
        return *held, total

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        return self.out(y.flatten(2).to(features.dtype))
