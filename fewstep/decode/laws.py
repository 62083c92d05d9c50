"""Laws: what a request samples from, given logits and the history along each path of a tree.

One transform serves target and draft logits, so that speculation keeps the law. This file knows no loop, drafter or model.
"""

from collections.abc import Sequence
from typing import final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.draft import Verdict
from fewstep.core.mixer import Tree, ancestors
from fewstep.core.recipe import Config
from fewstep.nn.kernels import argmax

_RANKED = 128  # tokens looked at before a whole vocabulary is sorted: a nucleus is nearly always smaller


class SamplingConfig(Config):
    """How one request samples: penalty, temperature, top-k, top-p and min-p, applied in that order.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.
    """

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def build(self, batch: int, vocab: int, device: torch.device | str = "cpu") -> "Sampling":
        """The law of `batch` requests that all sample this way."""
        return Sampling.of([self] * batch, vocab, device)


@final
class Sampling:
    """The `Law` of a batch whose rows may each sample differently.

    Cost: one softmax in float64 per node; top-k and top-p add a partial sort. State: one byte per vocabulary entry and row
    while any row has a penalty, else nothing.
    Source: Holtzman et al. 2020, arXiv 1904.09751 (top-p); Nguyen et al. 2025, arXiv 2407.01082 (min-p); Keskar et al. 2019,
    arXiv 1909.05858 (penalty, over prompt and output, a negative logit multiplied).
    Differs: tokens that tie with the last one kept by top-k or top-p are kept too, so that no order of equal logits matters.
    """

    def __init__(self, knobs: Tensor, vocab: int, seen: Tensor | None) -> None:
        """`knobs` [B,5] float64: temperature, top-k, top-p, min-p, penalty. `seen` [B,V] uint8: the history, if it matters."""
        self._knobs, self._vocab, self._seen = knobs, vocab, seen
        temperature, top_k, top_p, min_p, penalty = knobs[:, :, None, None].unbind(1)  # each [B,1,1]
        self._temperature = torch.where(temperature > 0, temperature, 1.0)
        self._cold, self._top_k, self._top_p, self._min_p = temperature == 0, top_k.long().clamp(max=vocab), top_p, min_p
        self._penalty = penalty
        facts = (
            torch.stack([self._cold.all(), self._cold.any(), (top_p < 1).any(), self._top_k.amax()]).tolist()
            if len(knobs)
            else [1] * 4
        )
        self._all_cold, self._any_cold, self._nucleus, self._widest = (
            bool(facts[0]),
            bool(facts[1]),
            bool(facts[2]),
            int(facts[3]),
        )

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig], vocab: int, device: torch.device | str = "cpu") -> "Sampling":
        """One row per config, with an empty history over a vocabulary of `vocab` tokens."""
        knobs = [[c.temperature, c.top_k, c.top_p, c.min_p, c.repetition_penalty] for c in configs]
        penalised = any(c.repetition_penalty != 1 for c in configs)
        seen = torch.zeros(len(configs), vocab, dtype=torch.uint8, device=device) if penalised else None
        return cls(torch.tensor(knobs, dtype=torch.float64, device=device).reshape(-1, 5), vocab, seen)

    @property
    def greedy(self) -> bool:
        return self._all_cold and self._seen is None

    def __call__(self, logits: Tensor, tree: Tree, nodes: Tensor | None = None) -> Tensor:
        if self._seen is not None:
            logits = self._penalised(logits.double(), tree, nodes, self._seen)
        best = argmax(logits)  # ties: the lowest index
        if self._all_cold:
            return best
        top = logits.gather(-1, best.unsqueeze(-1)).double()
        weight = ((logits.double() - top) / self._temperature).exp_()  # in [0, 1], 1 at the best token
        weight.masked_fill_(weight < self._threshold(weight), 0.0)
        weight /= weight.sum(-1, keepdim=True)
        if self._any_cold:  # a greedy request in a sampling batch: a point mass
            weight = torch.where(self._cold, torch.zeros_like(weight).scatter_(-1, best.unsqueeze(-1), 1.0), weight)
        return weight

    def commit(self, tree: Tree, verdict: Verdict) -> "Sampling":
        if self._seen is None:
            return self
        path = verdict.path
        kept = torch.arange(path.shape[1], device=path.device) < verdict.keep[:, None]
        seen = self._seen.scatter_reduce(1, tree.tokens.gather(1, path), kept.to(torch.uint8), "amax")
        return Sampling(self._knobs, self._vocab, seen)

    def fork(self, rows: Tensor) -> "Sampling":
        return Sampling(self._knobs[rows], self._vocab, None if self._seen is None else self._seen[rows])

    def join(self, other: "Sampling") -> "Sampling":
        seen = None if self._seen is None and other._seen is None else torch.cat([self._history(), other._history()])
        return Sampling(torch.cat([self._knobs, other._knobs]), self._vocab, seen)

    def nbytes(self) -> int:
        return self._knobs.nbytes + (0 if self._seen is None else self._seen.nbytes)

    def _history(self) -> Tensor:
        if self._seen is not None:
            return self._seen
        # rows without a penalty recorded nothing, and nothing is what they need
        return torch.zeros(len(self._knobs), self._vocab, dtype=torch.uint8, device=self._knobs.device)

    def _penalised(self, logits: Tensor, tree: Tree, nodes: Tensor | None, seen: Tensor) -> Tensor:
        on_path = ancestors(tree.parent)  # [B,N,N]
        if nodes is not None:
            on_path = on_path.gather(1, nodes.unsqueeze(-1).expand(-1, -1, tree.size))
        tokens = tree.tokens.unsqueeze(1).expand_as(on_path)
        history = seen.unsqueeze(1).expand_as(logits).scatter_reduce(2, tokens, on_path.to(torch.uint8), "amax")
        return torch.where(history > 0, torch.where(logits > 0, logits / self._penalty, logits * self._penalty), logits)

    def _threshold(self, weight: Tensor) -> Tensor:
        """[B,K,1] the smallest weight that top-k, top-p and min-p all keep; never above 1, the best token's weight."""
        if not (self._widest or self._nucleus):
            return self._min_p
        size = min(self._vocab, max(self._widest, _RANKED if self._nucleus else 1))
        ranked = weight.topk(size).values  # descending
        index = (self._top_k - 1).clamp(min=0).expand(*weight.shape[:2], 1)
        floor = torch.where(self._top_k > 0, ranked.gather(-1, index), 0.0)
        if self._nucleus:
            floor = torch.maximum(floor, self._nucleus_edge(weight, ranked, floor))
        return torch.maximum(floor, self._min_p)

    def _nucleus_edge(self, weight: Tensor, ranked: Tensor, floor: Tensor) -> Tensor:
        """[B,K,1] the weight of the last token of the nucleus: the heaviest tokens until their mass reaches top_p."""
        goal = self._top_p * (weight * (weight >= floor)).sum(-1, keepdim=True)
        inside = _mass_before(ranked, floor) < goal
        if ranked.shape[-1] < self._vocab and bool((inside[..., -1:] & (self._top_p < 1)).any()):
            ranked = weight.sort(descending=True).values  # a nucleus wider than what was ranked
            inside = _mass_before(ranked, floor) < goal
        edge = ranked.gather(-1, inside.sum(-1, keepdim=True) - 1)
        return torch.where(self._top_p < 1, edge, 0.0)


def _mass_before(ranked: Tensor, floor: Tensor) -> Tensor:
    kept = ranked * (ranked >= floor)
    return kept.cumsum(-1) - kept
