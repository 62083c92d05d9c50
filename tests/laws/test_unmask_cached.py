"""Block diffusion from a cache: what training computes, what the uncached loop computes, token for token."""

import copy
from typing import Any

import pytest
import torch
from sequences import TIGHT
from test_unmask import MASK, RAGGED, filled, network, order_of
from torch import Tensor

from fewstep.core.mixer import Blocks, Doubled, Tree
from fewstep.decode.readers import Cached
from fewstep.decode.unmask import Settings
from fewstep.diffusion.orders import ORDERS
from fewstep.nn import kernels
from fewstep.nn.packed import pack

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
@pytest.mark.parametrize("shifted", [False, True])
def test_cached_generation_is_uncached_token_for_token(kind: str, shifted: bool, seed: int) -> None:
    model, settings = network(shifted=shifted), Settings(block=4)
    for rows in (PREFIXES, RAGGED):
        whole = filled(model, rows, seed, order_of(kind), Blocks(4), settings)
        cached = filled(model, rows, seed, order_of(kind), Blocks(4), settings, cached=True)
        assert [row.tokens for row in cached] == [row.tokens for row in whole]


@pytest.mark.parametrize("fields", [{"noisy": True}, {"shifted": True}, {"position": "shaw"}, {"norm": "layer", "depth": 3}])
def test_whatever_the_model(fields: dict[str, Any], seed: int) -> None:
    model, settings = network(**fields), Settings(block=4)
    for reading in ({}, {"guidance": 1.0}):
        whole = filled(model, PREFIXES, seed, None, Blocks(2), settings, **reading)
        cached = filled(model, PREFIXES, seed, None, Blocks(2), settings, cached=True, **reading)
        assert [row.tokens for row in cached] == [row.tokens for row in whole]


def test_a_row_alone_is_the_row_in_the_batch(seed: int) -> None:
    model, settings = network(shifted=True), Settings(block=4)
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


@pytest.mark.skipif(not kernels.available(), reason="no C compiler here, so no kernel whose bits could be promised")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@torch.inference_mode()
def test_packed_a_row_has_its_bits_in_any_company(dtype: torch.dtype, seed: int) -> None:
    """Rows that lack nothing, a block or, the first, a long prompt share the calls: no bit of the others' logits tells."""
    torch.manual_seed(seed)
    model = network(max_positions=128).to(dtype)
    plain = copy.deepcopy(model).to(torch.float32)
    pack(model)
    tokens, length = torch.randint(MASK, (3, 84)), torch.tensor([84, 12, 7])
    first = torch.tensor([80, 8, 4])
    window = torch.randint(MASK + 1, (3, 4))
    noise = torch.ones(3, dtype=torch.float64)

    def read(rows: list[int]) -> list[Tensor]:
        reader = Cached.of(model, 4, len(rows), 84)
        calls = reader.enter(tokens[rows], length[rows], first[rows], 4)
        assert calls.tolist() == [int(row == 0) for row in rows]  # a long prompt is a call of its own
        return [reader(window[rows], noise[rows]) for _ in range(2)]  # with what the cache lacks, and without

    together = read([0, 1, 2])
    for row in range(3):
        alone = read([row])
        count = int(length[row] - first[row])
        whole = torch.cat([tokens[row, : first[row]], window[row, :count]]).unsqueeze(0)
        law = plain.unembed(plain(whole, mask=Blocks(4)).final)[0, -count:].softmax(-1)
        for ours, theirs in zip(together, alone, strict=True):
            assert row == 0 or torch.equal(ours[row, :count], theirs[0, :count])  # prompts are read by PyTorch's products, too
            assert (ours[row, :count].softmax(-1) - law).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-4)
