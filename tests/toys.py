"""Targets small enough to enumerate: one by table, whose next token depends on the last three tokens and the position, and random
decoders with any mixers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.mixer import Blocks, Mask, Tree
from fewstep.core.model import Output
from fewstep.core.recipe import parse
from fewstep.models.decoder import Decoder, DecoderConfig

_PERIOD = 5
_MAMBA = {"kind": "mamba2", "state": 4}  # thousands of rows hold one each
STACKS: Mapping[str, tuple[Any, ...]] = {  # recurrent and hybrid decoders by name: the mixers of their three layers
    "mamba2": (_MAMBA,),
    "linear": ("linear",),
    "hybrid": (_MAMBA, "attention", _MAMBA),
    "retnet": ("retnet",),
    "gated_deltanet": ("gated_deltanet",),
    "rwkv6": ("rwkv6",),
    "hybrid-attention-last": ("linear", "gated_deltanet", "attention"),
}


def random_decoder(mixers: tuple[Any, ...], vocab: int, seed: int) -> Decoder:
    """A decoder of three layers in float64 with three sequential heads; large weights, so that its choices vary."""
    values = {
        "vocab": vocab,
        "width": 16,
        "depth": 3,
        "query_heads": 2,
        "hidden": 24,
        "mixers": list(mixers),
        "heads": [{"kind": "mtp_sequential", "depth": 3}],
        "init_std": 0.3,
    }
    torch.manual_seed(seed)
    return parse(DecoderConfig, values).build().double().eval()


@dataclass
class TableState:
    """Committed tokens and pending nodes. Linear: using a state twice is an error, which catches loops that do."""

    tokens: Tensor  # [B,C]
    lengths: Tensor
    pending: Tensor  # [B,P]
    parent: Tensor
    spent: list[bool] = field(default_factory=lambda: [False])

    def consume(self) -> None:
        assert not self.spent[0], "a consumed state was used again"
        self.spent[0] = True

    def commit(self, path: Tensor, keep: Tensor) -> TableState:
        self.consume()
        tokens = self.tokens.clone()
        for i in range(int(keep.max())):
            kept = i < keep
            place = torch.where(kept, self.lengths + i, 0)
            value = torch.where(kept, self.pending.gather(1, path[:, i : i + 1]).squeeze(1), tokens[:, 0])
            tokens.scatter_(1, place.unsqueeze(1), value.unsqueeze(1))
        return TableState(tokens, self.lengths + keep, self.pending[:, :0], self.parent[:, :0])

    def rollback(self) -> TableState:
        self.consume()
        return TableState(self.tokens, self.lengths, self.pending[:, :0], self.parent[:, :0])

    def fork(self, rows: Tensor) -> TableState:
        assert not self.spent[0]
        return TableState(self.tokens[rows], self.lengths[rows], self.pending[rows], self.parent[rows])

    def join(self, other: TableState) -> TableState:
        self.consume()
        other.consume()
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        tokens = [nn.functional.pad(t, (0, width - t.shape[1])) for t in (self.tokens, other.tokens)]
        lengths = torch.cat([self.lengths, other.lengths])
        return TableState(
            torch.cat(tokens), lengths, torch.cat([self.pending, other.pending]), torch.cat([self.parent, other.parent])
        )

    def nbytes(self) -> int:
        return self.tokens.nbytes + self.lengths.nbytes

    def token(self, node: Tensor) -> Tensor:
        """The token at pending node `node`, at committed place `length + node` for negative nodes, -1 before the start."""
        committed = self.lengths.unsqueeze(1) + node
        history = self.tokens.gather(1, committed.clamp(0, self.tokens.shape[1] - 1))
        pending = self.pending.gather(1, node.clamp(min=0))
        return torch.where(node >= 0, pending, torch.where(committed >= 0, history, -1))

    def up(self, node: Tensor) -> Tensor:
        return torch.where(node >= 0, self.parent.gather(1, node.clamp(min=0)).clamp(min=-1), node - 1)


class TableModel(nn.Module):
    """A `Target` over `vocab` tokens. `near` is the share of its logits that comes from `like`: a draft model of some quality."""

    def __init__(self, vocab: int, seed: int, sharpness: float = 1.5, like: TableModel | None = None, near: float = 0.0) -> None:
        super().__init__()
        table = (
            sharpness
            * torch.randn(_PERIOD, vocab + 1, vocab + 1, vocab + 1, vocab, generator=torch.Generator().manual_seed(seed)).double()
        )
        self.table = nn.Parameter(table if like is None else near * like.table.detach() + (1 - near) * table, requires_grad=False)
        self.vocab = self.width = vocab
        self.depth = 1
        self.max_positions: int | None = None
        self.heads: dict[str, nn.Module] = {}
        self.calls = 0

    def embed(self, tokens: Tensor) -> Tensor:
        return nn.functional.one_hot(tokens, self.vocab).double()

    def unembed(self, h: Tensor, ids: Tensor | None = None) -> Tensor:
        return h if ids is None else h[..., ids]

    def init_state(self, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype) -> TableState:
        empty = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        tokens = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        return TableState(tokens, torch.zeros(batch, dtype=torch.int64, device=device), empty, empty)

    def extend(
        self,
        tree: Tree,
        state: TableState,
        *,
        taps: tuple[str, ...] = (),
        need: Tensor | None = None,
        mask: Mask | None = None,
        positions: Tensor | None = None,
        inputs: Tensor | None = None,
        layers: range | None = None,
    ) -> Output:
        state.consume()
        self.calls += 1
        first = state.pending.shape[1]
        new = TableState(
            state.tokens, state.lengths, torch.cat([state.pending, tree.tokens], 1), torch.cat([state.parent, tree.parent], 1)
        )
        if int((new.lengths + tree.valid.sum(1)).max()) > state.tokens.shape[1]:
            raise ValueError("over capacity")
        node = (first + torch.arange(tree.size)).expand_as(tree.tokens)
        parent, grand = new.up(node), new.up(new.up(node))
        depth, above = torch.zeros_like(node), parent
        while bool((above >= 0).any()):
            depth += above >= 0
            above = torch.where(above >= 0, new.up(above), above)
        position = new.lengths.unsqueeze(1) + depth
        logits = self.table[position % _PERIOD, new.token(node), new.token(parent), new.token(grand)]
        if layers is not None and inputs is None:  # early exit: a blunter law
            logits = logits / 2
        hidden = {name: logits if name == "logits" else self.embed(tree.tokens) for name in taps}
        return Output(logits if need is None else logits.gather(1, need.unsqueeze(-1).expand(-1, -1, self.vocab)), hidden, new)

    def after(self, tokens: list[int]) -> list[float]:
        """The logits after a whole sequence, by plain lookup."""
        last = [*reversed(tokens[-3:]), -1, -1, -1][:3]
        return self.table[(len(tokens) - 1) % _PERIOD, last[0], last[1], last[2]].tolist()


class MaskedTable(TableModel):
    """A block diffusion model near the table `like`: a token is told those known before it, and the one after it if it is known.

    Its mask is the id after the last of `like`.
    """

    def __init__(self, like: TableModel, seed: int, near: float) -> None:
        super().__init__(like.vocab, seed, like=like, near=near)
        self.mask_token, self.shifted, self.noisy = like.vocab, False, False
        self.vocab = self.width = like.vocab + 1

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        return self, self

    def extend(
        self,
        tree: Tree,
        state: TableState,
        *,
        taps: tuple[str, ...] = (),
        need: Tensor | None = None,
        mask: Mask | None = None,
        positions: Tensor | None = None,
        inputs: Tensor | None = None,
        layers: range | None = None,
    ) -> Output:
        assert isinstance(mask, Blocks), "block diffusion reads in blocks"
        output = super().extend(tree, state)
        new: Any = output.state
        node = torch.arange(tree.size).expand_as(tree.tokens)
        position = new.lengths.unsqueeze(1) + node
        assert not bool((new.lengths % mask.size).any()), "the cache holds whole blocks"
        before = [new.up(node), new.up(new.up(node)), new.up(new.up(new.up(node)))]
        left, second, third = (self._known(new.token(each)) for each in before)
        after = self._known(nn.functional.pad(tree.tokens[:, 1:], (0, 1), value=self.mask_token))
        told = (after >= 0).unsqueeze(-1) * nn.functional.one_hot(after.clamp(min=0), self.mask_token)
        logits = nn.functional.pad(self.table[(position - 1) % _PERIOD, left, second, third] + 2 * told, (0, 1))
        if need is not None:
            logits = logits.gather(1, need.unsqueeze(-1).expand(-1, -1, self.vocab))
        return Output(logits, {}, new)

    def _known(self, tokens: Tensor) -> Tensor:
        return torch.where(tokens == self.mask_token, -1, tokens)
