"""NTK-aware scaling that grows with the sequence: the one rotary encoding whose keys cannot be cached turned."""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.position import NoPosition
from fewstep.nn.position.encoding import EncodingConfig, one_axis, per_head, wide
from fewstep.nn.position.rope import powers, tables, turn
from fewstep.nn.position.stretched import stretched_base, wide_enough


@final
class DynamicNtkConfig(EncodingConfig):
    """Dynamic NTK scaling: rotary positions up to `trained_length`; of L > trained_length tokens the last turns queries and keys
    with the base stretched by `factor` L / trained_length - (factor - 1)."""

    kind: ClassVar[str] = "dynamic_ntk"
    source: ClassVar[str] = "emozilla 2023; Peng et al. 2023, YaRN, arXiv 2309.00071, section 3.3"

    base: float = Field(default=10000.0, gt=0)
    factor: float = Field(default=8.0, ge=1)
    trained_length: int = Field(default=2048, gt=0)

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "DynamicNtk":
        if head_width % 2:
            raise ValueError(f"head_width={head_width}: rope turns pairs of channels; choose an even width")
        wide_enough(head_width)
        return DynamicNtk(self, head_width)


@final
class DynamicNtk(NoPosition):
    """Each query turns itself and all its keys by the base of its own length, so keys are cached unturned and all forms agree.

    It is written as a bias, the turned scores less the plain ones. Differs: implementations that turn a whole prompt by the base
    of its last token, and cache those keys, compute something that depends on how a text was cut into calls; this is what they
    compute token by token with unturned keys. Cost: a query beyond the trained length turns K keys, in a loop over lengths:
    about 4 K E operations beside its 2 K E of scores, and Python's time for each token.
    """

    parts = frozenset({"bias"})

    def __init__(self, config: DynamicNtkConfig, head_width: int) -> None:
        super().__init__()
        self.kind, self.config, self.head_width = config.kind, config, head_width

    def frequencies(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[E/2] radians per position for the query that sees `length` tokens."""
        config = self.config
        stretch = config.factor * max(length, config.trained_length) / config.trained_length - (config.factor - 1)
        return powers(stretched_base(config.base, stretch, self.head_width), self.head_width, device, dtype)

    def bias(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        q_pos, k_pos = one_axis(q_pos, self.kind), one_axis(k_pos, self.kind)
        k = per_head(k, q.shape[1])
        rows = max(len(q_pos), len(k_pos))  # rows of equal positions are one batch
        batches = zip(q.chunk(rows), k.chunk(rows), q_pos.expand(rows, -1), k_pos.expand(rows, -1), strict=True)
        return torch.cat([self._added(*batch) for batch in batches]) * q.shape[-1] ** -0.5

    def _added(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Turned less plain products of q [B,H,Q,E] and k [B,H,K,E] at the positions [Q] and [K]."""
        lengths = (q_pos + 1).clamp(min=self.config.trained_length)
        found, order = [], []
        for length in lengths.unique().tolist():
            here = (lengths == length).nonzero().squeeze(1)
            frequencies = self.frequencies(length, q.device, wide(q))
            turned = (
                turn(x, *tables(places.to(wide(q)).unsqueeze(-1) * frequencies, q.dtype))
                for x, places in ((q[:, :, here], q_pos[here]), (k, k_pos))
            )
            ours, theirs = turned
            found.append(ours @ theirs.mT)
            order.append(here)
        return torch.cat(found, 2)[:, :, torch.cat(order).argsort()] - q @ k.mT
