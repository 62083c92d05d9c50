"""The Triton kernels against their twins in float64, values and gradients: on a GPU if there is one, else in the interpreter."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.mixer import Context
from fewstep.nn import decay, flash
from fewstep.nn.kernels.scan import selective_blocks
from fewstep.nn.mixers import MIXERS
from fewstep.nn.position import RopeConfig
from fewstep.nn.triton import Kernels, fused, load

pytest.importorskip("triton", reason="Triton is not installed; install fewstep[gpu]")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Call = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEWSTEP_KERNELS", raising=False)
        load.cache_clear()
        loaded = load()
    assert loaded is not None
    yield loaded
    load.cache_clear()


def same(kernel: Call, twin: Call, given: Sequence[Tensor]) -> None:
    """Outputs and gradients to float32's rounding of sums of terms about 1; outputs that are -inf have no gradient."""
    mine = [x.float().to(DEVICE).requires_grad_() for x in given]
    exact = [x.double().requires_grad_() for x in given]
    found, wanted = kernel(*mine), twin(*exact)
    finite = [torch.isfinite(x) for x in wanted]
    weights = [torch.randn_like(x) for x in wanted]
    both = []
    for leaves, outputs in ((mine, found), (exact, wanted)):
        assert all(torch.equal(torch.isfinite(x).cpu(), there) for x, there in zip(outputs, finite, strict=True))
        parts = zip(outputs, weights, finite, strict=True)
        loss = torch.stack([(x.cpu().double() * weight)[there].sum() for x, weight, there in parts]).sum()
        both.append([x.detach().cpu().double() for x in (*outputs, *torch.autograd.grad(loss, leaves))])
    for i, (x, y) in enumerate(zip(*both, strict=True)):
        torch.testing.assert_close(
            x, y, rtol=1e-5, atol=1e-5 * max(1.0, float(y[y.isfinite()].abs().max())), msg=lambda m, i=i: f"{i}: {m}"
        )


def attended(heads: int, groups: int, sizes: tuple[int, int], widths: tuple[int, int], batch: int = 1) -> list[Tensor]:
    """q, k and v."""
    (queries, keys), (width, values) = sizes, widths
    q, k = torch.randn(batch, heads, queries, width), torch.randn(batch, groups, keys, width)
    return [q, k, torch.randn(batch, groups, keys, values)]


@pytest.mark.parametrize(
    ("heads", "groups", "sizes", "widths", "causal"),
    [
        (1, 1, (16, 16), (16, 16), False),
        (2, 1, (21, 35), (5, 20), True),  # the last query is level with the last key
        (1, 1, (35, 21), (20, 3), True),  # the first queries see nothing
        (2, 2, (1, 19), (4, 4), True),
    ],
)
def test_attention(
    kernels: Kernels, heads: int, groups: int, sizes: tuple[int, int], widths: tuple[int, int], causal: bool
) -> None:
    same(
        lambda *x: kernels.flash_attention(*x, causal=causal),
        lambda *x: flash.flash_attention(*x, causal=causal),
        attended(heads, groups, sizes, widths),
    )


@pytest.mark.parametrize("shape", [(1, 1, 18, 21), (2, 2, 18, 21), (1, 38), (2, 38)])
def test_attention_with_a_bias(kernels: Kernels, shape: tuple[int, ...]) -> None:
    """Score by score and by distance, shared by rows and heads or not; a scale below zero."""
    given = [*attended(2, 1, (18, 21), (4, 4), batch=2 if len(shape) == 4 else 1), torch.randn(shape)]
    same(
        lambda *x: kernels.flash_attention(*x, causal=True, scale=-0.7),
        lambda *x: flash.flash_attention(*x, causal=True, scale=-0.7),
        given,
    )


def test_packed_attention(kernels: Kernels) -> None:
    """Segments of any order; tiles that no segment reaches, padding, queries and keys with segments of their own."""
    own = torch.tensor([0] * 3 + [1] * 20 + [3] * 10 + [-1] * 4).unsqueeze(0)
    pair = torch.tensor([[2] * 8 + [0] * 9 + [5]]), torch.tensor([[0] * 2 + [2] * 4 + [0] * 3 + [4] * 18 + [-1, 2]])
    for segments, causal, sizes in ((own, True, (37, 37)), (pair, False, (18, 29))):
        there = segments.to(DEVICE) if isinstance(segments, Tensor) else tuple(x.to(DEVICE) for x in segments)
        same(
            lambda *x, there=there, causal=causal: kernels.flash_attention(*x, segments=there, causal=causal),
            lambda *x, segments=segments, causal=causal: flash.flash_attention(*x, segments=segments, causal=causal),
            attended(1, 1, sizes, (4, 4)),
        )


def test_attention_takes_tensors_as_they_lie(kernels: Kernels) -> None:
    """Heads behind tokens, every other channel, one key for all heads."""
    q, k = (
        torch.randn(1, 9, 2, 4, device=DEVICE).transpose(1, 2),
        torch.randn(1, 1, 9, 8, device=DEVICE)[..., ::2].expand(-1, 2, -1, -1),
    )
    v = torch.randn(1, 2, 3, 9, device=DEVICE).mT
    y, lse = kernels.flash_attention(q, k, v)
    torch.testing.assert_close((y, lse), flash.flash_attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_half_precision_sums_in_single(kernels: Kernels) -> None:
    """bfloat16 is left out: the interpreter has no products of it."""
    given = [x.half() for x in attended(1, 1, (20, 20), (8, 8))]
    y, lse = kernels.flash_attention(*(x.to(DEVICE) for x in given), causal=True)
    wanted, sums = flash.flash_attention(*(x.double() for x in given), causal=True)
    assert y.dtype == torch.float16 and lse.dtype == torch.float32
    torch.testing.assert_close(y.cpu().double(), wanted, rtol=2**-9, atol=2**-9)
    torch.testing.assert_close(lse.cpu().double(), sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "widths", "decays", "packed"), [(16, (16, 16), True, False), (37, (5, 20), True, True), (20, (20, 1), False, False)]
)
def test_linear_attention(kernels: Kernels, count: int, widths: tuple[int, int], decays: bool, packed: bool) -> None:
    (width, values), batch = widths, 2 if packed else 1
    q, k = torch.randn(2, batch, count, 1, width)
    given = [q, k, torch.randn(batch, count, 1, values), torch.randn(batch, 1, width, values)]
    begins = torch.rand(batch, count) < 0.15 if packed else None
    there = None if begins is None else begins.to(DEVICE)
    if decays:
        given.append(-torch.rand(batch, count, 1))
    same(
        lambda q, k, v, start, log_a=None: kernels.sweep(q, k, v, log_a, start, there),
        lambda q, k, v, start, log_a=None: decay.sweep(q, k, v, log_a, start, begins),
        given,
    )


@pytest.mark.parametrize("kind", ["linear", "retnet", "mamba2"])
def test_mixers_sweep(kernels: Kernels, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole packed sequences of a mixer in float32 by the kernel, beside chunk after chunk in float64."""
    module: Any = MIXERS[kind]().build(width=8, heads=1, position=RopeConfig().build(head_width=8))
    places, segments = torch.arange(19).unsqueeze(0), torch.tensor([[0] * 7 + [1] * 12])
    x, weight = torch.randn(2, 1, 19, 8)
    both = []
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
        module, given = module.to(device, dtype), x.to(device, dtype).requires_grad_()
        y, _ = module(given, Context(places.to(device), segments=segments.to(device)))
        found = [y, *torch.autograd.grad((y * weight.to(y)).sum(), [given, *module.parameters()])]
        both.append([part.detach().cpu().double() for part in found])
        monkeypatch.setattr(decay, "fused", lambda *_: kernels)
    for wanted, found in zip(*both, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize(("count", "width", "states", "packed"), [(1, 1, 1, False), (19, 5, 2, True), (9, 3, 3, False)])
def test_selective_scan(kernels: Kernels, count: int, width: int, states: int, packed: bool) -> None:
    u, delta, a = torch.randn(1, count, width), 0.3 * torch.rand(1, count, width), -8 * torch.rand(states, width)
    b, c = torch.randn(2, 1, count, states)
    begins = torch.rand(1, count) < 0.15 if packed else None
    there = None if begins is None else begins.to(DEVICE)
    same(
        lambda *x: kernels.selective_scan(*x, there),
        lambda *x: selective_blocks(*x, begins),
        [u, delta, a, b, c, torch.randn(1, states, width)],
    )


def test_who_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a CPU's tensors; no float64; nobody where kernels are off, or with one notice where Triton is missing."""
    x = torch.zeros(1)
    assert fused(x) is None
    monkeypatch.setenv("FEWSTEP_KERNELS", "off")
    load.cache_clear()
    assert load() is None
    monkeypatch.delenv("FEWSTEP_KERNELS")
    monkeypatch.setitem(sys.modules, "fewstep.nn.triton.decay", None)
    load.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"slower here: [^\n]*; install fewstep\[gpu\]"):
        assert load() is None
    assert load() is None
    load.cache_clear()
