"""How often a target takes what its heads foresee, measured on its own greedy continuations of held-out text.

The rank of each token under the heads that foresaw it says which nodes of any tree would have been accepted, so one pass
over the continuations scores every tree. This file knows no kind of heads.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.decode.drafters.silent import Silent
from fewstep.decode.drafters.tree import Path as NodePath
from fewstep.decode.drafters.tree import best_tree
from fewstep.decode.generate import decode
from fewstep.decode.stream import Settings
from fewstep.models.decoder import Decoder
from fewstep.training.objectives.ahead import Foresees

FILE = "acceptance.json"
RANKS = 10  # ranks told apart; a tree rarely wants more
SIZES = (2, 4, 8, 12, 16, 24, 32, 48, 64)


@final
@dataclass(frozen=True, slots=True)
class Acceptance:
    """`accuracies[d][r]` as in `HeadsConfig`; `expected[n]`: tokens per call of the best tree of n nodes, its root included, over
    `positions` positions of the target's own greedy text."""

    positions: int
    accuracies: tuple[tuple[float, ...], ...]
    expected: dict[int, float]

    def write(self, directory: Path) -> None:
        (directory / FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def show(self, console: Console) -> None:
        """Two tables: the share of tokens among the first r at each depth, and what trees of some sizes gain."""
        tops = (1, 2, 3, 5, RANKS)
        console.print(f"Accepted on {self.positions} positions of the target's own greedy text:", highlight=False)
        table = Table(box=SIMPLE_HEAD)
        for column in ("depth", *(f"top {top}" for top in tops)):
            table.add_column(column, justify="right")
        for depth, shares in enumerate(self.accuracies, 1):
            table.add_row(str(depth), *(f"{100 * sum(shares[:top]):.1f}%" for top in tops))
        console.print(table)
        trees = Table("nodes", *map(str, self.expected), box=SIMPLE_HEAD)
        trees.add_row("tokens per call", *(f"{value:.2f}" for value in self.expected.values()))
        console.print(trees)


@torch.inference_mode()
def measure(
    objective: Foresees, network: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int, batch: int = 32
) -> Acceptance:
    """The acceptance of the heads that `objective` trains; `prompts` of one length, continued by `new_tokens` each.

    Cost: the generation, and one parallel pass over it. Raises ValueError if the continuations are shorter than the heads reach.
    """
    ranks = []
    for start in range(0, len(prompts), batch):
        rows = [list(prompt) for prompt in prompts[start : start + batch]]
        done = decode(network, Silent(), rows, Settings(new_tokens))
        tokens = torch.tensor(
            [row + one.tokens for row, one in zip(rows, done, strict=True)], device=network.embedding.weight.device
        )
        ranks.append(ranks_of(objective, network, tokens, len(rows[0])))
    ranked = torch.cat(ranks)
    if not len(ranked):
        raise ValueError(f"model.new_tokens={new_tokens}: shorter than the heads reach; raise it")
    accuracies = _accuracies(ranked)
    sizes = [size for size in SIZES if size - 1 <= RANKS ** len(accuracies)]
    expected = {size: expected_tokens(ranked, best_tree(accuracies, size)) for size in sizes}
    return Acceptance(len(ranked), accuracies, expected)


def expected_tokens(ranks: Tensor, tree: Sequence[NodePath]) -> float:
    """Tokens per call of a tree of rank paths over positions whose tokens have `ranks` [P,depth]: 1 and the nodes that agree."""
    taken = sum(int((ranks[:, : len(path)] == ranks.new_tensor(path)).all(1).sum()) for path in tree)
    return 1 + taken / len(ranks)


def ranks_of(objective: Foresees, network: Decoder, tokens: Tensor, prompt: int) -> Tensor:
    """[P,depth] the ranks of the tokens of texts [B,T] under each depth, from every position whose next token is beyond `prompt`.

    Position i of a text has the ranks of its tokens i+2, i+3, ... under depths 1, 2, ...; the positions of a text are in order.
    """
    columns = []
    for k, logits in enumerate(objective.foresee(network, Batch(tokens)), 1):
        wanted = tokens[:, prompt + k :].unsqueeze(-1)  # token i + k + 1 for i = prompt - 1 and on
        foreseen = logits[:, prompt - 1 : -1]
        columns.append((foreseen > foreseen.gather(-1, wanted)).sum(-1))
    if not columns or not columns[-1].shape[1]:
        return tokens.new_zeros(0, len(columns))
    count = columns[-1].shape[1]
    return torch.stack([column[:, :count] for column in columns], -1).flatten(0, 1)


def _accuracies(ranks: Tensor) -> tuple[tuple[float, ...], ...]:
    shares = []
    alive = torch.ones_like(ranks[:, 0], dtype=torch.bool)
    for column in ranks.unbind(1):
        counts = torch.bincount(column[alive].clamp(max=RANKS), minlength=RANKS + 1)[:RANKS]
        shares.append(tuple((counts / alive.sum().clamp(min=1)).tolist()))
        alive &= column < RANKS
    return tuple(shares)
