"""Gated attention and FLASH's mixed chunk attention (arXiv 2202.10447), written out token by token."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from fewstep.core.mixer import Causal, Context, Full, Mask, Window
from fewstep.nn.mixers.gau import GAU, GAUConfig, Variants
from fewstep.nn.mixers.mixed_chunk import MixedChunk, MixedChunkConfig
from fewstep.nn.position import RopeConfig

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH, HEADS, BASE = 12, 3, 6
ROPE = RopeConfig(base=20.0)
BOTH = pytest.mark.parametrize("mask", [Causal(), Full()], ids=["causal", "full"])


def shaken(mixer: GAU | MixedChunk) -> GAU | MixedChunk:
    with torch.no_grad():
        for parameter in mixer.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def turned(x: Tensor, place: int) -> Tensor:
    """One vector [s] at its place."""
    at = torch.tensor([[place]])
    return ROPE.build(head_width=BASE).rotate(x.view(1, 1, 1, -1), x.view(1, 1, 1, -1), at, at, {})[0].flatten()


def score(variants: Variants, pair: int, base: Tensor, i: int, j: int) -> Tensor:
    """q_i k_j with the gains and offsets of a pair."""
    q, k = (base[t] * variants.gain[side, pair] + variants.offset[side, pair] for side, t in enumerate((i, j)))
    return turned(q, i) @ turned(k, j)


def bias(variants: Variants, i: int, j: int) -> Tensor:
    return turned(variants.bias[0, 0], i) @ turned(variants.bias[1, 0], j)


@BOTH
def test_gated_attention_unit(mask: Mask) -> None:
    """O = (U * relu^2(Q K' / n + b) V) W_o, a causal row divided by the tokens it sees."""
    mixer = shaken(GAUConfig(expand=1.5, base=BASE).build(width=WIDTH, heads=HEADS, position=ROPE.build(head_width=BASE)))
    x, count = torch.randn(1, 8, WIDTH, dtype=torch.float64), 8
    y, _ = mixer(x, Context(torch.arange(count)[None], mask=mask))
    gate, v, base = silu(mixer.uvz(x[0])).split([18, 18, BASE], -1)
    for i in range(count):
        seen = range(i + 1) if isinstance(mask, Causal) else range(count)
        row = sum(
            (score(mixer.variants, 0, base, i, j) / len(seen) + bias(mixer.variants, i, j)).relu() ** 2 * v[j] for j in seen
        )
        torch.testing.assert_close(y[0, i], mixer.out(gate[i] * row), **TIGHT)


def test_a_windowed_row_is_divided_by_its_window() -> None:
    mixer = shaken(GAUConfig(base=BASE).build(width=WIDTH, heads=HEADS))
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    y, _ = mixer(x, Context(torch.arange(9)[None], mask=Window(4)))
    alone, _ = mixer(x[:, 5:], Context(torch.arange(4)[None]))
    torch.testing.assert_close(y[:, 8], alone[:, 3], **TIGHT)  # without positions nothing else tells them apart


@BOTH
@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_mixed_chunk_attention(mask: Mask, size: int) -> None:
    """Squared ReLU inside a chunk, Q' sum K' V over earlier chunks (section 3.2), or over all chunks where it looks both ways."""
    position, count = ROPE.build(head_width=BASE), 11
    mixer = shaken(MixedChunkConfig(expand=1.5, base=BASE, size=size).build(width=WIDTH, heads=HEADS, position=position))
    x = torch.randn(1, count, WIDTH, dtype=torch.float64)
    y, _ = mixer(x, Context(torch.arange(count)[None], mask=mask))
    gate, v, base = silu(mixer.uvz(x[0])).split([18, 18, BASE], -1)
    for i in range(count):
        row = torch.zeros(18, dtype=torch.float64)
        for j in range(i + 1 if isinstance(mask, Causal) else count):
            if i // size == j // size:
                row += (score(mixer.variants, 0, base, i, j) / size + bias(mixer.variants, i, j)).relu() ** 2 * v[j]
            if i // size > j // size or isinstance(mask, Full):
                row += score(mixer.variants, 1, base, i, j) * v[j] / (size if isinstance(mask, Causal) else count)
        torch.testing.assert_close(y[0, i], mixer.out(gate[i] * row), **TIGHT)


def test_the_state_of_mixed_chunks_does_not_grow() -> None:
    mixer = MixedChunkConfig(size=8).build(width=WIDTH, heads=HEADS)
    sizes = []
    for count in (3, 300):
        state = mixer.init_state(1, 300, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            _, state = mixer.extend(torch.randn(1, count, WIDTH), Context(), state)
        sizes.append(state.commit(torch.arange(count)[None], torch.tensor([count])).nbytes())
    base, inner = mixer.base, mixer.inner
    assert sizes[0] == sizes[1] == 4 * (base * inner + 7 * (3 * base + inner)) + 8  # and the number of tokens


def test_one_chunk_is_gated_attention_of_that_length() -> None:
    """A sequence of one full chunk, both ways: the unit itself, and the linear part over the same tokens."""
    unit = shaken(GAUConfig(base=BASE).build(width=WIDTH, heads=HEADS))
    mixed = MixedChunkConfig(base=BASE, size=7).build(width=WIDTH, heads=HEADS).double()
    state = unit.state_dict()
    state["variants.gain"] = torch.cat([state["variants.gain"], torch.zeros(2, 1, BASE, dtype=torch.float64)], 1)
    state["variants.offset"] = torch.cat([state["variants.offset"], torch.zeros(2, 1, BASE, dtype=torch.float64)], 1)
    mixed.load_state_dict(state)
    x, ctx = torch.randn(2, 7, WIDTH, dtype=torch.float64), Context(torch.arange(7).expand(2, -1), mask=Full())
    torch.testing.assert_close(mixed(x, ctx)[0], unit(x, ctx)[0], **TIGHT)


def test_what_they_cannot_take_is_refused() -> None:
    x = torch.randn(1, 3, WIDTH)
    with pytest.raises(ValueError, match=r"^mask=Window: mixed_chunk takes Causal, Full; choose one of them$"):
        MixedChunkConfig().build(width=WIDTH, heads=HEADS)(x, Context(torch.arange(3)[None], mask=Window(2)))
    for config in (GAUConfig(), MixedChunkConfig()):
        with pytest.raises(ValueError, match=r"^heads=5: must divide width=12; [^\n]*$"):
            config.build(width=WIDTH, heads=5)
