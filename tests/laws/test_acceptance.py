"""Acceptance at every place: what a narrower tree would have kept, step by step, is what it keeps when it decodes."""

import itertools
from collections import Counter

import pytest
import torch
from test_decode_exact import PROMPT, models
from test_decode_mtp import prompts_of, tiny

from fewstep.core.mixer import Tree
from fewstep.core.random import CounterRng
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.decode.drafters.silent import Silent
from fewstep.decode.drafters.tree import Path, full_tree
from fewstep.decode.generate import decode
from fewstep.decode.stream import Settings
from fewstep.decode.verify import verify
from fewstep.report.acceptance import Ledger, Pace, Place, Watched, accepted, place
from fewstep.report.shapes import Shape

WIDE = (3, 2, 2)
TOKENS, NODES = 40, 24


def entered(seed: int, places: int = 400) -> Ledger:
    """Texts of random accepted paths in the widest tree."""
    generator = torch.Generator().manual_seed(seed)
    paths = ((), *full_tree(WIDE))
    weights = torch.tensor([0.5 ** (sum(path) + len(path)) for path in paths])
    taken = torch.multinomial(weights, places, True, generator=generator).tolist()
    texts = [taken[: places // 3], taken[places // 3 :]]
    return Ledger([[Place(tuple(full_tree(WIDE)), paths[i]) for i in text] for text in texts])


def branched(branching: tuple[int, ...]) -> Shape:
    paths = full_tree(branching)
    return Shape(MultiTokenConfig(branching=branching), 1 + len(paths), len(branching), frozenset(paths))


@pytest.mark.parametrize("branching", [(1,), (3,), (2, 1), (1, 2, 1), (3, 2, 2)])
def test_the_pace_is_that_of_steps_taken_one_by_one(branching: tuple[int, ...], seed: int) -> None:
    ledger, shape = entered(seed), frozenset(full_tree(branching))
    steps = tokens = 0
    for text in ledger.texts:
        at = 0
        while at < len(text):
            node: Path = ()
            while len(node) < len(text[at].accepted) and (*node, text[at].accepted[len(node)]) in shape:
                node = (*node, text[at].accepted[len(node)])
            steps, tokens, at = steps + 1, tokens + 1 + len(node), at + 1 + len(node)
    pace = ledger.pace(branched(branching))
    assert pace.tokens == pytest.approx(tokens / steps)
    assert pace.sizes == {1 + len(shape): 1.0}


PAIRS: dict[str, tuple[DrafterConfig, DrafterConfig, Shape]] = {
    "draft": (
        DraftModelConfig(path="near", branching=(3, 2), mode="chosen"),
        DraftModelConfig(path="near", branching=(2, 1), mode="chosen"),
        branched((2, 1)),
    ),
    "ngram": (
        NgramConfig(min_ngram=1, depth=5, branches=3),
        NgramConfig(min_ngram=1, depth=2, branches=2),
        Shape(NgramConfig(), 5, 2, frozenset({(0,), (0, 0), (1,), (1, 0)})),
    ),
    "retrieval": (RetrievalConfig(), RetrievalConfig(nodes=2, depth=2), Shape(RetrievalConfig(), 3, 2)),
    "mtp": (MultiTokenConfig(branching=(3, 2, 1)), MultiTokenConfig(branching=(2, 1)), branched((2, 1))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_narrow_tree_keeps_at_every_step_what_the_wide_run_says(name: str, seed: int) -> None:
    wide, narrow, shape = PAIRS[name]
    heads = name == "mtp"
    target, draft = (tiny("mtp_sequential", seed), None) if heads else models(seed)
    prompts = prompts_of(seed, 11, [9, 5, 7]) if heads else [PROMPT, [2, 1, 2], [3, 0]]
    ledger = accepted(target, wide.build(target, lambda path: draft), prompts, TOKENS, NODES)
    rows = decode(target, narrow.build(target, lambda path: draft), prompts, Settings(TOKENS + NODES, budget=NODES))
    assert [len(text) for text in ledger.texts] == [TOKENS] * len(prompts)
    for text, row in zip(ledger.texts, rows, strict=True):
        at, sizes = 0, Counter[int]()
        for drafted in row.accepted:
            if at >= len(text):
                break
            kept = shape.kept(text[at].offered)
            assert drafted == sum(text[at].accepted[:length] in kept for length in range(1, len(text[at].accepted) + 1))
            sizes[1 + len(kept)] += 1
            at += 1 + drafted
        pace = Ledger([text]).pace(shape)  # of a text that goes on
        assert pace.tokens == pytest.approx(at / sizes.total())
        assert pace.sizes == pytest.approx({nodes: count / sizes.total() for nodes, count in sizes.items()})


def test_the_end_of_a_text_is_the_end_of_its_steps(seed: int) -> None:
    target, draft = models(seed)
    config = NgramConfig(min_ngram=1, depth=6)
    ledger = accepted(target, config.build(target, lambda path: draft), [PROMPT, [2, 1, 2]], TOKENS, NODES)
    rows = decode(target, config.build(target, lambda path: draft), [PROMPT, [2, 1, 2]], Settings(1 + TOKENS, budget=NODES))
    chain = Shape(config, 7, 6, frozenset((0,) * depth for depth in range(1, 7)))
    assert ledger.pace(chain).tokens == pytest.approx(2 * TOKENS / sum(len(row.accepted) for row in rows))


def test_what_is_watched_is_plain_text(seed: int) -> None:
    target, draft = models(seed)
    config = DraftModelConfig(path="near", branching=(2, 2), mode="chosen")
    text: list[Place] = []
    settings = Settings(30, verify=Watched(verify, text))
    watched = decode(target, config.build(target, lambda path: draft), [PROMPT], settings)
    assert watched[0].tokens == decode(target, Silent(), [PROMPT], Settings(30))[0].tokens
    assert len(text) == len(watched[0].accepted) == 29
    assert set(watched[0].accepted) == {0}


def test_the_token_that_is_kept_is_the_first_that_verification_emits(seed: int) -> None:
    """So it has the law that verification gives it."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(1, 4, 5, generator=generator).double() + 0.01 for _ in range(2))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    q[:, (0, 2)] = 0.0  # node 2 is chosen
    tree = Tree(torch.tensor([[4, 1, 2, 3]]), torch.tensor([[-1, 0, 0, 1]]), q)
    firsts, text = [], []
    for i in range(100):
        rng, watched = CounterRng.seeded([seed + i]), Watched(verify, text)
        watched(tree, p, rng)  # the prompt's
        whole, kept = verify(tree, p, rng), watched(tree, p, rng)
        firsts.append(int(tree.tokens[0, whole.path[0, 1]]) if int(whole.keep) > 1 else int(whole.next))
        assert (int(kept.keep), int(kept.next)) == (1, firsts[-1])
        assert len(text[-1].accepted) == int(whole.keep) - 1
    assert len(text) == 100


def test_sizes_of_several_rows(seed: int) -> None:
    """The largest of three independent trees, by enumeration."""
    weights = torch.rand(4, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    shares = dict(zip((1, 3, 4, 9), (weights / weights.sum()).tolist(), strict=True))
    largest: Counter[int] = Counter()
    for sizes in itertools.product(shares, repeat=3):
        largest[max(sizes)] += shares[sizes[0]] * shares[sizes[1]] * shares[sizes[2]]  # type: ignore[assignment]
    assert Pace(2.0, shares, 100).together(3) == pytest.approx(dict(largest))
    assert Pace(2.0, shares, 100).together(1) == pytest.approx(shares)


def test_any_tree_of_a_size_is_beaten_by_the_likeliest(seed: int) -> None:
    ledger = entered(seed)
    reached = Counter(
        place.accepted[:length] for text in ledger.texts for place in text for length in range(1, 1 + len(place.accepted))
    )
    paths = full_tree((2, 2, 1))
    for size in (2, 3, 4):
        trees = [
            chosen for chosen in itertools.combinations(paths, size - 1) if all(not p[:-1] or p[:-1] in chosen for p in chosen)
        ]
        best = ledger.likeliest(size)
        assert all(not path[:-1] or path[:-1] in best for path in best)
        assert sum(reached[path] for path in best) >= max(sum(reached[path] for path in tree) for tree in trees)


def test_places_are_named_by_ranks_and_padding_is_none() -> None:
    assert place([-1, 0, 1, 0, -2], [0, 1, 2]) == Place(((0,), (0, 0), (1,)), (0, 0))
    assert place([-1, -2, -2], [0]) == place([-1], [0]) == Place((), ())


def test_prompts_take_turns_and_time_ends_them(seed: int) -> None:
    target, draft = models(seed)
    drafter = DraftModelConfig(path="near", branching=(1,), mode="chosen").build(target, lambda path: draft)
    ledger = accepted(target, drafter, [PROMPT, [2, 1]], 500, 4, seconds=0.0)
    assert 4 <= min(map(len, ledger.texts)) + 1 <= ledger.places < 1000
