"""Which tokens see which in sparse attention, by their places alone, and how queries are grouped so that few keys are touched.

A pattern is the union of what is near and what is far; each of the two is computed for groups of queries that share their keys.
This file knows no attention.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.core.recipe import Config


@final
@dataclass(frozen=True, eq=False)
class Piece:
    """G groups of queries and the keys they share: `queries` [G,M], `keys` [G,N] (token numbers, beyond `count` where a group is
    short) and `allowed` [G,M,N]. Every token is a query once."""

    queries: Tensor
    keys: Tensor
    allowed: Tensor
    count: int

    def pick_queries(self, x: Tensor) -> Tensor:
        """x [B,H,T,...] in groups [B,H,G,M,...]."""
        return _pick(x, self.queries, self.count)

    def pick_keys(self, x: Tensor) -> Tensor:
        """x [B,H,T,...] in groups [B,H,G,N,...]."""
        return _pick(x, self.keys, self.count)

    def restore(self, x: Tensor) -> Tensor:
        """x [B,H,G,M,...] in the order of the tokens [B,H,T,...]."""
        return x.flatten(2, 3).index_select(2, self._order)

    @cached_property
    def _order(self) -> Tensor:
        return self.queries.flatten().argsort()[: self.count]


def _pick(x: Tensor, index: Tensor, count: int) -> Tensor:
    return x.index_select(2, index.clamp(0, count - 1).flatten()).unflatten(2, index.shape)


class Pattern(Config):
    """What a token may see beside itself. Places are token numbers in a sequence, int64 tensors that broadcast."""

    @abstractmethod
    def near(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether `key` is in the neighbourhood of `query`, on whichever side; a token is near itself."""

    @abstractmethod
    def far(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether `query` sees `key` however far it is."""

    @abstractmethod
    def groups(self, count: int, behind: bool, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(queries [G,M], keys [G,N]) that hold all that is near, and the same of what is far, of `count` tokens.

        `behind`: keys that come after their query need not be there.
        """

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a token at place `query` sees the one at `key`, causality apart."""
        return self.near(query, key) | self.far(query, key)

    def pieces(self, count: int, causal: bool, device: torch.device) -> tuple[Piece, Piece]:
        """The pattern over a sequence of `count` tokens; no pair of tokens is in both pieces."""
        near, far = (self._grid(*group, count, causal) for group in self.groups(count, causal, device))
        (queries, keys, real), (far_queries, far_keys, far_real) = near, far
        far_allowed = self.far(far_queries, far_keys) & ~self.near(far_queries, far_keys) & far_real
        return (
            Piece(queries.squeeze(2), keys.squeeze(1), self.near(queries, keys) & real, count),
            Piece(far_queries.squeeze(2), far_keys.squeeze(1), far_allowed, count),
        )

    @staticmethod
    def _grid(queries: Tensor, keys: Tensor, count: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Both as they broadcast, [G,M,1] and [G,1,N], and which pairs there are."""
        query, key = queries.unsqueeze(2), keys.unsqueeze(1)
        real = (key >= 0) & (key < count) & (query < count)
        return query, key, real & (key <= query) if causal else real


def _band(count: int, size: int, reach: int, behind: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Runs of `size` queries, each with the `reach` runs of keys before it, its own, and as many after it."""
    start = torch.arange(0, count, size, device=device).unsqueeze(1)
    keys = torch.arange(-reach * size, size if behind else (reach + 1) * size, device=device)
    return start + torch.arange(size, device=device), start + keys


def _residues(count: int, block: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks that are a multiple of `stride` blocks apart, together."""
    rounds = -(-count // (block * stride))
    tokens = torch.arange(rounds * stride * block, device=device).view(rounds, stride, block).transpose(0, 1).flatten(1)
    return tokens, tokens


def _columns(count: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """All queries with the same `keys`."""
    return torch.arange(count, device=keys.device).unsqueeze(0), keys.unsqueeze(0)


@final
class StridedConfig(Pattern):
    """The last `stride` tokens and every `stride`-th one. Keys of a token: about stride + T / stride."""

    kind: ClassVar[str] = "strided"
    source: ClassVar[str] = "Child et al. 2019, arXiv 1904.10509, section 4.3"

    stride: int = Field(default=32, ge=1)

    def near(self, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() < self.stride

    def far(self, query: Tensor, key: Tensor) -> Tensor:
        return (query - key) % self.stride == 0

    def groups(self, count: int, behind: bool, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return _band(count, self.stride, 1, behind, device), _residues(count, 1, self.stride, device)


@final
class FixedConfig(Pattern):
    """A token's own block and the last `summary` tokens of every block. Keys of a token: about block + T summary / block."""

    kind: ClassVar[str] = "fixed"
    source: ClassVar[str] = "Child et al. 2019, arXiv 1904.10509, section 4.3"

    block: int = Field(default=32, ge=1)
    summary: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "FixedConfig":
        if self.summary > self.block:
            raise ValueError(f"summary={self.summary}: must be at most block={self.block}; lower it")
        return self

    def near(self, query: Tensor, key: Tensor) -> Tensor:
        return query // self.block == key // self.block

    def far(self, query: Tensor, key: Tensor) -> Tensor:
        return (key % self.block >= self.block - self.summary).expand(torch.broadcast_shapes(query.shape, key.shape))

    def groups(self, count: int, behind: bool, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        token = torch.arange(count, device=device)
        return _band(count, self.block, 0, behind, device), _columns(count, token[self.far(token[:1], token)])


@final
class WindowConfig(Pattern):
    """The last `window` tokens, itself included, and the first `sinks` of the sequence."""

    kind: ClassVar[str] = "window"
    source: ClassVar[str] = "Beltagy et al. 2020, arXiv 2004.05150; sinks: Xiao et al. 2023, arXiv 2309.17453"

    window: int = Field(default=64, ge=1)
    sinks: int = Field(default=4, ge=0)

    def near(self, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() < self.window

    def far(self, query: Tensor, key: Tensor) -> Tensor:
        return (key < self.sinks).expand(torch.broadcast_shapes(query.shape, key.shape))

    def groups(self, count: int, behind: bool, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        sinks = torch.arange(min(self.sinks, count), device=device)
        return _band(count, self.window, 1, behind, device), _columns(count, sinks)


@final
class BlocksConfig(Pattern):
    """Whole blocks: the last `local` ones, a token's own included, and every `stride`-th one, counted from its own."""

    kind: ClassVar[str] = "blocks"
    source: ClassVar[str] = "Gray et al. 2017, openai.com/index/block-sparse-gpu-kernels; BigBird arXiv 2007.14062 (blocks)"

    block: int = Field(default=16, ge=1)
    local: int = Field(default=2, ge=1)
    stride: int = Field(default=8, ge=1)

    def near(self, query: Tensor, key: Tensor) -> Tensor:
        return (query // self.block - key // self.block).abs() < self.local

    def far(self, query: Tensor, key: Tensor) -> Tensor:
        return (query // self.block - key // self.block) % self.stride == 0

    def groups(self, count: int, behind: bool, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        near = _band(count, self.block, self.local - 1, behind, device)
        return near, _residues(count, self.block, self.stride, device)


PATTERNS: Mapping[str, type[Config]] = MappingProxyType(
    {pattern.kind: pattern for pattern in (StridedConfig, FixedConfig, WindowConfig, BlocksConfig)}
)
