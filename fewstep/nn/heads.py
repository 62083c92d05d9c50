"""Extra heads that predict tokens beyond the next one: sequential modules and parallel heads.

Both read the trunk and share its embedding and unembedding. This file knows neither the trunk nor how drafts are verified.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.mixer import Context, State
from fewstep.core.recipe import Config
from fewstep.nn.ahead import Embed, MakeBlock
from fewstep.nn.blocks import Block, norm
from fewstep.nn.eagle import Eagle3HeadsConfig, EagleHeadsConfig
from fewstep.nn.medusa import HydraHeadsConfig, MedusaHeadsConfig


@final
class SequentialHeadsConfig(Config):
    """`depth` modules in sequence, each one block that also reads the embedding of the token before the one it predicts."""

    kind: ClassVar[str] = "mtp_sequential"
    source: ClassVar[str] = "DeepSeek-AI 2024, DeepSeek-V3, arXiv 2412.19437, section 2.2"
    drafter: ClassVar[str] = "mtp"

    depth: int = Field(default=3, ge=1, le=64)

    def build(self, *, width: int, vocab: int, trunk_depth: int, eps: float, make_block: MakeBlock) -> "SequentialHeads":
        return SequentialHeads(self.depth, width, eps, make_block)


@final
class ParallelHeadsConfig(Config):
    """`depth` extra one-block heads side by side on the trunk, beside its own last block, which predicts the next token."""

    kind: ClassVar[str] = "mtp_parallel"
    source: ClassVar[str] = "Gloeckle et al. 2024, arXiv 2404.19737"
    drafter: ClassVar[str] = "mtp"

    depth: int = Field(default=3, ge=1, le=64)

    def build(self, *, width: int, vocab: int, trunk_depth: int, eps: float, make_block: MakeBlock) -> "ParallelHeads":
        if trunk_depth < 2:
            raise ValueError(
                f"depth={trunk_depth}: parallel heads stand beside the trunk's last block; give the trunk at least 2"
            )
        return ParallelHeads(self.depth, width, eps, trunk_depth, make_block)


@final
class SequentialModule(nn.Module):
    """h'_i = Block(P [RMS(h_i); RMS(Emb(t_{i+k}))]): one prediction depth.

    Source: arXiv 2412.19437 eq. 21-23. Differs: what is projected is [embedding; hidden], as in the released checkpoints.
    """

    def __init__(self, width: int, eps: float, block: Block) -> None:
        super().__init__()
        self.embed_norm = nn.RMSNorm(width, eps=eps)
        self.hidden_norm = nn.RMSNorm(width, eps=eps)
        self.proj = nn.Linear(2 * width, width, bias=False)
        self.block = block
        self.norm = norm("rms", width, eps)
        self.packed: Any = None  # a packed.PackedJoin: `join` as one call, where the parts allow it

    def join(self, hidden: Tensor, embedded: Tensor, reads: Tensor | None = None) -> Tensor:
        """The block's input [B,T,D] from `embedded` [B,T,D] and, of `hidden` [B,S,D], the entries `reads` [B,T] (None: all)."""
        if self.packed is not None and self.packed.takes(embedded):
            return cast(Tensor, self.packed(embedded, hidden, reads))
        if reads is not None:
            hidden = hidden.gather(1, reads.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return self.proj(torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], -1))

    def forward(self, hidden: Tensor, embedded: Tensor, ctx: Context) -> Tensor:
        h, _ = self.block(self.join(hidden, embedded), ctx)
        return h

    def extend(
        self, hidden: Tensor, embedded: Tensor, ctx: Context, state: State, reads: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One cached step over new positions; hidden, embedded and reads as in `join`."""
        return self.block.extend(self.join(hidden, embedded, reads), ctx, state)


@final
class SequentialHeads(nn.Module):
    """DeepSeek-V3's multi-token prediction modules. Cost per module: one block and one unembedding.

    Module k (from 1) at position i reads the previous depth's activation at i (for k = 1 the trunk's tap "final") and the
    embedding of token i+k, and predicts token i+k+1.
    """

    tap = "final"

    def __init__(self, depth: int, width: int, eps: float, make_block: MakeBlock) -> None:
        super().__init__()
        self.depth = depth
        self.stages = nn.ModuleList(SequentialModule(width, eps, make_block()) for _ in range(depth))

    def module(self, k: int) -> SequentialModule:
        """The module of depth k = 1 .. depth."""
        stage = self.stages[k - 1]
        assert isinstance(stage, SequentialModule)
        return stage

    def forward(self, hidden: Tensor, tokens: Tensor, embed: Embed, ctx: Context) -> list[Tensor]:
        """Trunk activations [B,T,D] and tokens [B,T] -> per depth k the normed activations [B,T-k,D] that predict token i+k+1."""
        outputs: list[Tensor] = []
        embedded, h = embed(tokens), hidden
        for k in range(1, self.depth + 1):
            stage, count = self.module(k), max(0, tokens.shape[1] - k)
            h = stage(h[:, :count], embedded[:, k:], _cut(ctx, count, k))
            outputs.append(stage.norm(h))
        return outputs


@final
class ParallelHeads(nn.Module):
    """Gloeckle's parallel heads: one block and one norm each on the residual before the trunk's last block.

    Head k (from 1) at position i predicts token i+k+1. Differs: a norm of its own per head, where the paper shares one.
    """

    def __init__(self, depth: int, width: int, eps: float, trunk_depth: int, make_block: MakeBlock) -> None:
        super().__init__()
        self.depth = depth
        self.tap = f"layer.{trunk_depth - 2}"
        self.blocks = nn.ModuleList(make_block() for _ in range(depth))
        self.norms = nn.ModuleList(norm("rms", width, eps) for _ in range(depth))

    def block(self, k: int) -> Block:
        """The block of head k = 1 .. depth."""
        block = self.blocks[k - 1]
        assert isinstance(block, Block)
        return block

    def forward(self, hidden: Tensor, tokens: Tensor, embed: Embed, ctx: Context) -> list[Tensor]:
        """Trunk activations [B,T,D] -> per depth k the normed activations [B,T-k,D] that predict token i+k+1."""
        outputs = []
        for k, (block, head_norm) in enumerate(zip(self.blocks, self.norms, strict=True), 1):
            count = max(0, tokens.shape[1] - k)
            h, _ = block(hidden[:, :count], _cut(ctx, count, k))
            outputs.append(head_norm(h))
        return outputs


def _cut(ctx: Context, count: int, k: int) -> Context:
    """The context of the first `count` positions for depth k; one whose token i+k is of another segment becomes padding."""
    segments = ctx.segments
    assert ctx.positions is not None, "a parallel pass has no state to count positions"
    if segments is not None:
        segments = torch.where(segments[:, :count] == segments[:, k:], segments[:, :count], -1)
    return Context(ctx.positions[:, :count], segments=segments, mask=ctx.mask)


HEADS: Mapping[str, type[Config]] = MappingProxyType(
    {
        c.kind: c
        for c in (
            SequentialHeadsConfig,
            ParallelHeadsConfig,
            MedusaHeadsConfig,
            HydraHeadsConfig,
            EagleHeadsConfig,
            Eagle3HeadsConfig,
        )
    }
)
