"""Block diffusion from a cache: what training computes, what the uncached loop computes, token for token."""

from typing import Any

import pytest
import torch
from sequences import TIGHT
from test_unmask import MASK, RAGGED, filled, network, order_of

from fewstep.core.mixer import Blocks, Doubled, Tree
from fewstep.decode.unmask import Settings
from fewstep.diffusion.orders import ORDERS

PREFIXES: list[list[int | None]] = [[1, 2, 3] + [None] * 9, [4] * 9 + [None] * 3, [None] * 12, [5, 6] + [None] * 4]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_cached_step_is_the_training_mask(size: int, noisy: bool) -> None:
    model, count = network(noisy=noisy), 12
    clean = torch.randint(MASK, (2, count))
    x_t = torch.where(torch.rand(2, count) < 0.5, MASK, clean)
    noise = torch.rand(2, count // size, dtype=torch.float64).repeat_interleave(size, 1)
    places = torch.arange(count).repeat(2).expand(2, -1)
    level = torch.cat([noise, 0 * noise], 1) if noisy else None
    with torch.inference_mode():
        trained = model.unembed(model(torch.cat([x_t, clean], 1), positions=places, mask=Doubled(size), noise=level).final)
        state = model.init_state(2, count + size, device="cpu", dtype=torch.float64)
        for first in range(0, count, size):
            here = slice(first, first + size)
            inputs = model.embed(x_t[:, here], noise[:, here]) if noisy else None
            output = model.extend(Tree.chain(x_t[:, here]), state, mask=Blocks(size), inputs=inputs)
            torch.testing.assert_close(output.logits, trained[:, here], **TIGHT)
            output = model.extend(Tree.chain(clean[:, here]), output.state.rollback(), mask=Blocks(size))
            state = output.state.commit(torch.arange(size).expand(2, -1), torch.full((2,), size))


@pytest.mark.parametrize("kind", ORDERS)
def test_cached_generation_is_uncached_token_for_token(kind: str, seed: int) -> None:
    model, settings = network(), Settings(block=4)
    for rows in (PREFIXES, RAGGED):
        whole = filled(model, rows, seed, order_of(kind), Blocks(4), settings)
        cached = filled(model, rows, seed, order_of(kind), Blocks(4), settings, cached=True)
        assert [row.tokens for row in cached] == [row.tokens for row in whole]


@pytest.mark.parametrize("fields", [{"noisy": True}, {"position": "shaw"}, {"norm": "layer", "depth": 3}])
def test_whatever_the_model(fields: dict[str, Any], seed: int) -> None:
    model, settings = network(**fields), Settings(block=4)
    for reading in ({}, {"guidance": 1.0}):
        whole = filled(model, PREFIXES, seed, None, Blocks(2), settings, **reading)
        cached = filled(model, PREFIXES, seed, None, Blocks(2), settings, cached=True, **reading)
        assert [row.tokens for row in cached] == [row.tokens for row in whole]


def test_a_row_alone_is_the_row_in_the_batch(seed: int) -> None:
    model, settings = network(), Settings(block=4)
    together = filled(model, PREFIXES, seed, order_of("threshold"), Blocks(4), settings, cached=True)
    for i, row in enumerate(PREFIXES):
        alone = filled(model, [row], seed, order_of("threshold"), Blocks(4), settings, i, cached=True)[0]
        assert alone.tokens == together[i].tokens and alone.cost.calls == together[i].cost.calls


def test_reading_what_is_final_is_no_call_of_its_own(seed: int) -> None:
    """It shares the first call of the next block."""
    model, settings = network(), Settings(block=4)
    rows = [PREFIXES[1], PREFIXES[2]]
    order = order_of("random", per_step=4)
    made = filled(model, rows, seed, order, Blocks(4), settings, cached=True)
    assert [row.cost.calls for row in made] == [1, 3]  # one step a block
