"""FlashAttention tile by tile is attention: values, sums, gradients of everything, parts merged; memory linear in the length."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.nn.flash import flash_attention, merge, segments_of

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
SIZES = pytest.mark.parametrize(("queries", "keys"), [(1, 9), (7, 7), (10, 10), (6, 11)])


def naive(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seen: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same with all scores at once; `seen` broadcasts to [B,H,T,S]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if bias is not None and bias.ndim == 2:
        queries, keys = scores.shape[2:]
        bias = bias[:, torch.arange(keys) - torch.arange(queries)[:, None] + queries - 1]
    scores = (scores if bias is None else scores + bias).masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return weights @ v, scores.logsumexp(-1)


def drawn(queries: int, keys: int, heads: int = 4, groups: int = 2, values: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, heads, queries, 5, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, groups, keys, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, groups, keys, values, dtype=torch.float64, requires_grad=True)
    return q, k, v


def same_with_gradients(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], inputs: list[Tensor]) -> None:
    torch.testing.assert_close(got, wanted, **TIGHT)
    weights = [torch.randn_like(part) for part in got]
    finite = wanted[1] > -math.inf
    both = []
    for y, lse in (got, wanted):
        total = (y * weights[0]).sum() + (lse[finite] * weights[1][finite]).sum()
        both.append(torch.autograd.grad(total, inputs))
    torch.testing.assert_close(*both, **TIGHT)


def triangle(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


@SIZES
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [None, (1, 1), (1, 4), (2, 1), (2, 4), "one", "heads"])
def test_values_and_gradients(queries: int, keys: int, causal: bool, shape: Any) -> None:
    """Grouped heads, values of another width, every shape of a learned bias; tiles of 4 that do not divide the lengths."""
    inputs = [*drawn(queries, keys)]
    bias = None
    if shape is not None:
        size = {"one": (1, queries + keys - 1), "heads": (4, queries + keys - 1)}.get(shape) or (*shape, queries, keys)
        bias = torch.randn(size, dtype=torch.float64, requires_grad=True)
        inputs.append(bias)
    seen = triangle(queries, keys) if causal else torch.ones(queries, keys, dtype=torch.bool)
    got = flash_attention(*inputs[:3], bias, causal=causal, block=4)
    same_with_gradients(got, naive(*inputs[:3], bias, seen), inputs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [1, 3, 64])
def test_packed_sequences_are_attended_apart(causal: bool, block: int) -> None:
    """Padding sees nothing and is seen by nothing: zeros, -inf, and no gradient that is not a number."""
    inputs = [*drawn(9, 9)]
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [-1, 0, 1, 1, 1, 2, 2, 2, 2]])
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
    seen = (seen & triangle(9, 9) if causal else seen)[:, None]
    got = flash_attention(*inputs, segments=segments, causal=causal, block=block)
    assert (got[0].transpose(1, 2)[segments < 0] == 0).all()
    same_with_gradients(got, naive(*inputs, None, seen), inputs)


def test_queries_and_keys_with_segments_of_their_own() -> None:
    inputs = [*drawn(4, 7)]
    pair = torch.tensor([[0, 0, 1, 2], [3, 1, 1, 0]]), torch.tensor([[0, 1, 1, 1, 0, 2, 2], [0, 0, 1, 1, 1, 1, -1]])
    seen = (pair[0][:, :, None] == pair[1][:, None, :])[:, None]
    same_with_gradients(flash_attention(*inputs, segments=pair, block=2), naive(*inputs, None, seen), inputs)


def test_starts_of_packed_sequences() -> None:
    assert segments_of(torch.tensor([0, 2, 2, 5, 6])).tolist() == [[0, 0, 2, 2, 2, 3]]
    q, k, v = (x[:1] for x in drawn(6, 6))
    y, _ = flash_attention(q, k, v, segments=segments_of(torch.tensor([0, 4, 6])), causal=True, block=4)
    for begin, end in ((0, 4), (4, 6)):
        alone, _ = flash_attention(*(x[:, :, begin:end] for x in (q, k, v)), causal=True)
        torch.testing.assert_close(y[:, :, begin:end], alone, **TIGHT)


def test_gradcheck() -> None:
    q, k, v = drawn(3, 5, heads=2, groups=1, values=2)
    bias = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0, 0, 1]] * 2), torch.tensor([[0, 0, 0, 1, 1]] * 2)

    def attended(*given: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attention(*given, segments=segments, scale=0.7, block=2)

    assert torch.autograd.gradcheck(attended, (q, k, v, bias), fast_mode=True)


@pytest.mark.parametrize("cuts", [(3,), (1, 4, 8), (0, 5)])
def test_parts_merge_into_the_whole(cuts: tuple[int, ...]) -> None:
    """Split over the keys, in any order, a part that a query sees nothing of included; gradients pass through the sums."""
    inputs = [*drawn(4, 9)]
    segments = torch.tensor([[0, 0, 1, 2]] * 2), torch.tensor([[0, 0, 0, 1, 1, 0, 1, 1, 0]] * 2)
    q, k, v = inputs
    bounds = [0, *cuts, 9]
    parts = []
    for begin, end in pairwise(bounds):
        pair = segments[0], segments[1][:, begin:end]
        parts.append(flash_attention(q, k[:, :, begin:end], v[:, :, begin:end], segments=pair, block=2))
    order = torch.randperm(len(parts)).tolist()
    merged = parts[order[0]]
    for i in order[1:]:
        merged = merge(*merged, *parts[i])
    same_with_gradients(merged, flash_attention(*inputs, segments=segments), inputs)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (x.detach().float() for x in drawn(8, 8))
    y, lse = flash_attention(100 * q, 100 * k, v, causal=True, block=3)
    wanted, sums = naive(100 * q.double(), 100 * k.double(), v.double(), None, triangle(8, 8))
    torch.testing.assert_close(y, wanted.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, sums.float(), rtol=1e-5, atol=0)


def test_half_precision_sums_in_single() -> None:
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in drawn(33, 33))
    y, lse = flash_attention(q, k, v, causal=True, block=8)
    assert y.dtype == torch.bfloat16 and lse.dtype == torch.float32
    wanted, sums = naive(q.double(), k.double(), v.double(), None, triangle(33, 33))
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-5)
    assert all(grad.dtype == torch.bfloat16 for grad in torch.autograd.grad(y.sum(), (q, k, v)))


class Largest(TorchDispatchMode):
    """The largest tensor that any operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for part in made if isinstance(made, tuple | list) else (made,):
            self.numel = max(self.numel, part.numel() if isinstance(part, Tensor) else 0)
        return made


def test_memory_is_linear_in_the_length() -> None:
    """No tensor of T x T is ever made, forward or backward, nor kept in between."""
    largest, kept = {}, {}
    for count in (256, 512):
        q, k, v = (torch.randn(1, 2, count, 8, requires_grad=True) for _ in range(3))
        bias, held = torch.randn(2, 2 * count - 1, requires_grad=True), []
        with Largest() as made, torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x) or x, lambda x: x):
            y, _ = flash_attention(q, k, v, bias, causal=True, block=32)
            torch.autograd.grad(y.sum(), (q, k, v, bias))
        largest[count], kept[count] = made.numel, sum(x.numel() for x in held)
    assert largest[512] <= 2.1 * largest[256] and kept[512] <= 2.1 * kept[256]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"k": (2, 3, 7, 5)}, "q, k, v"),
        ({"k": (2, 2, 7, 4)}, "q, k, v"),
        ({"v": (2, 2, 6, 5)}, "q, k, v"),
        ({"bias": (2, 4, 7, 6)}, "bias"),
        ({"bias": (4, 12)}, "bias"),
        ({"segments": (2, 6)}, "segments"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_one_line(change: dict[str, tuple[int, ...]], field: str) -> None:
    shapes = {"q": (2, 4, 7, 5), "k": (2, 2, 7, 5), "v": (2, 2, 7, 3), **change}
    given = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=rf"^{field}: shapes? [^\n]*; give [^\n]*$"):
        flash_attention(**given)
