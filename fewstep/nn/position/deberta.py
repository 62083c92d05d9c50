"""DeBERTa's disentangled attention: content asks for distance, and distance for content."""

from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.position import NoPosition, Shared
from fewstep.nn.position.encoding import EncodingConfig, Kept, back, pick


@final
class DebertaConfig(EncodingConfig):
    """Content-to-content, content-to-position and position-to-content scores; distances are kept apart below `reach`."""

    kind: ClassVar[str] = "deberta"
    source: ClassVar[str] = "He et al. 2020, arXiv 2006.03654"
    shared: ClassVar[bool] = False

    reach: int = Field(default=128, ge=1)
    init_std: float = Field(default=0.02, gt=0)

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "Deberta":
        return Deberta(self, head_width, width or heads * head_width, heads)


@final
class Deberta(NoPosition):
    """(q_i k_j + q_i kr_d + qr_d k_j) / sqrt(3E), d = clip(i - j, -reach, reach - 1), kr = W_k P, qr = W_q P + b.

    The factor 1 / sqrt(3) is put on the queries by `rotate`. Cost: 4 reach E operations for each query and each key of a head;
    the projection of 2 reach distances, once in decoding. Source: arXiv 2006.03654 eq. 4. Differs: qr is read at i - j, as the
    released code does (the paper writes j - i); each layer has its own P, where the paper's layers share one and project it; no
    absolute positions at the end.
    """

    kind = "deberta"
    parts = frozenset({"rotate", "bias"})

    def __init__(self, config: DebertaConfig, head_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.reach, self.heads = config.reach, heads
        self.embedding = nn.Parameter(torch.randn(2 * config.reach, width) * config.init_std)
        self.key = nn.Linear(width, heads * head_width, bias=False)
        self.query = nn.Linear(width, heads * head_width)
        self._kept = Kept()

    def rotate(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        return q * 3**-0.5, k

    def bias(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        index = back(q_pos, k_pos, self.kind).clamp(-self.reach, self.reach - 1) + self.reach
        keys, queries = self._kept(self, None, self._projected)
        asked = pick(q @ keys, index)
        asking = pick(self._scores(k, queries), index.mT).mT
        return (asked + asking * 3**-0.5) * q.shape[-1] ** -0.5

    def _projected(self) -> tuple[Tensor, ...]:
        """kr and qr, each [H,E,R]."""
        return tuple(part(self.embedding).unflatten(-1, (self.heads, -1)).permute(1, 2, 0) for part in (self.key, self.query))

    def _scores(self, k: Tensor, queries: Tensor) -> Tensor:
        """Keys [B,G,K,E] by the queries of the distances [H,E,R]: [B,H,K,R]."""
        grouped = queries.unflatten(0, (k.shape[1], -1))
        return (k.unsqueeze(2) @ grouped).flatten(1, 2)
