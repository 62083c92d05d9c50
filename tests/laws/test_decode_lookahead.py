"""Lookahead: what it proposes against the paper's window and pool written out literally, budgets, forks, exactness."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_decode_mtp import Spy, no_load, prompts_of, tiny

from fewstep.core.draft import Verdict
from fewstep.core.mixer import Tree
from fewstep.decode.drafters.lookahead import Lookahead, LookaheadConfig, Rounds
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.models.decoder import Decoder

SETTINGS = {
    "small": LookaheadConfig(window=3, ngram=4, from_text=False),
    "bigrams": LookaheadConfig(window=4, ngram=2, from_text=False),
    "one column": LookaheadConfig(window=1, ngram=5, pool=2, from_text=False),
    "wide": LookaheadConfig(window=5, ngram=3, pool=3, from_text=False),
    "with text": LookaheadConfig(),
}


class TraceSpy(Spy):
    """Also the parents of what was proposed."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.trees: list[Tree] = []

    def propose(self, *arguments: Any) -> Any:
        tree, state = self.inner.propose(*arguments)
        self.trees.append(tree)
        return tree, state


def paths(tree: Tree) -> set[tuple[int, ...]]:
    """The tokens from the root to each node but the root."""
    tokens, parent = tree.tokens[0].tolist(), tree.parent[0].tolist()
    found: list[tuple[int, ...]] = [()]
    for node in range(1, tree.size):
        found.append((*found[parent[node]], tokens[node]))
    assert len(set(found)) == len(found)  # nothing is asked twice
    return set(found[1:])


class Literal:
    """Lookahead decoding of one text as the paper tells it: guesses by place and round, every guess from a plain forward pass."""

    def __init__(self, model: Decoder, config: LookaheadConfig, prompt: Sequence[int]) -> None:
        self.model, self.config = model, config
        self.window = [[prompt[(c + j) % len(prompt)] for c in range(config.window)] for j in range(config.ngram - 1)]
        self.pool: list[tuple[int, ...]] = []
        self.read(prompt, len(prompt))

    def add(self, ngram: tuple[int, ...]) -> None:
        self.pool = [known for known in self.pool if known != ngram] + [ngram]
        same = [known for known in self.pool if known[0] == ngram[0]]
        if len(same) > self.config.pool:
            self.pool.remove(same[0])

    def read(self, text: Sequence[int], new: int) -> None:
        n = self.config.ngram
        for end in range(max(n, len(text) - new + 1), len(text) + 1):
            if self.config.from_text:
                self.add(tuple(text[end - n : end]))

    def columns(self, budget: int) -> list[tuple[int, ...]]:
        """Each column as a continuation of the root: the oldest guesses up to it, then its own newer ones."""
        n, columns = self.config.ngram, 0
        while columns < self.config.window and (columns + 1) * (n - 1) - 1 + n - 1 <= budget - 1:
            columns += 1
        return [
            (*self.window[0][1 : c + 1], *(self.window[j][c] for j in range(1, self.config.ngram - 1))) for c in range(columns)
        ]

    def expected(self, root: int, budget: int) -> set[tuple[int, ...]]:
        columns = self.columns(budget)
        left = budget - 1 - max(0, len(columns) * (self.config.ngram - 1) - 1)
        nodes: list[tuple[int, ...]] = []
        for ngram in reversed([known[1:] for known in self.pool if known[0] == root]):
            for length in range(1, len(ngram) + 1):
                if ngram[:length] not in nodes and len(nodes) < left:
                    nodes.append(ngram[:length])
                elif ngram[:length] not in nodes:
                    break
        return set(nodes) | {column[:length] for column in columns for length in range(1, len(column) + 1)}

    def advance(self, committed: Sequence[int], budget: int) -> None:
        columns = self.columns(budget)
        newest = []
        for column in columns:
            logits = self.model.unembed(self.model(torch.tensor([[*committed, *column]])).final)
            newest.append(int(logits[0, -1].argmax()))
        for c, token in enumerate(newest):
            first = committed[-1] if c == 0 else self.window[0][c]
            self.add((first, *(self.window[j][c] for j in range(1, self.config.ngram - 1)), token))
        if newest:
            beyond = list(committed[-self.config.window :])
            rest = [beyond[c % len(beyond)] for c in range(len(newest), self.config.window)]
            self.window = [*self.window[1:], newest + rest]


@pytest.mark.parametrize("budget", [16, 9, 4])
@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_proposals_are_the_papers(name: str, budget: int, seed: int) -> None:
    model, config = tiny("mtp_sequential", seed), SETTINGS[name]
    prompt = prompts_of(seed, model.vocab, [6])[0]
    spy = TraceSpy(config.build(model, no_load))
    out = decode(model, spy, [prompt], Settings(max_new_tokens=30, budget=budget))[0]
    literal = Literal(model, config, prompt)
    text, emitted = [*prompt, out.tokens[0]], 1
    for tree, accepted in zip(spy.trees, out.accepted, strict=True):
        room = min(budget, 30 - emitted)
        literal.read(text, 1)
        assert paths(tree) == literal.expected(text[-1], room)
        assert tree.size <= room and tree.q is None
        literal.advance(text, room)
        drafted = out.tokens[emitted : emitted + accepted]
        literal.read([*text, *drafted], accepted)
        text += out.tokens[emitted : emitted + accepted + 1]
        emitted += accepted + 1
    assert len(spy.trees) > 2 and bool(literal.pool) == (config.from_text or bool(literal.columns(budget)))


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_is_plain_decoding_and_drafts_are_accepted(name: str, seed: int) -> None:
    model = tiny("mtp_sequential", seed, vocab=3)  # so few tokens that guesses come true
    prompts = prompts_of(seed, model.vocab, [6, 1, 2, 12])
    plain = decode(model, SilentConfig().build(model, no_load), prompts, Settings(max_new_tokens=60))
    drafted = decode(model, SETTINGS[name].build(model, no_load), prompts, Settings(max_new_tokens=60))
    assert [row.tokens for row in drafted] == [row.tokens for row in plain]
    assert sum(sum(row.accepted) for row in drafted) > 0


def test_a_row_alone_is_the_row_in_a_batch(seed: int) -> None:
    model = tiny("mtp_sequential", seed)
    prompts = prompts_of(seed, model.vocab, [5, 1, 9])
    drafter, sampling = LookaheadConfig(ngram=3).build(model, no_load), SamplingConfig(temperature=1.0, top_p=0.95)
    settings = Settings(max_new_tokens=[15, 4, 22])
    together = decode(model, drafter, prompts, settings, sampling=sampling, seed=seed)
    for prompt, row, limit in zip(prompts, together, (15, 4, 22), strict=True):
        alone = decode(model, drafter, [prompt], Settings(max_new_tokens=limit), sampling=sampling, seed=seed)[0]
        assert (alone.tokens, alone.accepted) == (row.tokens, row.accepted)


def step(drafter: Lookahead, state: Rounds, roots: list[int], seed: int) -> tuple[Tree, Rounds]:
    """One proposal and its verdict, with logits that depend on the row's root alone."""
    handle: Any = None
    tree, state = drafter.propose(torch.tensor(roots), state, handle, torch.tensor([16] * len(roots)), handle)
    table = torch.randn(11, 16, 11, generator=torch.Generator().manual_seed(seed))
    logits = table[torch.tensor(roots), : tree.size]
    keep = torch.ones(len(roots), dtype=torch.int64)
    return tree, drafter.observe(tree, Verdict(torch.zeros_like(tree.tokens), keep, keep), {"logits": logits}, state)


def test_forks_and_joins_go_on_as_rows_of_their_own(seed: int) -> None:
    drafter = LookaheadConfig(ngram=3).build(tiny("mtp_sequential", seed), no_load)
    prompts = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(seed))

    def begun() -> Rounds:
        return step(drafter, drafter.init(Tree.chain(prompts), {}, 0), [3, 4], seed)[1]

    one = begun()
    forked = one.fork(torch.tensor([1, 0, 1])).join(begun())
    trees = []
    for _ in range(3):
        tree, forked = step(drafter, forked, [5, 6, 7, 5, 6], seed)
        trees.append(tree)
    for row, (source, root) in enumerate(((1, 5), (0, 6), (1, 7), (0, 5), (1, 6))):
        state = begun().fork(torch.tensor([source]))
        for tree in trees:
            alone, state = step(drafter, state, [root], seed)
            valid = int(alone.valid.sum())
            assert tree.tokens[row, :valid].tolist() == alone.tokens[0, :valid].tolist()
            assert tree.parent[row, :valid].tolist() == alone.parent[0, :valid].tolist()
    assert one.rows[0].text == [*prompts[0].tolist(), 3] and forked.nbytes() > one.nbytes() > 0
