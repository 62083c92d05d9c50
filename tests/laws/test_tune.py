"""Tuning: the shapes there are, the choice against a grid, what is timed, what is kept and when it is passed over."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_acceptance import WIDE, branched, entered
from test_decode_exact import PROMPT, models
from test_decode_mtp import no_load, prompts_of, tiny

from fewstep.core.event import Cost, Event
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.eagle import Eagle2Config, Eagle3Config
from fewstep.decode.drafters.lookahead import LookaheadConfig
from fewstep.decode.drafters.medusa import MedusaConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig, SequentialDrafter
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.decode.drafters.silent import Silent, SilentConfig
from fewstep.decode.drafters.tree import full_tree
from fewstep.decode.generate import decode
from fewstep.decode.guard import Guarded, Prices
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.decode.text import GenerationConfig
from fewstep.decode.verification import BlockVerificationConfig
from fewstep.models.model import Model
from fewstep.report.shapes import Shape, anchors, inside, widest
from fewstep.report.steps import Costs, Curve, Work, measured_costs, measured_curve, raced
from fewstep.report.tune import TuneConfig, levels, ranked, tune
from fewstep.report.tuned import FORMAT, UNTUNED, Tuned, cache, choose, circumstances, identity, keep, recall
from fewstep.report.turns import in_turn, undisturbed

SHAPED: dict[str, DrafterConfig] = {
    "ngram": NgramConfig(),
    "mtp": MultiTokenConfig(),
    "medusa": MedusaConfig(),
    "medusa drawn": MedusaConfig(mode="drawn"),
    "eagle2": Eagle2Config(),
    "eagle3": Eagle3Config(),
    "eagle3 static": Eagle3Config(branching=(1, 1)),
    "retrieval": RetrievalConfig(),
    "lookahead": LookaheadConfig(),
    "silent": SilentConfig(),
}
CURVES: dict[str, Callable[[int], float]] = {
    "flat": lambda n: 1.0 + 0.002 * (n - 1),
    "steep": lambda n: 0.4 + 0.6 * n,
    "steps": lambda n: 1.0 + 0.5 * (n // 5),
}


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize("nodes", [4, 16])
def test_shapes_stay_within_the_nodes(name: str, nodes: int, seed: int) -> None:
    likeliest = entered(seed).likeliest
    kinds = set()
    for wide in widest(SHAPED[name], 3, nodes):
        shapes = list(inside(wide, nodes, likeliest))
        assert shapes and all(shape.nodes <= nodes for shape in shapes)
        assert len({json.dumps(shape.config.model_dump(mode="json")) for shape in shapes}) == len(shapes)
        assert all(shape.nodes <= nodes for shape in anchors(wide, nodes))
        assert {shape.depth for shape in anchors(wide, nodes)} <= set(range(16))
        for shape in shapes:
            kinds.add(type(shape.config))
            if shape.paths is not None:
                assert shape.nodes == 1 + len(shape.paths)
                assert all(path[:-1] in shape.paths for path in shape.paths if len(path) > 1)
    assert kinds == {type(SHAPED[name])}


def test_shapes_cut_what_is_offered() -> None:
    offered = [(0,), (0, 0), (1,), (0, 0, 0), (1, 0)]
    assert Shape(RetrievalConfig(), 4, 2).kept(offered) == {(0,), (0, 0), (1,)}
    assert Shape(RetrievalConfig(), 3, 1).kept(offered) == {(0,), (1,)}
    assert branched((1, 1, 1, 1)).kept(offered) == {(0,), (0, 0), (0, 0, 0)}
    (retrieval,) = widest(RetrievalConfig(path="corpus", bias=5), 3, 16)
    assert [shape.config.model_dump()["nodes"] for shape in inside(retrieval, 9, lambda size: ())] == [1, 2, 3, 4, 6, 8]
    assert {(one.config.path, one.config.bias) for one in inside(retrieval, 9, lambda size: ())} == {("corpus", 5)}  # type: ignore[attr-defined]
    (wide,) = widest(MultiTokenConfig(branching=(1,)), 3, 16)
    assert [one.config.branching for one in anchors(wide, 16)] == [(1,), (1, 1, 1), (3, 2, 1)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("network", [0.05, 0.6])
def test_the_choice_is_the_grids_best(curve: str, network: float, seed: int) -> None:
    ledger = entered(seed)
    steps = {n: CURVES[curve](n) / CURVES[curve](1) for n in range(1, 33)}
    costs = Costs(Curve(1e-3, steps), {d: {2: 0.1 + network * d} for d in (1, 2, 3)}, {1: 0.0}, 64)
    (wide,) = widest(MultiTokenConfig(branching=WIDE), 3, 32)
    candidates = ranked(inside(wide, 16, ledger.likeliest), ledger, costs, 1)
    grid = {}
    for depth in (1, 2, 3):
        for branching in itertools.product(*(range(1, most + 1) for most in (4, 3, 2)[:depth])):
            nodes = 1 + len(full_tree(branching))
            if nodes <= 16:
                pace = ledger.pace(branched(branching))
                grid[branching] = pace.tokens / (steps[nodes] + 0.1 + network * depth)
    best = candidates[0]
    assert best.predicted == pytest.approx(max(grid.values()))
    assert grid[best.shape.config.model_dump()["branching"]] == pytest.approx(best.predicted)
    assert len(candidates) == len(grid)


def test_prices_are_what_the_costs_say() -> None:
    curve = Curve(1e-3, {1: 1.0, 4: 1.5, 16: 3.0})
    costs = Costs(curve, {1: {2: 0.25}, 3: {4: 0.75, 7: 1.05}}, {1: 2.0, 3: 4.0}, 64, 0.01)
    chain, tree = branched((1, 1, 1)), branched((2, 1, 1))
    assert (costs.draft(chain), costs.draft(tree)) == (pytest.approx(0.75), pytest.approx(1.05))
    assert costs.draft(branched((1, 1))) == pytest.approx((0.25 + 0.65) / 2)
    assert costs.speed(chain, 2.5, {4: 0.5, 1: 0.5}) == pytest.approx(1 / ((0.75 + 1.25) / 2.5 + 4 / 64))
    prices = costs.prices(chain)
    assert (prices(4), prices.read) == (pytest.approx(2.25), 0.01)


def test_streams_take_turns_and_each_takes_a_few_steps() -> None:
    def stream(rows: int, count: int) -> Iterator[Event[Any]]:
        for step in range(10):
            emitted = torch.full((rows,), count)
            yield Event(SimpleNamespace(rows=torch.arange(rows), count=emitted), Cost(tokens=rows * count * (step + 1)))

    device = torch.device("cpu")
    everything = [turn.who for turn in in_turn([stream(1, 1), stream(1, 3)], device)]
    assert sorted(everything) == [0] * 10 + [1] * 10
    cut = [turn.who for turn in in_turn([stream(1, 1), stream(1, 3)], device, seconds=-1.0, least=3)]
    assert min(cut.count(0), cut.count(1)) >= 3 and len(cut) < 20
    assert undisturbed([9.0, 1.0, 8.0, 2.0]) == 2.0


def test_costs_are_measured_through_the_loop(seed: int) -> None:
    target = tiny("mtp_sequential", seed)
    work = Work(target, prompts_of(seed, 11, [9, 5, 7, 8]), 2, 12, 8, SamplingConfig())
    curve = measured_curve(work, 0.2)
    assert list(curve.steps) == [1, 2, 3, 4, 5, 6, 8]
    assert curve.steps[1] == 1.0 and min(curve.steps.values()) > 0 < curve.plain
    drafters = {
        shape: shape.config.build(target, no_load) for shape in (branched((1,)), branched((1, 1, 1)), branched((2, 1, 1)))
    }
    costs = measured_costs(work, drafters, curve, 0.5)
    assert {depth: sorted(known) for depth, known in costs.drafts.items()} == {1: [2], 3: [4, 7]}
    assert set(costs.start) == {1, 3} and min(costs.start.values()) >= 0 <= costs.read
    plain, drafted = raced(work, [Silent(), next(iter(drafters.values()))], 3, 0.5)
    assert all(one.best <= max(one.laps) + 1e-12 for one in (plain, drafted))
    assert 1 <= len(plain.laps) == len(drafted.laps) <= 6


def test_tuning_ends_in_a_drafter_that_runs(seed: int) -> None:
    target = tiny("mtp_sequential", seed)
    config = TuneConfig(prompts=2, new_tokens=8, finalists=1, rounds=1, gain=1.0, seconds=1.0)
    found = tune(target, MultiTokenConfig(), no_load, prompts_of(seed, 11, [9, 5]), config)
    assert len(found.candidates) > 5
    assert len(found.measured) == 1
    assert (found.chosen.speed >= 1) == (found.chosen.drafter.kind == "mtp") or found.chosen.speed == 1
    assert levels(MultiTokenConfig(), target, no_load) == 3
    never = config.model_copy(update={"gain": 1e6})
    assert tune(target, MultiTokenConfig(), no_load, prompts_of(seed, 11, [9, 5]), never, found.curve).chosen == SILENT


@pytest.mark.parametrize("config", [DraftModelConfig(path="near"), RetrievalConfig(), LookaheadConfig()])
@pytest.mark.parametrize("batch", [1, 2])
def test_drafters_of_every_family_are_tuned(config: DrafterConfig, batch: int, seed: int) -> None:
    target, draft = models(seed)
    quick = TuneConfig(batch=batch, prompts=2, new_tokens=8, finalists=2, rounds=1, seconds=0.2, temperature=0.5)
    found = tune(target, config, lambda path: draft, [PROMPT, [2, 1, 3]], quick)
    assert len(found.measured) == 2
    assert found.chosen.drafter.kind in ("silent", config.kind)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Model:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Model(tiny("mtp_sequential", seed), None, {})


GREEDY, BLOCK = GenerationConfig(), GenerationConfig(verification=BlockVerificationConfig())
FOUND = Tuned(MultiTokenConfig(branching=(2, 1)), 1.5, Prices({1: 1.0, 4: 1.4}, 0.3, 0.02))
SILENT = Tuned(SilentConfig(), 1.0, Prices({1: 1.0}, 0.0))
TRIED = MultiTokenConfig()


def asked(
    model: Model,
    drafter: str,
    rows: int = 1,
    config: GenerationConfig = GenerationConfig(),
    fields: dict[str, Any] | None = None,
    load: Any = no_load,
) -> Any:
    return choose(model, drafter, rows, config, load, fields)


def test_what_is_kept_is_recalled_and_guarded(model: Model) -> None:
    facts = circumstances(model, 1, False)
    assert recall(facts) is None
    keep(FOUND, TRIED, facts)
    keep(SILENT, NgramConfig(), facts)
    assert recall(facts) == FOUND
    chosen = asked(model, "auto")
    assert isinstance(chosen.drafter, Guarded)
    assert chosen.why == "mtp branching=[2, 1], 1.50x plain decoding where it was tuned"
    assert isinstance(asked(model, "mtp").drafter, SequentialDrafter)
    plain, drafted = (decode(model.network, one, [PROMPT], Settings(20)) for one in (Silent(), chosen.drafter))
    assert plain[0].tokens == drafted[0].tokens


@pytest.mark.parametrize(("rows", "config", "fields"), [(2, GREEDY, {}), (1, BLOCK, {}), (1, GREEDY, {"branching": (1,)})])
def test_what_was_not_tuned_is_guarded_at_a_guess(
    model: Model, rows: int, config: GenerationConfig, fields: dict[str, Any]
) -> None:
    """Other circumstances, or more than a name was asked for."""
    keep(FOUND, TRIED, circumstances(model, 1, False))
    chosen = asked(model, "auto", rows, config, fields)
    assert isinstance(chosen.drafter, Guarded)
    assert "not tuned" in chosen.why
    assert UNTUNED(4) > 1.5


def test_where_nothing_pays_decoding_is_plain(model: Model) -> None:
    keep(SILENT, TRIED, circumstances(model, 1, False))
    chosen = asked(model, "auto")
    assert isinstance(chosen.drafter, Silent)
    assert chosen.why.startswith("silent")


def test_drafters_of_one_kind_have_tunings_of_their_own(model: Model, tmp_path: Path) -> None:
    """By the place of their files; and files that have changed since are not those that were tuned."""
    facts = circumstances(model, 1, False)
    tried = {}
    for name, speed in (("one", 1.2), ("two", 1.6)):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "weights").write_text("the same")
        tried[name] = DraftModelConfig(path=str(tmp_path / name))
        keep(Tuned(tried[name], speed, FOUND.prices), tried[name], facts)
    assert len(list(cache().iterdir())) == 2
    assert (best := recall(facts)) is not None and best.drafter == tried["two"]
    (tmp_path / "two" / "deep" / "weights").write_text("another!")
    with pytest.warns(RuntimeWarning, match="two.*not the files that were tuned"):
        assert (left := recall(facts)) is not None and left.drafter == tried["one"]
    shutil.rmtree(tmp_path / "one")
    with pytest.warns(RuntimeWarning, match="not the files"):
        assert recall(facts) is None
    keep(Tuned(tried["two"], 1.3, FOUND.prices), tried["two"], facts)
    assert len(list(cache().iterdir())) == 2  # tuned again, in the place of the old one
    assert identity(NgramConfig()) == {"kind": "ngram", "path": "", "files": ""}


def test_other_circumstances_have_tunings_of_their_own(model: Model, seed: int) -> None:
    facts = circumstances(model, 1, False)
    keep(FOUND, TRIED, facts)
    assert recall(facts) == FOUND
    other = Model(tiny("mtp_sequential", seed + 1), None, {})
    same = Model(tiny("mtp_sequential", seed), None, {})
    retrained = Model(tiny("mtp_sequential", seed), None, {})
    assert circumstances(same, 1, False) == facts
    with torch.no_grad():
        next(retrained.network.heads["mtp"].parameters()).add_(0.1)
    for changed in (circumstances(model, 2, False), circumstances(model, 1, True), circumstances(other, 1, False)):
        assert recall(changed) is None
    assert recall(circumstances(retrained, 1, False)) is None
    model.network.float()
    assert recall(circumstances(model, 1, False)) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": "other"}', json.dumps({"format": FORMAT, "facts": {}})],
)
def test_a_damaged_or_foreign_file_is_passed_over_with_a_notice(model: Model, text: str) -> None:
    facts = circumstances(model, 1, False)
    path = keep(FOUND, TRIED, facts)
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
        ("prices", {"steps": {"1": 1.0}, "draft": 0.1}),
        ("tried", {"kind": "mtp", "path": "elsewhere", "files": ""}),
        ("speed", "fast"),
        ("facts", {"model": "another"}),
    ],
)
def test_a_bad_field_is_passed_over_too(model: Model, field: str, value: Any) -> None:
    facts = circumstances(model, 1, False)
    path = keep(FOUND, TRIED, facts)
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.warns(RuntimeWarning, match="ignored"):
        assert recall(facts) is None
