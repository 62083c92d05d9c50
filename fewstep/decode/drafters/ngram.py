"""Prompt lookup: what followed the last time the text ended like this. This file knows token histories and no network."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from fewstep.core.draft import Handle, Verdict
from fewstep.core.mixer import Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.config import DrafterConfig, Load


@final
class NgramConfig(DrafterConfig):
    """Look for the longest suffix of `min_ngram` to `max_ngram` tokens that occurred before and propose what followed.

    `depth` tokens are proposed for each of the `branches` best continuations that differ in their first token.
    """

    kind: ClassVar[str] = "ngram"
    source: ClassVar[str] = "Saxena 2023, prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding"
    claims: ClassVar[tuple[str, ...]] = ("spec-bench",)

    max_ngram: int = Field(default=4, ge=1, le=16)
    min_ngram: int = Field(default=2, ge=1)
    depth: int = Field(default=8, ge=1)
    branches: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "NgramConfig":
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram={self.min_ngram}: above max_ngram={self.max_ngram}; lower it")
        return self

    def build(self, target: Target, load: Load) -> "Ngram":
        return Ngram(self)


@final
class History:
    """The committed tokens of each row: `tokens` [B, edge+C], after `edge` columns of -1, and their number `lengths` [B]."""

    def __init__(self, tokens: Tensor, lengths: Tensor, edge: int, longest: int) -> None:
        self.tokens, self.lengths, self.edge, self.longest = tokens, lengths, edge, longest

    @classmethod
    def empty(cls, batch: int, capacity: int, edge: int, device: torch.device) -> "History":
        tokens = torch.zeros(batch, edge + capacity, dtype=torch.int64, device=device)
        tokens[:, :edge] = -1
        return cls(tokens, torch.zeros(batch, dtype=torch.int64, device=device), edge, 0)

    def extended(self, tokens: Tensor, count: Tensor) -> "History":
        """The history followed by the first `count[b]` of `tokens` [B,N]; writes in place, beyond the end of this one only."""
        place = self.edge + self.lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
        self.tokens.scatter_(1, place, tokens)  # what lies beyond `count` is overwritten by the next tokens
        lengths = self.lengths + count
        return History(self.tokens, lengths, self.edge, int(lengths.max()))

    def fork(self, rows: Tensor) -> "History":
        return History(self.tokens[rows], self.lengths[rows], self.edge, self.longest)

    def join(self, other: "History") -> "History":
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        tokens = [functional.pad(store, (0, width - store.shape[1])) for store in (self.tokens, other.tokens)]
        return History(torch.cat(tokens), torch.cat([self.lengths, other.lengths]), self.edge, max(self.longest, other.longest))

    def nbytes(self) -> int:
        return self.tokens.nbytes + self.lengths.nbytes


@final
class Ngram:
    """Chosen nodes: chains that hang from the root, the best match first.

    A longer match wins, then the more recent. A continuation that reaches the end of the text starts over at its own first
    token, since a text that repeats with period d most likely repeats again. State: 8 bytes per token.
    Cost: three passes over max_ngram times the row's history; no network.
    Differs: the most recent match instead of the oldest; several branches; the periodic continuation.
    """

    taps: tuple[str, ...] = ()
    prompt_taps: tuple[str, ...] = ()

    def __init__(self, config: NgramConfig) -> None:
        self.config = config

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> History:
        history = History.empty(prompt.batch, capacity, self.config.max_ngram, prompt.tokens.device)
        return history.extended(prompt.tokens, prompt.valid.sum(1))

    def propose(self, root: Tensor, state: History, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, History]:
        text = state.extended(root.unsqueeze(1), torch.ones_like(root))
        widest, depth = int(budget.max()), self.config.depth
        tokens, parent = [root.unsqueeze(1)], [torch.full_like(root, -1).unsqueeze(1)]
        rank = self._rank(text)
        step = torch.arange(depth, device=root.device)
        for first in range(1, min(widest, 1 + self.config.branches * depth), depth):
            best, end = rank.max(1, keepdim=True)  # [B,1]
            if not bool((best >= 0).any()):
                break
            period = (text.lengths.unsqueeze(1) - 1 - end).clamp(min=1)
            branch = text.tokens.gather(1, text.edge + end + 1 + step % period)
            node = first + step
            valid = (best >= 0) & (node < budget.unsqueeze(1))
            tokens.append(torch.where(valid, branch, 0))
            parent.append(torch.where(valid, torch.where(step == 0, 0, node - 1), -2))
            if self.config.branches > 1:  # the next branch begins with another token
                follows = text.tokens[:, text.edge + 1 : text.edge + 1 + rank.shape[1]]
                rank = torch.where(follows == branch[:, :1], -1, rank)
        return Tree(torch.cat(tokens, 1)[:, :widest], torch.cat(parent, 1)[:, :widest]), state

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: History) -> History:
        return state.extended(tree.tokens.gather(1, verdict.path), verdict.keep)

    def _rank(self, text: History) -> Tensor:
        """[B,P] for every place where an earlier occurrence may end: how good the match is, -1 where it is none."""
        places, most = text.longest - 1, self.config.max_ngram
        back = torch.arange(most, device=text.tokens.device)
        suffix = text.tokens.gather(1, text.lengths.unsqueeze(1) + back)  # the last tokens: the edge is as wide as the suffix
        windows = text.tokens[:, 1 : most + places].unfold(1, most, 1)  # [B,P,most]: window i ends at token i
        # the match begins after the last disagreement, and a window that runs into the edge always disagrees there
        misses = ((windows != suffix.unsqueeze(1)) * (back + 1).to(torch.int8)).amax(2)
        index = torch.arange(places, device=back.device)
        found = (misses <= most - self.config.min_ngram) & (index < text.lengths.unsqueeze(1) - 1)
        return torch.where(found, torch.sub(index + most * places, misses, alpha=places), -1)
