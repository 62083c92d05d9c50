"""Lookahead decoding: n-grams harvested from Jacobi iterations that ride along in the target's own calls. No draft network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

from pydantic import Field
from torch import Tensor

from fewstep.core.draft import Handle, Verdict
from fewstep.core.mixer import Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.drafters.memory import Memories
from fewstep.decode.drafters.trie import Trie, planted


@final
class LookaheadConfig(DrafterConfig):
    """Guess `window` future places at once, keep what `ngram` - 1 rounds of guesses made of them, propose what fits.

    Up to `pool` n-grams are kept per first token, the latest. `from_text`: the n-grams of prompt and output join them (in
    the paper's code an option for the prompt's).
    """

    kind: ClassVar[str] = "lookahead"
    source: ClassVar[str] = "Fu et al. 2024, lookahead decoding, arXiv 2402.02057"
    claims: ClassVar[tuple[str, ...]] = ("spec-bench",)

    window: int = Field(default=2, ge=1)
    ngram: int = Field(default=6, ge=2)
    pool: int = Field(default=8, ge=1)
    from_text: bool = True

    def build(self, target: Target, load: Load) -> "Lookahead":
        return Lookahead(self)


@final
@dataclass(slots=True)
class Row:
    """What one row remembers.

    `text`: its tokens. `pool`: by first token the other tokens of its n-grams, oldest first. `guesses[j][c]`: the guess of round
    j, oldest first, for the place c + j after the root; what stands at guesses[0][0] is never read, as the root is known there.
    `asked[c]`: the node of the proposed tree whose prediction continues column c.
    """

    text: list[int]
    guesses: list[list[int]]
    pool: dict[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def copy(self) -> "Row":
        return Row(self.text.copy(), [level.copy() for level in self.guesses], self.pool.copy(), self.asked.copy())

    def nbytes(self) -> int:
        """Bytes of the numbers held, 8 each."""
        ngrams = sum(1 + sum(map(len, kept)) for kept in self.pool.values())
        return 8 * (len(self.text) + sum(map(len, self.guesses)) + ngrams + len(self.asked))


Rounds = Memories[Row]


@final
class Lookahead:
    """Chosen nodes: n-grams of the pool that begin with the root, and the window's guesses, merged into one tree.

    The window is a tree as it stands: its oldest guesses are a chain from the root, and from each of its nodes hang the newer
    guesses of that column, so that the guess of round j in column c lies at depth c + j and sees the oldest guesses up to column
    c and its own column: the mask and the positions of the paper's figure 2. The target's likeliest token at the end of a column
    is its newest guess; the column with it is an n-gram for the pool, and the oldest round is dropped.

    Of a budget of n nodes one is the root's; the window takes as many columns as leave room for one n-gram, at most `window`: c
    columns need c (N - 1) - 1 nodes; the n-grams take the rest, the latest first. Nodes common to both are counted once.

    Cost: no network; V comparisons per node and about 100 us of bookkeeping per row. Source: arXiv 2402.02057, sections 3.1-3.3,
    with its code's defaults: the window moves one place a step however many tokens were accepted, and begins with tokens of the
    prompt. Differs: it begins with all rounds filled; guesses can be accepted like n-grams; guesses of sampled rows are greedy.
    """

    taps: tuple[str, ...] = ("logits",)
    prompt_taps: tuple[str, ...] = ()

    def __init__(self, config: LookaheadConfig) -> None:
        self.config = config

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> Rounds:
        rows = []
        for tokens, count in zip(prompt.tokens.tolist(), prompt.valid.sum(1).tolist(), strict=True):
            text, (width, rounds) = tokens[:count], (self.config.window, self.config.ngram - 1)
            guesses = [[text[(c + j) % count] for c in range(width)] for j in range(rounds)]
            row = Row([], guesses)
            self._read(row, text)
            rows.append(row)
        return Memories(tuple(rows))

    def propose(self, root: Tensor, state: Rounds, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, Rounds]:
        tries = []
        for row, token, most in zip(state.rows, root.tolist(), budget.tolist(), strict=True):
            self._read(row, [token])  # the root is certain, whatever the verdict
            tries.append(self._row(row, token, most))
        return planted(tries, root.device), state

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: Rounds) -> Rounds:
        if tree.size == 1:
            return state
        following = hidden["logits"].argmax(-1).tolist()
        kept = tree.tokens.gather(1, verdict.path).tolist()
        for row, best, tokens, keep in zip(state.rows, following, kept, verdict.keep.tolist(), strict=True):
            self._advance(row, tokens[0], [best[node] for node in row.asked])
            self._read(row, tokens[1:keep])
        return state

    def _row(self, row: Row, root: int, budget: int) -> Trie:
        depth = self.config.ngram - 1
        columns = max(0, min(self.config.window, (budget - depth) // depth))
        trie = Trie(root)
        size = budget - max(0, columns * depth - 1)
        for ngram in reversed(row.pool.get(root, ())):
            trie.insert(ngram, size=size)
        row.asked = []
        for c in range(columns):
            oldest = row.guesses[0][1 : c + 1]
            row.asked.append(trie.insert([*oldest, *(row.guesses[j][c] for j in range(1, depth))]))
        return trie

    def _advance(self, row: Row, root: int, newest: Sequence[int]) -> None:
        """Harvest the n-grams that the newest guesses complete and move the window by one place."""
        guesses = row.guesses
        guesses[0][0] = root
        for c, token in enumerate(newest):
            self._keep(row, [level[c] for level in guesses] + [token])
        if newest:
            beyond = row.text[-self.config.window :]  # columns that a small budget left out start over
            guesses.append([*newest, *(beyond[c % len(beyond)] for c in range(len(newest), self.config.window))])
            del guesses[0]

    def _keep(self, row: Row, ngram: Sequence[int]) -> None:
        first, rest = ngram[0], tuple(ngram[1:])
        others = tuple(known for known in row.pool.get(first, ()) if known != rest)
        row.pool[first] = (*others, rest)[-self.config.pool :]

    def _read(self, row: Row, tokens: Sequence[int]) -> None:
        row.text.extend(tokens)
        if self.config.from_text:
            for end in range(max(self.config.ngram, len(row.text) - len(tokens) + 1), len(row.text) + 1):
                self._keep(row, row.text[end - self.config.ngram : end])
