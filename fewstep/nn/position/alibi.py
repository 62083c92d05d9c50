"""ALiBi: attention with linear biases, a penalty on distance that no text outgrows."""

from typing import ClassVar, final

import torch
from torch import Tensor

from fewstep.core.position import NoPosition
from fewstep.nn.position.encoding import EncodingConfig, back, wide


@final
class AlibiConfig(EncodingConfig):
    """A penalty on the scores that grows linearly with distance, at its own fixed slope in each head."""

    kind: ClassVar[str] = "alibi"
    source: ClassVar[str] = "Press et al. 2021, arXiv 2108.12409"
    claims: ClassVar[tuple[str, ...]] = ("length-extrapolation",)

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "Alibi":
        return Alibi(heads)


@final
class Alibi(NoPosition):
    """-m_h |i - j|, m_h = 2^(-8h/H) for h = 1 .. H. Cost: one multiplication a score; nothing is learned.

    Other numbers of heads than powers of two take the slopes of the power below, then every other slope of twice that power,
    as the authors' code does. Differs: keys behind the query are penalised like keys before it, which the causal paper leaves
    open. In bfloat16 the penalty is rounded to 8 bits.
    """

    kind = "alibi"
    parts = frozenset({"bias"})

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slopes = slopes(heads)

    def bias(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        steep = torch.tensor(self.slopes, device=q.device, dtype=wide(q)).view(-1, 1, 1)
        distance = back(q_pos, k_pos, self.kind).abs().to(wide(q))
        return (distance.unsqueeze(1) * -steep).to(q.dtype)


def slopes(heads: int) -> tuple[float, ...]:
    """m_h of each head."""
    power = 1 << (heads.bit_length() - 1)
    whole = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-4 * h / power) for h in range(1, 2 * power + 1, 2)]
    return (*whole, *between[: heads - power])
