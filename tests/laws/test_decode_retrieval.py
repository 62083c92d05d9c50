"""Retrieval: automaton and corpus against brute force, proposals, forks, damaged files; exact whatever is retrieved."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exactness import cells, chi_square, draws, joint_law
from test_decode_greedy import circling, plain, prompts, tokens_of
from toys import TableModel

from fewstep.core.draft import Verdict
from fewstep.core.mixer import Tree
from fewstep.decode.drafters.automaton import SuffixAutomaton
from fewstep.decode.drafters.corpus import HEADER, ORDER, TOKENS, Corpus, places_by_past, write_corpus
from fewstep.decode.drafters.retrieval import Retrieval, RetrievalConfig, Texts
from fewstep.decode.drafters.trie import Trie
from fewstep.decode.laws import SamplingConfig

VOCAB = 7


def texts(seed: int, count: int = 30) -> list[list[int]]:
    """Random texts over one to four letters, one of them long and all the same, one a short period."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(1, 5, (count,), generator=generator).tolist()
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    made = [torch.randint(k, (n,), generator=generator).tolist() for k, n in zip(letters, lengths, strict=True)]
    return [*made, [3] * 100, [0, 1, 2] * 20]


def longest_repeated_ending(text: Sequence[int]) -> tuple[int, int]:
    """Its length, and where its latest earlier occurrence ends."""
    for length in range(len(text) - 1, 0, -1):
        for end in range(len(text) - 2, length - 2, -1):
            if list(text[end + 1 - length : end + 1]) == list(text[-length:]):
                return length, end
    return 0, -1


def test_the_automaton_finds_the_longest_repeated_ending(seed: int) -> None:
    for text in texts(seed):
        automaton = SuffixAutomaton(VOCAB)
        for i, token in enumerate(text, 1):
            automaton.extend([token])
            assert automaton.match() == longest_repeated_ending(text[:i])


def test_a_copy_grows_on_its_own(seed: int) -> None:
    for text in texts(seed, 10):
        half = len(text) // 2
        one = SuffixAutomaton(VOCAB)
        one.extend(text[:half])
        other = one.copy()
        one.extend(text[half:])
        other.extend(reversed(text))
        assert one.match() == longest_repeated_ending(text)
        assert other.match() == longest_repeated_ending([*text[:half], *reversed(text)])
        assert one.text == text and one.nbytes() > 0


def test_what_follows_repeats_with_its_period() -> None:
    automaton = SuffixAutomaton(10)
    automaton.extend([9, 1, 2, 3, 1, 2, 3, 1])
    length, end = automaton.match()
    assert (length, end) == (4, 4)
    assert automaton.following(end, 7) == [2, 3, 1, 2, 3, 1, 2]
    assert automaton.following(0, 3) == [1, 2, 3]


@pytest.mark.parametrize("reach", [1, 2, 3, 7, 16])
def test_places_are_sorted_by_their_past(reach: int, seed: int) -> None:
    for text in texts(seed, 8):
        pasts = [text[max(0, end + 1 - reach) : end + 1][::-1] for end in range(len(text))]
        assert places_by_past(np.array(text), reach).tolist() == sorted(range(len(text)), key=lambda end: (pasts[end], end))


def corpus_of(text: Sequence[int], directory: Path, **fields: Any) -> Corpus:
    write_corpus(directory, np.array(text), VOCAB, **fields)
    return Corpus(directory)


@pytest.mark.parametrize("reach", [3, 16])
def test_the_corpus_finds_the_longest_ending_and_all_that_follows(reach: int, seed: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number, text in enumerate(texts(seed, 12)):
        corpus = corpus_of(text, tmp_path / str(number), reach=reach)
        for context in [*texts(seed + number, 6), torch.randint(VOCAB, (5,), generator=generator).tolist(), text, [6]]:
            lengths = range(min(reach, len(context)), 0, -1)
            ends = {
                n: [end for end in range(n - 1, len(text)) if text[end + 1 - n : end + 1] == context[len(context) - n :]]
                for n in lengths
            }
            length = next((n for n in lengths if ends[n]), 0)
            expected = Counter(tuple(text[end + 1 : end + 5]) for end in ends.get(length, []))
            assert corpus.lookup(context, least=1, depth=4, occurrences=1000) == (length, expected)
            assert corpus.lookup(context, least=length + 1, depth=4, occurrences=1000) == (length, {})
            few = corpus.lookup(context, least=1, depth=4, occurrences=2)[1]
            assert sum(few.values()) == min(2, expected.total()) and all(expected[x] >= n for x, n in few.items())


def test_the_heaviest_nodes_are_kept_with_their_parents() -> None:
    trie = Trie(9)
    for tokens, weight in (((1, 2, 3), 2), ((1, 4), 3), ((5, 6), 4)):
        trie.insert(tokens, weight)
    best = trie.best(5)
    assert (best.tokens, best.parent, best.weight) == ([9, 1, 5, 6, 4], [-1, 0, 0, 2, 1], [0, 5, 4, 4, 3])
    assert best.insert([5, 6, 7], size=5) == 3 and best.insert([5, 6, 7], size=6) == 5 and best.tokens[5] == 7


def proposed(drafter: Retrieval, texts_so_far: Texts, roots: list[int], budget: list[int]) -> tuple[Tree, Texts]:
    handle: Any = None
    return drafter.propose(torch.tensor(roots), texts_so_far, handle, torch.tensor(budget), handle)


def begun(drafter: Retrieval, rows: list[list[int]]) -> Texts:
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return drafter.init(Tree.chain(padded, torch.tensor([len(row) for row in rows])), {}, 0)


def test_proposals_keep_to_budget_nodes_and_depth(tmp_path: Path) -> None:
    corpus_of([1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 6, 5, 1, 2, 3, 5, 5, 5], tmp_path)
    config = RetrievalConfig(path=str(tmp_path), depth=3, nodes=6, trust=9)
    drafter = config.build(TableModel(VOCAB, 0), lambda path: TableModel(VOCAB, 0))
    tree, _ = proposed(drafter, begun(drafter, [[0, 1, 2], [3, 0, 3], [1, 2], [0, 6]]), [3, 0, 3, 0], [16, 3, 1, 9])
    assert tree.tokens[0].tolist() == [3, 4, 5, 6, 5, 5, 5]  # 4 follows twice and comes first
    assert tree.parent[0].tolist() == [-1, 0, 1, 2, 0, 4, 5]
    assert tree.valid.sum(1).tolist() == [7, 3, 1, 4]
    assert tree.tokens[1, :3].tolist() == [0, 3, 0] and tree.q is None
    assert tree.tokens[3, :4].tolist() == [0, 6, 0, 6]  # not in the corpus: the text's own


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0, 2.0])
def test_a_longer_ending_is_followed_further(trust: float) -> None:
    drafter = RetrievalConfig(trust=trust).build(TableModel(20, 0), lambda path: TableModel(20, 0))
    told = list(range(9))
    for length in (1, 2, 3):
        tree, _ = proposed(drafter, begun(drafter, [[*told, 10, *told[1:length]]]), [told[length]], [16])
        follows = [*told[length + 1 :], 10, *told[1:]][: 1 + int(trust * length)]
        assert tree.tokens[0].tolist() == [told[length], *follows]


def test_forks_and_joins_go_on_as_rows_of_their_own(seed: int) -> None:
    drafter = RetrievalConfig().build(TableModel(VOCAB, seed), lambda path: TableModel(VOCAB, seed))
    rows = [[1, 2, 3, 1, 2], [4, 4, 5], [0, 6, 0, 6, 0]]
    state = begun(drafter, rows)
    forked = state.fork(torch.tensor([2, 0, 2])).join(begun(drafter, rows[1:2]))
    tree, forked = proposed(drafter, forked, [6, 3, 1, 4], [8] * 4)
    verdict = Verdict(torch.arange(tree.size).expand(4, -1), torch.tensor([3, 1, 2, 1]), torch.zeros(4, dtype=torch.int64))
    forked = drafter.observe(tree, verdict, {}, forked)
    expected = [
        source + row[:keep]
        for source, row, keep in zip([rows[2], rows[0], rows[2], rows[1]], tree.tokens.tolist(), [3, 1, 2, 1], strict=True)
    ]
    assert [row.text for row in forked.rows] == expected
    assert [row.match() for row in forked.rows] == [longest_repeated_ending(text) for text in expected]
    assert [row.text for row in state.rows] == rows and forked.nbytes() > state.nbytes() > 0


def shuffled(directory: Path, seed: int) -> None:
    order = np.fromfile(directory / ORDER, "<u4")
    np.random.default_rng(seed).shuffle(order)
    order.tofile(directory / ORDER)


@pytest.mark.parametrize("sorted_order", [True, False])
def test_greedy_is_plain_decoding_with_a_corpus(sorted_order: bool, seed: int, tmp_path: Path) -> None:
    """Also with one whose order is none: bad drafts, right tokens."""
    target = TableModel(VOCAB, seed)
    sample = plain(target, [1], SamplingConfig(), 200)
    write_corpus(tmp_path, np.array(sample + torch.randint(VOCAB, (200,)).tolist()), VOCAB)
    if not sorted_order:
        shuffled(tmp_path, seed)
    drafter = RetrievalConfig(path=str(tmp_path), depth=4).build(target, lambda path: target)
    rows = prompts(12, seed)
    rows[::3] = [[1, *sample[:i]] for i in (10, 50, 90, 130)]  # goes on in the corpus
    rows[1::3] = [circling(target, row, SamplingConfig()) for row in rows[1::3]]  # goes on in the text
    together, cost = tokens_of(target, drafter, rows, [SamplingConfig()] * 12, max_new_tokens=40)
    assert together == [plain(target, row, SamplingConfig(), 40) for row in rows]
    assert cost.tokens_per_call > 1.05
    assert [tokens_of(target, drafter, [row], [SamplingConfig()], max_new_tokens=40)[0][0] for row in rows[:3]] == together[:3]


def test_samples_have_the_law_of_the_target_with_a_corpus(seed: int, tmp_path: Path) -> None:
    target, prompt, config = TableModel(5, seed), (1, 2, 3, 1, 2, 4, 1, 2), SamplingConfig(temperature=1.0)
    write_corpus(tmp_path, np.random.default_rng(seed).integers(0, 5, 400), 5)
    drafter = RetrievalConfig(path=str(tmp_path), depth=3).build(target, lambda path: target)
    tokens = draws(target, drafter, prompt, config, range(seed, seed + 4_000), 3, budget=5)
    assert chi_square(cells(tokens, 5), joint_law(target.after, prompt, 5, 3, config)) > 1e-6
    for batch in (1, 3):
        assert torch.equal(draws(target, drafter, prompt, config, range(seed, seed + batch), 3, budget=5), tokens[:batch])


def damaged(directory: Path, damage: str) -> None:
    write_corpus(directory, np.array([1, 2, 3, 4]), VOCAB)
    header = json.loads((directory / HEADER).read_text())
    if damage == "no header":
        (directory / HEADER).unlink()
    elif damage == "no json":
        (directory / HEADER).write_text("[" * 100_000)
    elif damage == "foreign header":
        (directory / HEADER).write_text(json.dumps({**header, "run": "me"}))
    elif damage == "wrong type":
        (directory / HEADER).write_text(json.dumps({**header, "tokens": "4"}))
    elif damage == "huge":
        (directory / HEADER).write_text(json.dumps({**header, "tokens": 1 << 40}))
    elif damage == "truncated":
        (directory / TOKENS).write_bytes((directory / TOKENS).read_bytes()[:-1])
    elif damage == "missing":
        (directory / ORDER).unlink()
    elif damage == "token beyond the vocabulary":
        np.array([1, 2, VOCAB, 4], "<u4").tofile(directory / TOKENS)
    else:
        np.array([0, 1, 2, 4], "<u4").tofile(directory / ORDER)


DAMAGES = ("no header", "no json", "foreign header", "wrong type", "huge", "truncated", "missing", "token beyond the vocabulary")


@pytest.mark.parametrize("damage", [*DAMAGES, "place beyond the text"])
def test_a_damaged_corpus_is_refused(damage: str, tmp_path: Path) -> None:
    damaged(tmp_path, damage)
    with pytest.raises(ValueError, match=r"^corpus=[^\n]*; [^\n]*$"):
        RetrievalConfig(path=str(tmp_path)).build(TableModel(VOCAB, 0), lambda path: TableModel(VOCAB, 0))


def test_what_is_no_corpus_is_not_written(tmp_path: Path) -> None:
    for tokens in (np.array([], dtype=np.int64), np.array([0, VOCAB]), np.array([0, -1])):
        with pytest.raises(ValueError, match=r"^tokens[^\n]*; [^\n]*$"):
            write_corpus(tmp_path / "none", tokens, VOCAB)
    assert not (tmp_path / "none").exists()
    write_corpus(tmp_path, np.array([1, 2]), VOCAB)
    with pytest.raises(ValueError, match=r"^drafter.path=[^\n]*vocabulary of 7 tokens, the target's has 5; [^\n]*$"):
        RetrievalConfig(path=str(tmp_path)).build(TableModel(5, 0), lambda path: TableModel(5, 0))
