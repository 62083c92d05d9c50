"""The guard: it changes no token, falls silent where drafting does not pay, comes back, and never loses more than it says."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_decode_exact import PROMPT, models
from test_decode_mtp import Spy, no_load, prompts_of, tiny
from torch import Tensor

from fewstep.core.draft import Verdict
from fewstep.core.mixer import Tree
from fewstep.core.random import CounterRng
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.early_exit import EarlyExitConfig
from fewstep.decode.drafters.lookahead import LookaheadConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.decode.drafters.silent import Nothing, Silent
from fewstep.decode.generate import decode
from fewstep.decode.guard import CEILING, Guarded, Prices, interpolated
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings

DEAR = Prices({1: 1.0, 4: 1.5, 16: 3.0}, 1.0)  # falls silent and comes back again and again
NIMBLE: dict[str, float] = {"credit": 0.0, "grace": 0.25, "ceiling": 1.0}
DRAFTERS: dict[str, DrafterConfig] = {
    "ngram": NgramConfig(min_ngram=1, depth=3, branches=2),
    "draft": DraftModelConfig(path="near", branching=(2, 1)),
    "exit": EarlyExitConfig(layers=1, branching=(1, 1)),
    "lookahead": LookaheadConfig(window=2, ngram=3),
    "retrieval": RetrievalConfig(),
}


class Scripted:
    """Drafts two nodes; what it is told goes into a list. The verdicts are the test's own."""

    taps: tuple[str, ...] = ("hidden",)
    prompt_taps: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def init(self, prompt: Tree, hidden: Any, capacity: int) -> Nothing:
        return Nothing()

    def propose(self, root: Tensor, state: Nothing, handle: Any, budget: Tensor, rng: Any) -> tuple[Tree, Nothing]:
        self.calls.append(("propose", root.tolist(), budget.tolist()))
        parent = torch.where(torch.arange(3) < budget.unsqueeze(1), torch.arange(3) - 1, -2)
        return Tree(torch.stack([root, root + 100, root + 200], 1), parent), state

    def observe(self, tree: Tree, verdict: Verdict, hidden: Any, state: Nothing) -> Nothing:
        self.calls.append(("observe", tree.tokens.tolist(), verdict.keep.tolist(), hidden["hidden"][..., 0].tolist()))
        return state


def run(guard: Guarded, keeps: list[int], steps: int = 200) -> tuple[list[int], Any]:
    """Steps in which a drafted tree keeps what `keeps` says, in turn; the sizes of the trees and the last state."""
    state = guard.init(Tree.chain(torch.zeros(1, 1, dtype=torch.int64)), {}, 0)
    sizes, script, handle = [], iter(keeps), SimpleNamespace(target=None, law=None)
    for root in range(steps):
        tree, state = guard.propose(torch.tensor([root]), state, handle, torch.tensor([3]), CounterRng.seeded([0]))
        sizes.append(tree.size)
        keep = next(script, None) if tree.size > 1 else 1
        if keep is None:
            break
        order = torch.arange(tree.size).unsqueeze(0)
        hidden = {"hidden": torch.full((1, tree.size, 1), float(root))}
        state = guard.observe(tree, Verdict(order, torch.tensor([keep]), torch.tensor([root + 1])), hidden, state)
    return sizes, state


def test_the_account_of_one_row() -> None:
    """Three nodes cost 2.5 steps: keeping one token leaves -1.5 beside a credit of 0.25, and log2(1 + T / 8) reaches 1.25 at
    T = 12 (log2(2.375) = 1.248 at 11). What 11 silent steps missed costs 0.5 + 11 / 8 then: keeping all three leaves -2.875."""
    inner = Scripted()
    sizes, state = run(Guarded(inner, Prices({1: 1.0, 3: 2.0}, 0.5, 0.125), credit=0.25, grace=8.0, ceiling=8.0), [1, 3])
    assert sizes[:14] == [3, *[1] * 11, 3, 1]
    assert inner.calls[:5] == [
        ("propose", [0], [3]),
        ("observe", [[0, 100, 200]], [1], [[0.0] * 3]),
        ("propose", [1], [1]),
        ("observe", [list(range(1, 12))], [11], [[float(i) for i in range(1, 12)]]),
        ("propose", [12], [3]),
    ]
    assert state.rows[0].balance == -2.875
    assert sizes.index(3, 13) == 13 + 27  # T is 15 then, and log2(1 + T / 8) reaches 2.625 at 42


def test_it_never_loses_more_than_it_says(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prices = Prices({1: 1.0, 3: 1.6}, 0.4, 0.01)
    for share in (0.0, 0.1, 0.4, 0.8):
        keeps = [3 if bool(torch.rand(1, generator=generator) < share) else 1 for _ in range(100)]
        sizes, _ = run(Guarded(Scripted(), prices, credit=2.0, grace=4.0), keeps, steps=500)
        script = iter(keeps)
        cost = tokens = late = dearest = 0.0
        for size in sizes[:-1]:
            dearest = max(dearest, prices(3) + prices.draft + prices.read * late - 1)
            if size > 1:
                cost += prices(size) + (prices.draft + prices.read * late if late else 0.0)
                tokens, late = tokens + next(script), 0.0
            else:
                cost, tokens, late = cost + 1.0, tokens + 1, late + 1
            assert cost - tokens <= 2.0 + math.log2(1 + tokens / 4) + dearest + 1e-9
    assert sizes.count(3) == 101  # where it pays, it hardly ever stops
    assert sizes.count(1) < 250


def test_one_that_fails_is_asked_ever_more_seldom() -> None:
    sizes, _ = run(Guarded(Scripted(), Prices({1: 1.0, 3: 1.6}, 0.4), credit=0.0), [1] * 7, steps=500)
    asked = [place for place, size in enumerate(sizes) if size > 1]
    silences = [after - before for before, after in pairwise(asked[1:])]
    assert all(after > 1.5 * before for before, after in pairwise(silences))


def test_a_drafter_that_pays_is_never_stopped() -> None:
    sizes, state = run(Guarded(Scripted(), Prices({1: 1.0, 3: 1.2}, 0.1)), [2] * 100)
    assert set(sizes) == {3}
    assert state.rows[0].balance == CEILING


def test_only_the_rows_that_can_pay_draft() -> None:
    inner = Scripted()
    guard = Guarded(inner, Prices({1: 1.0, 3: 2.0}, 0.5), credit=0.0)
    state = guard.init(Tree.chain(torch.zeros(3, 1, dtype=torch.int64)), {}, 0)
    budget, rng = torch.tensor([3, 3, 3]), CounterRng.seeded([0, 1, 2])
    tree, state = guard.propose(torch.tensor([5, 6, 7]), state, Any, budget, rng)
    order = torch.arange(3).expand(3, -1)
    hidden = {"hidden": torch.zeros(3, 3, 1)}
    state = guard.observe(tree, Verdict(order, torch.tensor([3, 1, 3]), torch.tensor([1, 2, 3])), hidden, state)
    tree, state = guard.propose(torch.tensor([1, 2, 3]), state.fork(torch.tensor([1, 0, 2])), Any, budget, rng)
    assert tree.valid.sum(1).tolist() == [1, 3, 3]
    assert inner.calls[-1] == ("propose", [1, 2, 3], [1, 3, 3])


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_no_token_of_plain_greedy_changes_and_rows_stand_alone(name: str, temperature: float, seed: int) -> None:
    target, draft = models(seed)
    guard = Guarded(DRAFTERS[name].build(target, lambda path: draft), DEAR, **NIMBLE)
    prompts = [PROMPT, [2, 1], [3, 3, 1, 0], [1]]
    law = SamplingConfig(temperature=temperature)
    rows = decode(target, guard, prompts, Settings(40), sampling=law, seed=range(4))
    if temperature == 0:
        plain = decode(target, Silent(), prompts, Settings(40))
        assert [row.tokens for row in rows] == [row.tokens for row in plain]
    elif name != "lookahead":  # its pool remembers how often it was asked
        alone = [decode(target, guard, [prompt], Settings(40), sampling=law, seed=[i])[0] for i, prompt in enumerate(prompts)]
        assert [row.tokens for row in rows] == [row.tokens for row in alone]
    assert name == "retrieval" or any(max(row.accepted) > 0 for row in rows)


@pytest.mark.parametrize("form", ["mtp_sequential", "mtp_parallel"])
@pytest.mark.parametrize("batch", [1, 3])
def test_after_a_silence_the_drafter_knows_what_it_would_have_known(form: str, batch: int, seed: int) -> None:
    """Every tree of a guarded drafter is the one that the same drafter proposes there without the guard."""
    target = tiny(form, seed)
    prompts = prompts_of(seed, 11, [9, 5, 7][:batch])
    asked = Spy(MultiTokenConfig().build(target, no_load))
    guard = Guarded(asked, DEAR, **NIMBLE)
    done = decode(target, guard, prompts, Settings(60))
    plain = decode(target, Silent(), prompts, Settings(60))
    assert [row.tokens for row in done] == [row.tokens for row in plain]
    if batch > 1:
        return
    text = [*prompts[0], *plain[0].tokens]
    proposed = [row for (row,) in asked.proposals if len(row) == 4]
    assert 4 < len(proposed) < 50
    place = len(prompts[0])
    for row in proposed:
        place = next(i for i in range(place, len(text)) if text[i] == row[0] and _chain(target, text[: i + 1]) == row) + 1


def _chain(target: Any, text: list[int]) -> list[int]:
    """The tree that fresh heads propose after `text`."""
    spy = Spy(MultiTokenConfig().build(target, no_load))
    decode(target, spy, [text[:-1]], Settings(5))
    return list(spy.proposals[0][0])


def test_prices_between_and_beyond_what_was_measured() -> None:
    assert interpolated({1: 1.0, 4: 2.5, 16: 4.5}, 2) == pytest.approx(1.5)
    assert interpolated({1: 1.0, 4: 2.5, 16: 4.5}, 16) == 4.5
    assert interpolated({1: 1.0, 4: 2.5, 16: 4.5}, 22) == pytest.approx(5.5)
    assert interpolated({1: 1.0}, 9) == 1.0
    assert Prices({1: 1.0, 3: 2.0}, 0.25, 9.0)(2) == 1.75


def test_a_silent_batch_does_not_join(seed: int) -> None:
    guard = Guarded(Scripted(), Prices({1: 1.0, 3: 9.0}, 0.5), credit=0.0)
    _, state = run(guard, [1], steps=20)
    assert state.missed
    assert state.held == state.nbytes() == 19 * (8 + 4)  # of each step missed, a token and an activation
    with pytest.raises(ValueError, match="draft again"):
        state.join(guard.init(Tree.chain(torch.zeros(1, 1, dtype=torch.int64)), {}, 0))
