"""Sparse attention (arXiv 1904.10509): each pattern's sets as published, computed without the rest, equal to a masked whole."""

import math
from collections.abc import Callable

import pytest
import torch

from fewstep.core.mixer import Causal, Context, Full
from fewstep.nn.mixers.patterns import BlocksConfig, FixedConfig, Pattern, StridedConfig, WindowConfig
from fewstep.nn.mixers.sparse import SparseConfig, attend

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
Sees = Callable[[int, int], bool]
CASES: dict[str, tuple[Pattern, Sees]] = {  # query, key -> whether the definition has the pair, causality apart
    "strided": (StridedConfig(stride=4), lambda i, j: abs(i - j) < 4 or (i - j) % 4 == 0),
    "strided-1": (StridedConfig(stride=1), lambda i, j: True),
    "fixed": (FixedConfig(block=5, summary=2), lambda i, j: i // 5 == j // 5 or j % 5 in (3, 4)),
    "window": (WindowConfig(window=4, sinks=2), lambda i, j: abs(i - j) < 4 or j < 2),
    "window-only": (WindowConfig(window=3, sinks=0), lambda i, j: abs(i - j) < 3),
    "blocks": (BlocksConfig(block=3, local=2, stride=3), lambda i, j: abs(i // 3 - j // 3) < 2 or (i // 3 - j // 3) % 3 == 0),
}
EVERY = pytest.mark.parametrize("name", CASES)
EITHER = pytest.mark.parametrize("causal", [True, False])


def dense(sees: Sees, count: int, causal: bool) -> torch.Tensor:
    return torch.tensor([[sees(i, j) and (j <= i or not causal) for j in range(count)] for i in range(count)])


@EITHER
@EVERY
def test_pieces_hold_every_pair_of_the_definition_once(name: str, causal: bool) -> None:
    pattern, sees = CASES[name]
    for count in (1, 2, 7, 12, 30, 41):
        held = torch.zeros(count, count, dtype=torch.int64)
        for piece in pattern.pieces(count, causal, torch.device("cpu")):
            for group in range(len(piece.queries)):
                query, key = piece.allowed[group].nonzero().unbind(1)
                held.index_put_((piece.queries[group, query], piece.keys[group, key]), torch.tensor(1), accumulate=True)
        assert torch.equal(held, dense(sees, count, causal).long())


@EITHER
@EVERY
def test_equals_masked_attention_with_gradients(name: str, causal: bool) -> None:
    pattern, sees = CASES[name]
    q, k, v, weight = torch.randn(4, 2, 3, 23, 5, dtype=torch.float64)
    given = [x.requires_grad_() for x in (q, k, v)]
    scores = (q @ k.mT / math.sqrt(5)).masked_fill(~dense(sees, 23, causal), -math.inf)
    wanted = scores.softmax(-1) @ v
    got = attend(q, k, v, pattern.pieces(23, causal, torch.device("cpu")))
    torch.testing.assert_close(got, wanted, **TIGHT)
    both = [torch.autograd.grad((y * weight).sum(), given, retain_graph=True) for y in (got, wanted)]
    torch.testing.assert_close(*both, **TIGHT)


@pytest.mark.parametrize("pattern", [StridedConfig(stride=32), FixedConfig(block=32, summary=1), WindowConfig(window=32)])
def test_touches_few_pairs(pattern: Pattern) -> None:
    """Strides of sqrt(T): T sqrt(T) pairs of T^2, and at most twice those that are seen, plus what lies before the beginning."""
    pieces = pattern.pieces(1024, True, torch.device("cpu"))
    touched = sum(piece.allowed.numel() for piece in pieces)
    seen = sum(int(piece.allowed.sum()) for piece in pieces)
    assert touched <= 3 * 1024 * 32
    assert touched <= 2.2 * seen


def test_no_block_is_computed_in_vain() -> None:
    """With whole blocks, a group of queries and a block of its keys always have a pair, but before the beginning."""
    near, far = BlocksConfig(block=8, local=2, stride=4).pieces(128, False, torch.device("cpu"))
    for piece in (near, far):
        blocks = piece.allowed.view(len(piece.queries), -1, 8, piece.keys.shape[1] // 8, 8).any(4).any(2)
        real = (piece.keys >= 0) & (piece.keys < 128)
        used = blocks | ~real.view(len(piece.queries), 1, -1, 8).any(3)
        own = torch.eye(used.shape[1], dtype=torch.bool)  # what is near is not computed again: the diagonal of what is far
        assert (used if piece is near else used | own).all()


def test_a_model_may_mix_patterns_by_name() -> None:
    config = SparseConfig.model_validate({"pattern": {"kind": "fixed", "block": 8, "summary": 2}})
    assert config.pattern == FixedConfig(block=8, summary=2)
    assert SparseConfig.model_validate(config.model_dump()) == config
    with pytest.raises(ValueError, match=r"summary=9: must be at most block=8; lower it"):
        FixedConfig(block=8, summary=9)


def test_packed_sequences_are_attended_apart() -> None:
    """Each begins anew, where its blocks do too."""
    mixer = SparseConfig(pattern=FixedConfig(block=4, summary=1)).build(width=8, heads=2).double()
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    segments = torch.tensor([[0] * 5 + [1] * 6 + [-1] * 2, [0, -1, -1] + [1] * 10])
    positions = torch.tensor([[*range(5), *range(6), 0, 0], [0, 0, 0, *range(10)]])
    for mask in (Causal(), Full()):
        y, _ = mixer(x, Context(positions, segments=segments, mask=mask))
        for row, begin, end in ((0, 0, 5), (0, 5, 11), (1, 0, 1), (1, 3, 13)):
            alone, _ = mixer(x[row : row + 1, begin:end], Context(torch.arange(end - begin)[None], mask=mask))
            torch.testing.assert_close(y[row : row + 1, begin:end], alone, **TIGHT)
    nothing, _ = mixer(x, Context(positions, segments=torch.full_like(segments, -1)))
    assert nothing.shape == x.shape and nothing.isfinite().all()


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^heads=3: must divide width=8; [^\n]*$"):
        SparseConfig().build(width=8, heads=3)
