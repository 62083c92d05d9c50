"""Packed sequences taken apart: each is handed over once, whole and from its beginning, with at most as much again beside it."""

import pytest
import torch
from torch import Tensor

from fewstep.nn.mixers.packing import apart

SEGMENTS = torch.tensor([[4] * 5 + [2] * 1 + [-1] * 2 + [3] * 9, [-1] + [7] * 6 + [8] * 5 + [9] * 5])


@pytest.mark.parametrize("exact", [True, False])
def test_each_sequence_is_handed_over_by_itself(exact: bool) -> None:
    x = torch.arange(2 * 17, dtype=torch.float64).view(2, 17, 1) + 1
    places = torch.arange(17).expand(2, -1)
    handed = []

    def form(tokens: Tensor, positions: Tensor) -> Tensor:
        assert torch.equal(positions, (tokens.squeeze(2).long() - 1) % 17)
        handed.extend(tokens.squeeze(2).tolist())
        return torch.cat([tokens, -tokens], 2)

    y = apart(form, x, places, SEGMENTS, exact=exact)
    real = SEGMENTS >= 0
    assert torch.equal(y[..., 0], x[..., 0] * real) and torch.equal(y[..., 1], -x[..., 0] * real)
    wanted = [x[row, SEGMENTS[row] == one, 0].tolist() for row in range(2) for one in set(SEGMENTS[row].tolist()) - {-1}]
    cut = [next(run for run in wanted if run == row[: len(run)]) for row in handed]
    assert sorted(cut) == sorted(wanted)
    assert all(len(row) < 2 * len(run) if not exact else len(row) == len(run) for row, run in zip(handed, cut, strict=True))


def test_sequences_of_like_lengths_share_a_batch() -> None:
    x, places, batches = torch.randn(2, 17, 3), torch.zeros(2, 17, dtype=torch.int64), {True: [], False: []}
    for exact, shapes in batches.items():
        apart(lambda tokens, _, shapes=shapes: shapes.append(tuple(tokens.shape[:2])) or tokens, x, places, SEGMENTS, exact=exact)
    assert sorted(batches[True]) == [(1, 1), (1, 6), (1, 9), (3, 5)]
    assert sorted(batches[False]) == [(1, 1), (1, 9), (4, 6)]


def test_without_segments_or_without_tokens() -> None:
    x, places = torch.randn(2, 4, 3), torch.arange(4).expand(2, -1)
    assert apart(lambda tokens, _: tokens, x, places, None, exact=True) is x
    nothing = apart(lambda tokens, _: tokens[..., :2], x, places, torch.full((2, 4), -1), exact=False)
    assert nothing.shape == (2, 4, 2) and not nothing.any()
