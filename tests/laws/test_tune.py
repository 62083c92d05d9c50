"""Tuning: expected tokens against enumeration, the choice against a grid, what is kept and when it is passed over."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decode_exact import PROMPT, models
from test_decode_mtp import no_load, prompts_of, tiny

from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.medusa import MedusaConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig, SequentialDrafter
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.silent import Silent, SilentConfig
from fewstep.decode.drafters.tree import full_tree
from fewstep.decode.generate import decode
from fewstep.decode.guard import Guarded, Prices
from fewstep.decode.stream import Settings
from fewstep.decode.text import GenerationConfig
from fewstep.decode.verification import BlockVerificationConfig
from fewstep.models.model import Model
from fewstep.report.shapes import Ledger, Recorder, Shape, inside, widest
from fewstep.report.tune import Costs, TuneConfig, levels, ranked, tune
from fewstep.report.tuned import FORMAT, Tuned, cache, circumstances, drafter_for, keep, recall

WIDE = (3, 2, 2)


def entered(seed: int, steps: int = 400) -> tuple[Ledger, list[tuple[int, ...]]]:
    """A ledger of random accepted paths in the widest tree, and the paths themselves."""
    generator = torch.Generator().manual_seed(seed)
    paths = ((), *full_tree(WIDE))
    place = {path: i for i, path in enumerate(paths)}
    parent = [-1, *(place[path[:-1]] for path in paths[1:])]
    weights = torch.tensor([0.5 ** (sum(path) + len(path)) for path in paths])
    taken = [paths[i] for i in torch.multinomial(weights, steps, True, generator=generator).tolist()]
    ledger = Ledger()
    for path in taken:
        ledger.enter(parent, [place[path[:length]] for length in range(len(path) + 1)])
    return ledger, taken


@pytest.mark.parametrize("branching", [(1,), (3,), (2, 1), (1, 2, 1), (3, 2, 2)])
def test_expected_tokens_are_those_of_an_enumeration(branching: tuple[int, ...], seed: int) -> None:
    ledger, taken = entered(seed)
    shape = frozenset(full_tree(branching))
    kept = []
    for path in taken:  # walk down the narrow tree as verification would
        node: tuple[int, ...] = ()
        while len(node) < len(path) and (*node, path[len(node)]) in shape:
            node = (*node, path[len(node)])
        kept.append(1 + len(node))
    assert ledger.tokens(shape) == pytest.approx(sum(kept) / len(kept))
    assert ledger.sizes(shape) == {1 + len(shape): 1.0}


def test_a_narrow_tree_keeps_what_the_wide_run_says(seed: int) -> None:
    """Every step of a wide tree, replayed: the narrow tree proposed at the same places keeps as many tokens as predicted."""
    target, draft = models(seed)
    prompts = [[a, b, c] for a, b, c in itertools.product(range(4), repeat=3)]
    narrow = DraftModelConfig(path="near", branching=(2, 1), mode="chosen").build(target, lambda path: draft)
    shape = frozenset(full_tree((2, 1)))
    alone = Recorder(DraftModelConfig(path="near", branching=(3, 2), mode="chosen").build(target, lambda path: draft))
    decode(target, _FirstStep(alone), prompts, Settings(4, budget=16))
    once = Recorder(narrow)
    decode(target, _FirstStep(once), prompts, Settings(4, budget=16))
    assert alone.ledger.steps == once.ledger.steps == len(prompts)
    assert alone.ledger.tokens(shape) == pytest.approx(once.ledger.tokens(shape))


class _FirstStep:
    """A drafter that is watched in its first step and plain afterwards."""

    def __init__(self, inner: Recorder) -> None:
        self.taps, self.prompt_taps = inner.taps, inner.prompt_taps
        self._inner, self._silent, self._steps = inner, Silent(), 0

    def init(self, *given: Any) -> Any:
        return self._inner.init(*given)

    def propose(self, root: Any, state: Any, *given: Any) -> Any:
        if self._steps:
            return self._silent.propose(root, state, *given)
        return self._inner.propose(root, state, *given)

    def observe(self, tree: Any, verdict: Any, hidden: Any, state: Any) -> Any:
        self._steps += 1
        return self._inner.observe(tree, verdict, hidden, state) if self._steps == 1 else state


def test_any_tree_of_a_size_is_beaten_by_the_likeliest(seed: int) -> None:
    ledger, _ = entered(seed)
    paths = full_tree((2, 2, 1))
    for size in (2, 3, 4):
        trees = [
            chosen for chosen in itertools.combinations(paths, size - 1) if all(not p[:-1] or p[:-1] in chosen for p in chosen)
        ]
        best = ledger.likeliest(size)
        assert all(not path[:-1] or path[:-1] in best for path in best)
        assert ledger.tokens(frozenset(best)) >= max(ledger.tokens(frozenset(tree)) for tree in trees)


CURVES: dict[str, Callable[[int], float]] = {
    "flat": lambda n: 1.0 + 0.002 * n,
    "steep": lambda n: 0.4 + 0.6 * n,
    "steps": lambda n: 1.0 + 0.5 * (n // 5),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("network", [0.05, 0.6])
def test_the_choice_is_the_grids_best(curve: str, network: float, seed: int) -> None:
    ledger, _ = entered(seed)
    calls = {n: CURVES[curve](n) for n in range(1, 33)}
    costs = Costs(calls[1] + 0.1, calls, {d: {2: 0.1 + network * d} for d in (1, 2, 3)})
    wide = widest(MultiTokenConfig(branching=WIDE), 3)
    assert wide is not None
    shapes = list(inside(wide, ledger, 16))
    grid = {
        branching: ledger.tokens(frozenset(full_tree(branching)))
        * (calls[1] + 0.1)
        / (calls[1 + len(full_tree(branching))] + 0.1 + network * len(branching))
        for depth in (1, 2, 3)
        for branching in itertools.product(*(range(1, most + 1) for most in (4, 3, 2)[:depth]))
        if 1 + len(full_tree(branching)) <= 16
    }
    best = ranked(shapes, ledger, costs)[0]
    assert len(shapes) == len(grid)
    assert best.predicted == pytest.approx(max(grid.values()))
    assert isinstance(best.shape.config, MultiTokenConfig)
    assert grid[best.shape.config.branching] == pytest.approx(max(grid.values()))


def test_shapes_of_every_form(seed: int) -> None:
    ledger, _ = entered(seed)
    chains = widest(NgramConfig(min_ngram=1), 9)
    assert chains is not None and chains.nodes == 37
    found = list(inside(chains, ledger, 16))
    assert {type(shape.config) for shape in found} == {NgramConfig}
    assert all(isinstance(shape.config, NgramConfig) and shape.config.min_ngram == 1 and shape.nodes <= 16 for shape in found)
    free = widest(MedusaConfig(), 3)
    assert free is not None
    trees = list(inside(free, ledger, 8))
    assert [shape.nodes for shape in trees] == [2, 3, 4, 5, 6, 8]
    assert all(isinstance(shape.config, MedusaConfig) and set(shape.config.tree) == shape.paths for shape in trees)
    assert widest(SilentConfig(), 3) is None


def test_offered_trees_may_be_smaller() -> None:
    ledger = Ledger()
    ledger.enter([-1, 0, 1, 0, -2], [0, 1, 2])
    ledger.enter([-1, -2, -2], [0])
    ledger.enter([-1], [0])
    shape = frozenset({(0,), (0, 0)})
    assert ledger.sizes(shape) == {3: pytest.approx(1 / 3), 1: pytest.approx(2 / 3)}
    assert ledger.tokens(shape) == pytest.approx(1 + 2 / 3)


def test_prices_are_what_the_costs_say() -> None:
    costs = Costs(1.25, {1: 1.0, 4: 1.5, 16: 3.0}, {1: {2: 0.5}, 3: {4: 1.0, 16: 1.6}})
    assert costs.seconds(3, {4: 1.0}) == pytest.approx(2.5)
    assert costs.seconds(2, {4: 0.5, 1: 0.5}) == pytest.approx(0.75 + 1.25)
    prices = costs.prices(3, 4)
    assert prices(4) == pytest.approx(2.5 / 1.25)
    assert prices.steps[1] == pytest.approx(1.0)


def test_tuning_ends_in_a_drafter_that_runs(seed: int) -> None:
    target = tiny("mtp_sequential", seed)
    config = TuneConfig(prompts=2, new_tokens=8, finalists=1, rounds=1, gain=1.0)
    found = tune(target, MultiTokenConfig(), no_load, prompts_of(seed, 11, [9, 5]), config)
    assert len(found.candidates) > 5
    assert len(found.measured) == 1
    assert (found.chosen.speed > 1) == (found.chosen.drafter.kind == "mtp")
    assert levels(MultiTokenConfig(), target, no_load) == 3
    never = tune(target, MultiTokenConfig(), no_load, prompts_of(seed, 11, [9, 5]), config.model_copy(update={"gain": 1e6}))
    assert never.chosen == Tuned(SilentConfig(), 1.0, Prices({1: 1.0}, 0.0))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Model:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Model(tiny("mtp_sequential", seed), None, {})


GREEDY, BLOCK = GenerationConfig(), GenerationConfig(verification=BlockVerificationConfig())
FOUND = Tuned(MultiTokenConfig(branching=(2, 1)), 1.5, Prices({1: 1.0, 4: 1.4}, 0.3))


def test_what_is_kept_is_recalled_and_guarded(model: Model) -> None:
    facts = circumstances(model, 1, False)
    assert recall(facts) is None
    assert isinstance(drafter_for(model, "auto", 1, GREEDY, no_load), SequentialDrafter)
    keep(FOUND, "mtp", facts)
    keep(Tuned(SilentConfig(), 1.0, Prices({1: 1.0}, 0.0)), "ngram", facts)
    assert recall(facts) == FOUND
    drafter = drafter_for(model, "auto", 1, GREEDY, no_load)
    assert isinstance(drafter, Guarded)
    asked = (("auto", 2, GREEDY, {}), ("auto", 1, BLOCK, {}), ("auto", 1, GREEDY, {"branching": (1,)}), ("mtp", 1, GREEDY, {}))
    for name, rows, config, fields in asked:  # other circumstances, or more than a name was asked for
        assert isinstance(drafter_for(model, name, rows, config, no_load, fields), SequentialDrafter)
    plain, drafted = (decode(model.network, one, [PROMPT], Settings(20)) for one in (Silent(), drafter))
    assert plain[0].tokens == drafted[0].tokens
    assert isinstance(Tuned(SilentConfig(), 1.0, Prices({1: 1.0}, 0.0)).build(model, no_load), Silent)


def test_other_circumstances_have_tunings_of_their_own(model: Model, seed: int) -> None:
    facts = circumstances(model, 1, False)
    keep(FOUND, "mtp", facts)
    assert recall(facts) == FOUND
    other = Model(tiny("mtp_sequential", seed + 1), None, {})
    for changed in (circumstances(model, 2, False), circumstances(model, 1, True), circumstances(other, 1, False)):
        assert recall(changed) is None
    model.network.float()
    assert recall(circumstances(model, 1, False)) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": "other"}', json.dumps({"format": FORMAT, "facts": {}})],
)
def test_a_damaged_or_foreign_file_is_passed_over_with_a_notice(model: Model, text: str) -> None:
    facts = circumstances(model, 1, False)
    path = keep(FOUND, "mtp", facts)
    assert path.parent == cache()
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match=f"{path.name}.*fewstep tune.*ignored"):
        assert recall(facts) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("drafter", {"kind": "no such"}),
        ("drafter", {"kind": "mtp", "branching": "wide"}),
        ("prices", {"steps": {"4": 1.0}, "draft": 0.1}),
        ("prices", {"steps": 3}),
        ("speed", "fast"),
        ("facts", {"model": "another"}),
    ],
)
def test_a_bad_field_is_passed_over_too(model: Model, field: str, value: Any) -> None:
    facts = circumstances(model, 1, False)
    path = keep(FOUND, "mtp", facts)
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.warns(RuntimeWarning, match="ignored"):
        assert recall(facts) is None


def test_shapes_say_how_large_they_are() -> None:
    shape = Shape(MultiTokenConfig(branching=(2, 1)), frozenset(full_tree((2, 1))))
    assert (shape.nodes, shape.depth) == (5, 2)
