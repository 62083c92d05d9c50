"""Compiled flash attention against its float64 twin: values, sums, gradients; biases, masks, shapes that tiles do not divide."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.nn.flash import flash_attention
from fewstep.nn.kernels.flash import takes

pytest_plugins = ("kernel_paths",)

SIZES = [  # rows, query heads, key heads, queries, keys, key width, value width
    (1, 1, 1, 1, 1, 4, 4),
    (2, 4, 2, 7, 9, 5, 3),
    (2, 4, 1, 130, 300, 20, 40),
    (1, 3, 3, 300, 131, 64, 32),
]
BIASES = [None, (1, 1), (2, 1), (1, 2), "one", "heads"]
Segments = tuple[Tensor, Tensor] | None


def drawn(sizes: tuple[int, ...], shape: object = None) -> list[Tensor]:
    """q, k, v and a bias: dense, where 1 stands for one of all and 2 for one each, or by distance."""
    batch, heads, groups, queries, keys, width, values = sizes
    shapes = [(batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, values)]
    if isinstance(shape, tuple):
        shapes.append((batch if shape[0] == 2 else 1, heads if shape[1] == 2 else 1, queries, keys))
    elif shape is not None:
        shapes.append((heads if shape == "heads" else 1, queries + keys - 1))
    return [torch.randn(each) for each in shapes]


def segments_for(kind: str, sizes: tuple[int, ...]) -> Segments:
    if kind == "none":
        return None
    pair = torch.randint(-1, 4, (sizes[0], sizes[3])), torch.randint(-1, 4, (sizes[0], sizes[4]))
    return pair if kind == "mixed" else (pair[0].sort(1).values, pair[1].sort(1).values)


def with_gradients(inputs: list[Tensor], weights: list[Tensor], segments: Segments, causal: bool) -> list[Tensor]:
    """y, logarithms, and the gradients of a weighted sum of both (of finite logarithms)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    q, k, v, *bias = leaves
    y, lse = flash_attention(q, k, v, *bias, segments=segments, causal=causal)
    finite = lse > -math.inf
    total = (y * weights[0].to(y.dtype)).sum() + (lse[finite] * weights[1].to(lse.dtype)[finite]).sum()
    return [y, lse, *torch.autograd.grad(total, leaves)]


def close(found: Tensor, wanted: Tensor, tolerance: float = 3e-5) -> bool:
    """To the rounding of terms that are about 1, or as large as the largest sum of them; -inf in the same places."""
    finite = wanted.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return False
    wanted = wanted[finite]
    return not len(wanted) or bool((found[finite].double() - wanted).abs().max() <= tolerance * (1 + wanted.abs().max()))


@pytest.mark.parametrize("sight", ["none", "sorted", "mixed"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_float64_twin_and_so_do_the_gradients(
    kernel_path: str, sizes: tuple[int, ...], causal: bool, sight: str
) -> None:
    segments = segments_for(sight, sizes)
    for shape in BIASES:
        inputs = drawn(sizes, shape)
        assert takes(*inputs[:3], segments)
        weights = [torch.randn(*sizes[:2], sizes[3], sizes[6]), torch.randn(*sizes[:2], sizes[3])]
        found = with_gradients(inputs, weights, segments, causal)
        wanted = with_gradients([x.double() for x in inputs], weights, segments, causal)
        names = ("y", "lse", "dq", "dk", "dv", "dbias")
        wrong = [name for name, one, two in zip(names, found, wanted, strict=False) if not close(one, two)]
        assert not wrong, (shape, wrong)


def test_results_are_the_same_whatever_the_threads(kernel_path: str, threads_restored: None) -> None:
    sizes = (1, 4, 2, 400, 400, 16, 16)
    for shape in (None, (1, 1), "one"):
        inputs, found = drawn(sizes, shape), []
        weights = [torch.randn(1, 4, 400, 16), torch.randn(1, 4, 400)]
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(with_gradients(inputs, weights, None, True))
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_bias_may_hide_keys(kernel_path: str) -> None:
    """-inf in a bias hides, a whole row of it too, without a gradient that is not a number."""
    sizes = (1, 2, 2, 60, 60, 8, 8)
    q, k, v, bias = drawn(sizes, (1, 1))
    bias = bias.masked_fill(torch.rand(60, 60) < 0.3, -math.inf)
    bias[..., 7, :] = -math.inf
    weights = [torch.randn(1, 2, 60, 8), torch.randn(1, 2, 60)]
    found = with_gradients([q, k, v, bias], weights, None, False)
    wanted = with_gradients([x.double() for x in (q, k, v, bias)], weights, None, False)
    assert all(close(one, two) for one, two in zip(found, wanted, strict=True))
    assert not found[0][:, :, 7].any()


def test_what_is_hidden_matters_not_to_a_bit(kernel_path: str) -> None:
    q, k, v = drawn((1, 2, 1, 300, 300, 16, 16))
    segments = torch.arange(300).div(100, rounding_mode="floor").unsqueeze(0)
    y, _ = flash_attention(q, k, v, segments=segments, causal=True)
    k[:, :, 200:], v[:, :, 200:] = torch.randn(2, 1, 1, 100, 16)
    again, _ = flash_attention(q, k, v, segments=segments, causal=True)
    assert torch.equal(again[:, :, :200], y[:, :, :200]) and not torch.equal(again, y)


def test_bfloat16_is_computed_in_float32(kernel_path: str) -> None:
    inputs = [x.bfloat16() for x in drawn((1, 2, 2, 70, 70, 16, 16), (1, 2))]
    weights = [torch.randn(1, 2, 70, 16).bfloat16(), torch.randn(1, 2, 70)]
    found = with_gradients(inputs, weights, None, True)
    wanted = with_gradients([x.double() for x in inputs], weights, None, True)
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    assert close(found[1], wanted[1])
    assert all(close(one, two, 2**-7) for one, two in zip(found, wanted, strict=True))


def test_numbers_of_segments_that_do_not_fit_are_the_twins(kernel_path: str) -> None:
    q, k, v = drawn((1, 1, 1, 5, 5, 4, 4))
    segments = torch.tensor([[0, 0, 2**32, 2**32, 2**32]])
    assert not takes(q, k, v, (segments, segments)) and takes(q, k, v, None)
    assert not takes(q.double(), k.double(), v.double(), None) and not takes(q, k.bfloat16(), v, None)
    y, _ = flash_attention(q, k, v, segments=segments)
    few, _ = flash_attention(q, k, v, segments=segments.clamp(max=1))
    torch.testing.assert_close(y, few)
