"""The loop that fills gaps in any order: what it emits and costs, whose draws decide, where a row ends, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from enumerated import Joint, variation
from sequences import VOCAB, decoder
from torch import Tensor

from fewstep.core.mixer import Blocks, Full
from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.decode.readers import Guided, Whole, reader_of
from fewstep.decode.unmask import Canvas, Filled, Settings, canvas_of, fill, unmask
from fewstep.diffusion.corruptions import CORRUPTIONS
from fewstep.diffusion.orders import ORDERS

MASK = VOCAB - 1
RAGGED: list[list[int | None]] = [
    [1, 2, None, None, 3, None, None, None],
    [None] * 5,
    [4, None, 5, 6, None, 7, None, None, None, None, 8],
    [0, 1, 2, 3, 4, None, None],
    [None, 9],
]


def network(**fields: Any) -> Any:
    return decoder(**{"mask_token": MASK, **fields})


def absorbing(vocab: int = VOCAB) -> Any:
    return CORRUPTIONS["absorbing"]().build(vocab, vocab - 1)  # type: ignore[attr-defined]


def order_of(kind: str = "confidence", **fields: Any) -> Any:
    return parse(ORDERS[kind], fields).build()  # type: ignore[attr-defined]


def grid(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def filled(
    model: Any,
    rows: list[list[int | None]],
    seed: int,
    order: Any = None,
    mask: Full | Blocks = Full(),
    settings: Settings = Settings(),
    first: int = 0,
    **reading: Any,
) -> list[Filled]:
    canvas = canvas_of(rows, VOCAB, MASK, longest=model.max_positions)
    rng = CounterRng.seeded(range(seed + first, seed + first + len(rows)))
    return fill(reader_of(model, canvas, mask, **reading), absorbing(), order or order_of(), grid(3), canvas, rng, settings)


class Table:
    """A reader of an enumerable joint, whole canvases at a time."""

    calls = 1

    def __init__(self, joint: Joint, corruption: Any) -> None:
        self._predict = joint.denoiser(corruption)

    def enter(self, x: Tensor, length: Tensor, first: Tensor, width: int) -> Tensor:
        return torch.zeros_like(first)

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        return self._predict(x, noise).log()

    def fork(self, rows: Tensor) -> Table:
        return self


def test_the_loop_samples_the_data(seed: int) -> None:
    """Gaps given the rest: the conditional law of what is missing, here of two tokens given the others."""
    joint, count = Joint.drawn(3, 4, seed), 3000
    corruption = absorbing(4)
    canvas = canvas_of([[1, None, None, 2]] * count, 4, 3)
    found = fill(Table(joint, corruption), corruption, order_of(per_step=1), grid(2), canvas, CounterRng.seeded(range(count)))
    x = torch.tensor([row.tokens for row in found])
    assert bool((x[:, 0] == 1).all() & (x[:, 3] == 2).all())
    possible = (joint.states[:, 0] == 1) & (joint.states[:, 3] == 2)
    law = torch.where(possible, joint.law, 0.0)
    # total variation of 9 cells at 3000 draws is about 0.02, and 0.08 is beyond what chance gives in 10^7 runs
    assert variation(joint.shares(x), law / law.sum()) < 0.08
    assert all(row.cost.calls == 2 and row.cost.tokens == 2 and row.finish == "length" for row in found)


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("block", [None, 4])
def test_a_row_alone_is_the_row_in_any_batch(kind: str, block: int | None, seed: int) -> None:
    """Ragged rows, gaps anywhere, at their own pace: the same tokens at the same number of calls."""
    model, settings = network(), Settings(block=block)
    together = filled(model, RAGGED, seed, order_of(kind), settings=settings)
    for i, row in enumerate(RAGGED):
        alone = filled(model, [row], seed, order_of(kind), settings=settings, first=i)[0]
        assert alone.tokens == together[i].tokens and alone.cost.calls == together[i].cost.calls
        assert len(alone.tokens) == len(row) and MASK not in alone.tokens
        assert all(given is None or given == token for given, token in zip(row, alone.tokens, strict=True))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_blocks_never_see_later_ones(size: int, seed: int) -> None:
    """Under `Blocks` a block's tokens are what they are whatever the canvas holds behind them."""
    model = network()
    settings = Settings(block=size)
    long = filled(model, [[1, 2, 3] + [None] * 9], seed, mask=Blocks(size), settings=settings)[0]
    short = filled(model, [[1, 2, 3] + [None] * 5], seed, mask=Blocks(size), settings=settings)[0]
    assert long.tokens[:8] == short.tokens


def test_events_tell_what_happened_and_costs_add_up(seed: int) -> None:
    model = network()
    canvas = canvas_of(RAGGED, VOCAB, MASK)
    rng = CounterRng.seeded(range(seed, seed + len(RAGGED)))
    x, calls, tokens = canvas.tokens.clone(), 0, -1
    for event in unmask(reader_of(model, canvas), absorbing(), order_of("threshold"), grid(3), canvas, rng, Settings(block=4)):
        step = event.payload
        calls += int(step.calls.sum())
        assert event.cost.calls == calls and event.cost.tokens >= tokens
        tokens = event.cost.tokens
        for i, row in enumerate(step.rows.tolist()):
            place = torch.arange(int(step.first[i]), min(int(step.first[i]) + 4, x.shape[1]))
            kept = ~step.changed[i, : len(place)] & (step.tokens[i, : len(place)] != MASK) & (place < canvas.length[row])
            assert torch.equal(x[row, place][kept], step.tokens[i, : len(place)][kept])
            assert not bool((step.changed[i, : len(place)] & ~canvas.free[row, place]).any())
            x[row, place] = step.tokens[i, : len(place)]
    assert tokens == sum(token is None for row in RAGGED for token in row)
    assert not bool((x[canvas.free] == MASK).any())


class Ending:
    """A reader that is sure of token 5 wherever a window begins at `at`, of token 1 elsewhere."""

    calls = 1

    def __init__(self, at: int, first: Tensor | None = None) -> None:
        self._at, self._first = at, first

    def enter(self, x: Tensor, length: Tensor, first: Tensor, width: int) -> Tensor:
        self._first = first
        return torch.zeros_like(first)

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        assert self._first is not None
        logits = torch.zeros(*x.shape, VOCAB)
        logits[..., 1] = 50
        logits[self._first == self._at, 1, 5] = 100
        return logits

    def fork(self, rows: Tensor) -> Ending:
        assert self._first is not None
        return Ending(self._at, self._first[rows] if len(self._first) > int(rows.max()) else None)


def test_a_row_ends_at_its_end_token_and_later_blocks_are_not_begun() -> None:
    rows: list[list[int | None]] = [[2] + [None] * 11, [2, None, None, None, None, None, 3, None], [None] * 2]
    canvas = canvas_of(rows, VOCAB, MASK)
    rng = CounterRng.seeded(range(3))
    made = fill(Ending(4), absorbing(), order_of("threshold"), grid(3), canvas, rng, Settings(block=4, eos=(5,)))
    assert made[0].tokens == [2, 1, 1, 1, 1, 5] and made[0].finish == "eos"
    assert made[0].cost.calls == 2 and made[0].cost.tokens == 5
    # the token at position 5 stands before a given one, and ends nothing
    assert made[1].tokens == [2, 1, 1, 1, 1, 5, 3, 1] and made[1].finish == "length"
    assert made[2].tokens == [1, 1] and made[2].finish == "length"


def test_guidance_is_its_formula_and_costs_two_calls(seed: int) -> None:
    model, row = network(), [1, 2, None, 3, None, None]
    canvas = canvas_of([row], VOCAB, MASK)
    x = torch.where(canvas.free, MASK, canvas.tokens)
    guided = reader_of(model, canvas, guidance=1.5)
    noise = torch.ones(1, dtype=torch.float64)
    with torch.inference_mode():
        guided.enter(x, canvas.length, torch.tensor([0]), 6)
        told = model.unembed(model(x, mask=Full()).final)
        free = model.unembed(model(torch.full_like(x, MASK), mask=Full()).final)
        torch.testing.assert_close(guided(x, noise), 2.5 * told - 1.5 * free, rtol=1e-9, atol=1e-9)
    assert filled(model, [row], seed, guidance=1.5)[0].cost.calls == 2 * filled(model, [row], seed)[0].cost.calls
    everything = filled(model, RAGGED, seed, guidance=2.0, settings=Settings(block=4), mask=Blocks(2))
    alone = filled(model, RAGGED[2:3], seed, guidance=2.0, settings=Settings(block=4), mask=Blocks(2), first=2)
    assert alone[0].tokens == everything[2].tokens


@pytest.mark.parametrize("mixer", ["linformer", "gau", "mla"])
def test_any_bidirectional_mixer_serves(mixer: str, seed: int) -> None:
    model = network(mixers=({"kind": mixer},))
    assert len(filled(model, [[1, None, None, 2]], seed)[0].tokens) == 4


def test_a_noisy_model_is_told_how_much_is_corrupted(seed: int) -> None:
    """Else its tokens would not depend on it; and clean text is told nothing."""
    model, tokens = network(noisy=True), torch.randint(MASK, (2, 5))
    level = torch.full((2, 5), 0.3, dtype=torch.float64)
    plain = model(tokens, mask=Full()).final
    assert not torch.allclose(model(tokens, mask=Full(), noise=level).final, plain)
    assert torch.equal(model(tokens, mask=Full(), noise=0 * level).final, plain)
    assert filled(model, RAGGED, seed)[1].tokens == filled(model, RAGGED[1:2], seed, first=1)[0].tokens


@pytest.mark.parametrize("kind", ["ancestral", "euler", "analytic"])
@pytest.mark.parametrize("scores", [False, True])
def test_uniform_noise_never_shows_the_mask(kind: str, scores: bool, seed: int) -> None:
    model = network(noisy=True)
    corruption = CORRUPTIONS["uniform"]().build(VOCAB, MASK)  # type: ignore[attr-defined]
    canvas = canvas_of(RAGGED, VOCAB, MASK)
    rng = CounterRng.seeded(range(seed, seed + 5))
    for row, given in zip(
        fill(Whole(model), corruption, order_of(kind), grid(4), canvas, rng, Settings(scores=scores)), RAGGED, strict=True
    ):
        assert MASK not in row.tokens and len(row.tokens) == len(given) and row.cost.calls == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"^rows=\[\]: empty; "),
        ([[1], []], r"^rows\[1\]=\[\]: empty; "),
        ([[None, 99]], r"^rows\[0\]: token 99 is outside 0..10; "),
        ([[None, -1]], r"^rows\[0\]: token -1 is outside 0..10; "),
        ([[None, MASK]], r"^rows\[0\]: holds the mask token 10, [^\n]*; give None "),
        ([[1] + [None] * 12], r"^rows\[0\]: 13 positions exceed the context of 12; shorten "),
    ],
)
def test_a_bad_canvas_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message + r"[^\n]*$"):
        canvas_of(rows, VOCAB, MASK, longest=12)


def test_what_cannot_be_read_is_refused(seed: int) -> None:
    model, row = network(), [[1, None, None, 2]]
    with pytest.raises(ValueError, match=r"^block=4: the model attends in blocks of 3; choose a multiple[^\n]*$"):
        filled(model, row, seed, mask=Blocks(3), settings=Settings(block=4))
    with pytest.raises(ValueError, match=r"^mask=Full: [^\n]*causal[^\n]*; choose one of [^\n]*$"):
        filled(network(mixers=("linear",)), row, seed)
    with torch.no_grad():
        model.embedding.weight[2] = torch.nan
    with pytest.raises(ValueError, match=r"^logits: not a number at row 0, position 0 [^\n]*; look at the weights$"):
        filled(model, row, seed)
    canvas = canvas_of(row, VOCAB, None)
    with pytest.raises(ValueError, match=r"^guidance=1.0: this model has no mask token [^\n]*; set guidance=0$"):
        Guided(Whole(model), Whole(model), canvas, 1.0)
    for mask, cached in ((Full(), True), (Blocks(2), "dual")):
        with pytest.raises(ValueError, match=r"^cached=[^\n]*: not a cache for mask=[^\n]*; choose [^\n]*$"):
            reader_of(model, canvas, mask, cached=cached)


def test_nothing_to_fill_costs_nothing(seed: int) -> None:
    made = filled(network(), [[1, 2], [3]], seed)
    assert [row.tokens for row in made] == [[1, 2], [3]] and all(row.cost.calls == 0 for row in made)
    assert isinstance(canvas_of([[1]], VOCAB, MASK), Canvas)
