"""Approximate caches of masked diffusion: exact where nothing they keep can have changed, and told how far off elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sequences import TIGHT, VOCAB
from test_unmask import MASK, RAGGED, absorbing, filled, grid, network, order_of

from fewstep.core.mixer import Full
from fewstep.core.random import CounterRng
from fewstep.decode.readers import Approximate, Compared, Whole, reader_of
from fewstep.decode.unmask import Settings, canvas_of, fill

KINDS: tuple[Any, ...] = ("prefix", "dual")
ROWS: list[list[int | None]] = [*RAGGED, [1] * 9 + [None] * 3 + [2] * 4, [None] * 16]
BLOCKS = Settings(block=4)


def compared(model: Any, kind: Any, rows: list[list[int | None]], seed: int) -> tuple[list[list[int]], float]:
    canvas = canvas_of(rows, VOCAB, MASK)
    reader = Compared(reader_of(model, canvas, cached=kind), reader_of(model, canvas), MASK)
    rng = CounterRng.seeded(range(seed, seed + len(rows)))
    made = fill(reader, absorbing(), order_of("confidence", per_step=1), grid(3), canvas, rng, BLOCKS)
    return [row.tokens for row in made], reader.deviation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{}, {"position": {"kind": "trainable", "length": 16}, "max_positions": 16}])
def test_one_layer_deep_it_is_exact(kind: Any, fields: dict[str, Any], seed: int) -> None:
    """The keys and values of tokens that do not change do not change, whatever the window holds by then."""
    model = network(depth=1, **fields)
    _, deviation = compared(model, kind, ROWS, seed)
    assert deviation < 1e-10
    whole = filled(model, ROWS, seed, order_of("confidence"), settings=BLOCKS)
    cached = filled(model, ROWS, seed, order_of("confidence"), settings=BLOCKS, cached=kind)
    assert [row.tokens for row in cached] == [row.tokens for row in whole]


@pytest.mark.parametrize("fields", [{}, {"noisy": True}, {"shifted": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_deeper_the_first_call_of_a_window_is_exact_and_the_others_are_measured(
    kind: Any, fields: dict[str, Any], seed: int
) -> None:
    model, canvas = network(**fields), canvas_of(ROWS, VOCAB, MASK)
    x, first = torch.where(canvas.free, MASK, canvas.tokens), torch.tensor([0, 4, 8, 0, 0, 8, 12])
    reader, exact, noise = Approximate(model, kind), Whole(model, Full()), torch.rand(len(ROWS), dtype=torch.float64)
    window = x.gather(1, first.unsqueeze(1) + torch.arange(4))
    inside = (first.unsqueeze(1) + torch.arange(4)) < canvas.length.unsqueeze(1)
    with torch.inference_mode():
        for each in (reader, exact):
            each.enter(x, canvas.length, first, 4)
        torch.testing.assert_close(reader(window, noise)[inside], exact(window, noise)[inside], **TIGHT)
        other = (window + 1) % MASK
        kept = [each.fork(torch.tensor([5, 1]))(other[[5, 1]], noise[[5, 1]]) for each in (reader, exact)]
        told, true = reader(other, noise)[inside], exact(other, noise)[inside]
        torch.testing.assert_close(kept[0][inside[[5, 1]]], reader(other, noise)[[5, 1]][inside[[5, 1]]], **TIGHT)
    assert not torch.allclose(told, true, rtol=1e-6, atol=1e-6)
    tokens, deviation = compared(model, kind, ROWS, seed)
    assert 1e-6 < deviation < 1
    alone = filled(model, ROWS, seed, order_of("confidence", per_step=1), settings=BLOCKS, cached=kind)
    assert [row.tokens for row in alone] == tokens  # being measured changes nothing


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_is_the_row_in_the_batch(kind: Any, seed: int) -> None:
    model = network()
    together = filled(model, ROWS, seed, order_of("threshold"), settings=BLOCKS, cached=kind, guidance=0.5)
    for i, row in enumerate(ROWS):
        alone = filled(model, [row], seed, order_of("threshold"), settings=BLOCKS, first=i, cached=kind, guidance=0.5)[0]
        assert alone.tokens == together[i].tokens and alone.cost.calls == together[i].cost.calls


def test_what_was_not_compared_has_no_deviation_and_distances_are_not_made_up(seed: int) -> None:
    model = network()
    assert math.isnan(Compared(Approximate(model, "dual"), Whole(model), MASK).deviation)
    with pytest.raises(ValueError, match=r"^position[^\n]*$"):
        filled(network(position="shaw"), ROWS, seed, settings=BLOCKS, cached="dual")
