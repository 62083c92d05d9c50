"""Every mask against its definition, spelt out for one pair of tokens at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.core.mixer import Blocks, Causal, Dense, Doubled, Full, Mask, Prefix, Window
from fewstep.nn.masks import allowed, places

BATCH, COUNT = 2, 12
ANY = torch.rand(BATCH, COUNT, COUNT, generator=torch.Generator().manual_seed(0)) < 0.5


def doubled(q: int, k: int, count: int, size: int) -> bool:
    """Block diffusion (arXiv 2503.09573, section 3.4): noisy tokens first, the clean copy after them."""
    half = count // 2
    (clean_q, block_q), (clean_k, block_k) = ((i >= half, i % half // size) for i in (q, k))
    if clean_q:
        return clean_k and block_k <= block_q
    return block_k < block_q if clean_k else block_k == block_q


# (mask, may token q of row b see token k when the row is one sequence of n tokens?)
DEFINITIONS: dict[str, tuple[Mask, Callable[[int, int, int, int], bool]]] = {
    "causal": (Causal(), lambda b, q, k, n: k <= q),
    "window-1": (Window(1), lambda b, q, k, n: k == q),
    "window-4": (Window(4), lambda b, q, k, n: k in (q, q - 1, q - 2, q - 3)),
    "window-wide": (Window(99), lambda b, q, k, n: k <= q),
    "full": (Full(), lambda b, q, k, n: True),
    "blocks-1": (Blocks(1), lambda b, q, k, n: k <= q),
    "blocks-5": (Blocks(5), lambda b, q, k, n: k <= q or k // 5 == q // 5),
    "doubled-2": (Doubled(2), lambda b, q, k, n: doubled(q, k, n, 2)),
    "doubled-4": (Doubled(4), lambda b, q, k, n: doubled(q, k, n, 4)),
    "prefix": (Prefix(torch.tensor([0, 4])), lambda b, q, k, n: k <= q or k < (0, 4)[b]),
    "dense": (Dense(ANY), lambda b, q, k, n: bool(ANY[b, q, k])),
}


def test_every_mask_class_is_here() -> None:
    assert {type(mask) for mask, _ in DEFINITIONS.values()} == set(Mask.__args__)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_one_sequence_per_row(name: str) -> None:
    mask, sees = DEFINITIONS[name]
    dense = allowed(mask, COUNT, None, torch.device("cpu"))
    assert dense.dtype == torch.bool and dense.dim() == 4 and dense.shape[0] in (1, BATCH)
    wanted = [[[sees(b, q, k, COUNT) for k in range(COUNT)] for q in range(COUNT)] for b in range(BATCH)]
    assert torch.equal(dense.expand(BATCH, 1, COUNT, COUNT)[:, 0], torch.tensor(wanted))


@pytest.mark.parametrize("name", [name for name in DEFINITIONS if not name.startswith(("doubled", "dense"))])
def test_packed_sequences_are_masked_as_if_alone(name: str) -> None:
    """Padding sees itself alone and is seen by nothing else."""
    mask, sees = DEFINITIONS[name]
    segments = torch.tensor([[0] * 3 + [1] * 7 + [-1] * 2, [0, -1, -1, 1, 1, 1, 2, 3, 3, 3, 3, 3]])
    dense = allowed(mask, COUNT, segments, torch.device("cpu"))[:, 0]
    for b, row in enumerate(segments.tolist()):
        for q in range(COUNT):
            for k in range(COUNT):
                start = row.index(row[q])
                together = row[q] == row[k] >= 0 and sees(b, q - start, k - start, row.count(row[q]))
                assert bool(dense[b, q, k]) == (together or q == k), (b, q, k)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_doubled_rows_may_be_packed(size: int) -> None:
    """Both halves carry the same segments; a sequence and its clean copy are masked as if alone."""
    half = [0] * 4 + [1] * 3 + [-1]
    dense = allowed(Doubled(size), 16, torch.tensor([half + half]), torch.device("cpu"))[0, 0]
    for q in range(16):
        for k in range(16):
            segment = half[q % 8]
            start, count = half.index(segment), half.count(segment)
            own_q, own_k = (i % 8 - start + (count if i >= 8 else 0) for i in (q, k))
            together = segment == half[k % 8] >= 0 and doubled(own_q, own_k, 2 * count, size)
            assert bool(dense[q, k]) == (together or q == k), (q, k)


def test_dense_masks_meet_segments() -> None:
    segments = torch.tensor([[0] * 6 + [1] * 6, [0] * 11 + [-1]])
    dense = allowed(Dense(ANY), COUNT, segments, torch.device("cpu"))[:, 0]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
    assert torch.equal(dense, (ANY & same) | torch.eye(COUNT, dtype=torch.bool))


def test_a_segment_that_comes_back_leaks_no_future() -> None:
    segments: Tensor = torch.tensor([[0, 0, 1, 1, 0, 0]])
    dense = allowed(Causal(), 6, segments, torch.device("cpu"))[0, 0]
    assert not dense.triu(1).any()


def test_places() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, -1, -1, 2], [5, 5, 4, 4, 4, 4, 0, 0]])
    assert places(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1, 0], [0, 1, 0, 1, 2, 3, 0, 1]]


def test_what_is_no_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^mask=int: [^\n]+$"):
        allowed(3, 4, None, torch.device("cpu"))
