"""The skinny matmul against float64 on every instruction-set path of this machine, and bitwise row invariance."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.nn import kernels
from fewstep.nn.kernels.kernel import HugePages, default_kernel

DTYPES = (torch.bfloat16, torch.float32)


pytest_plugins = ("kernel_paths",)


def operands(
    rows: int, outputs: int, inputs: int, dtypes: tuple[torch.dtype, torch.dtype], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator).to(dtypes[0])
    weight = torch.randn(outputs, inputs, generator=generator).to(dtypes[1])
    return x, weight, torch.randn(outputs, generator=generator).to(dtypes[1])


def error_bound(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """What rounding may do: one rounding per product and per sum in float32, and the last one to the output's dtype."""
    absolute = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    last = 2.0**-8 if y.dtype == torch.bfloat16 else 0.0
    return absolute * (2 * x.shape[1] + 2) * 2.0**-24 + y.double().abs() * last * 1.01 + 1e-30


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("outputs, inputs", [(1, 1), (16, 2), (15, 33), (64, 64), (130, 257), (257, 130), (80, 1024)])
def test_equals_float64_up_to_rounding(
    kernel_path: str, outputs: int, inputs: int, w_dtype: torch.dtype, x_dtype: torch.dtype, biased: bool, seed: int
) -> None:
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 31, 32, 48, 49, 100):
        x, weight, offset = operands(rows, outputs, inputs, (x_dtype, w_dtype), seed + rows)
        bias = offset if biased else None
        y = kernels.linear(x, kernels.pack(weight, bias))
        reference = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert y.dtype == x_dtype and y.shape == reference.shape
        assert bool(((y.double() - reference).abs() <= error_bound(x, weight, bias, y)).all())


def test_the_last_rounding_is_to_nearest_with_ties_to_even(kernel_path: str, seed: int) -> None:
    x, weight, _ = operands(60, 70, 1, (torch.bfloat16, torch.bfloat16), seed)  # exact in float32, many a tie
    assert torch.equal(kernels.linear(x, kernels.pack(weight)), (x.float() * weight.float().T).bfloat16())


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES)
def test_a_row_is_bitwise_the_same_in_any_company(
    kernel_path: str, threads_restored: None, w_dtype: torch.dtype, x_dtype: torch.dtype, seed: int
) -> None:
    x, weight, bias = operands(100, 1030, 257, (x_dtype, w_dtype), seed)  # large enough for the second thread at one row
    packed = kernels.pack(weight, bias)
    torch.set_num_threads(1)
    alone = torch.cat([kernels.linear(x[r : r + 1], packed) for r in range(100)])
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows in (*range(1, 33), 48, 49, 97, 100):
            assert torch.equal(kernels.linear(x[:rows], packed), alone[:rows]), (count, rows)
        assert torch.equal(kernels.linear(x.flip(0), packed), alone.flip(0))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row_and_output(
    kernel_path: str, w_dtype: torch.dtype, x_dtype: torch.dtype, seed: int
) -> None:
    x, weight, _ = operands(9, 37, 51, (x_dtype, w_dtype), seed)
    clean = kernels.linear(x, kernels.pack(weight))
    x[2, 7], x[5, 50], weight[11, 3] = torch.inf, torch.nan, torch.nan
    y = kernels.linear(x, kernels.pack(weight))
    assert bool(y[5].isnan().all() and y[:, 11].isnan().all())
    others = torch.arange(37) != 11
    assert bool(torch.isinf(y[2, others]).all())
    rows = torch.tensor([0, 1, 3, 4, 6, 7, 8])
    assert torch.equal(y[rows][:, others], clean[rows][:, others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_loses_nothing(kernel_path: str, dtype: torch.dtype, seed: int) -> None:
    for outputs, inputs in ((1, 1), (16, 8), (33, 7), (100, 130)):
        _, weight, bias = operands(1, outputs, inputs, (dtype, dtype), seed)
        packed = kernels.pack(weight.t().contiguous().t(), bias)
        assert torch.equal(packed.unpack(), weight) and packed.dtype == dtype
        assert weight.nbytes <= packed.nbytes - 4 * outputs <= (outputs + 15) * (inputs + 1) * dtype.itemsize


def test_shapes_strides_and_empty_batches(kernel_path: str, seed: int) -> None:
    x, weight, bias = operands(24, 40, 36, (torch.float32, torch.float32), seed)
    packed = kernels.pack(weight, bias)
    y = kernels.linear(x, packed)
    assert torch.equal(kernels.linear(x.view(2, 3, 4, 36), packed), y.view(2, 3, 4, 40))
    assert torch.equal(kernels.linear(x.t().contiguous().t(), packed), y)
    assert torch.equal(kernels.linear(x[::3], packed), y[::3])
    assert torch.equal(kernels.linear(x[0], packed), y[0])
    assert kernels.linear(x[:0], packed).shape == (0, 40)
    assert kernels.linear(x.view(2, 12, 36)[:, :0], packed).shape == (2, 0, 40)


def test_memory_is_shared_by_weights_and_survives_its_block(kernel_path: str, seed: int) -> None:
    memory = HugePages(block=1 << 16)
    shapes = [(3,), (1000, 7), (9000,), (5, 5), (1 << 15,), (2, 2)]
    held = [memory.zeros(shape, torch.float32) for shape in shapes]
    assert all(t.data_ptr() % 64 == 0 and not t.any() for t in held)
    for value, tensor in enumerate(held):
        tensor.fill_(value + 1)
    del memory
    assert all(bool((tensor == value + 1).all()) for value, tensor in enumerate(held))


def test_two_threads_survive_a_fork(kernel_path: str, threads_restored: None, holds_in_a_fork: Any, seed: int) -> None:
    x, weight, _ = operands(8, 1024, 256, (torch.float32, torch.float32), seed)
    packed = kernels.pack(weight)
    torch.set_num_threads(2)
    y = kernels.linear(x, packed)  # the parent's pool exists from here on
    assert holds_in_a_fork(lambda: torch.equal(kernels.linear(x, packed), y))


def test_the_operator_is_the_function(kernel_path: str, seed: int) -> None:
    for dtype in DTYPES:
        x, weight, bias = operands(5, 48, 31, (dtype, dtype), seed)
        packed = kernels.pack(weight, bias)
        assert torch.equal(torch.ops.fewstep.skinny_linear(x, packed.data, packed.bias, 48), kernels.linear(x, packed))


@pytest.mark.claims
def test_torch_compile_keeps_the_operator_whole(kernel_path: str, seed: int) -> None:
    x, weight, bias = operands(5, 48, 31, (torch.bfloat16, torch.bfloat16), seed)
    packed = kernels.pack(weight, bias)

    def step(x: Tensor) -> Tensor:
        return kernels.linear(x * 2, packed).relu()

    with torch.no_grad():
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), step(x))
    torch.library.opcheck(
        torch.ops.fewstep.skinny_linear.default, (x, packed.data, packed.bias, 48), test_utils=("test_schema", "test_faketensor")
    )


def test_refusals_name_the_value_and_the_remedy(seed: int) -> None:
    x, weight, bias = operands(2, 6, 4, (torch.float32, torch.float32), seed)
    packed = kernels.pack(weight, bias)
    with pytest.raises(ValueError, match="width 3: expected 4"):
        kernels.linear(x[:, :3], packed)
    with pytest.raises(ValueError, match="float64 on cpu"):
        kernels.linear(x.double(), packed)
    with pytest.raises(ValueError, match="on meta"):
        kernels.linear(x.to("meta"), packed)
    with pytest.raises(ValueError, match="no_grad"):
        kernels.linear(x.requires_grad_(), packed)
    with torch.no_grad():
        assert not kernels.linear(x, packed).requires_grad
    with pytest.raises(ValueError, match=r"shape \(6,\): expected \[out, in\]"):
        kernels.pack(bias)
    with pytest.raises(ValueError, match="at least 1"):
        kernels.pack(weight[:0])
    with pytest.raises(ValueError, match="float16"):
        kernels.pack(weight.half())
    with pytest.raises(ValueError, match=r"bias has shape \(5,\): expected \[6\]"):
        kernels.pack(weight, bias[:5])


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES)
def test_without_the_kernel_it_is_aten(
    x_dtype: torch.dtype, w_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    x, weight, bias = operands(7, 50, 33, (x_dtype, w_dtype), seed)
    early = kernels.pack(weight, bias)
    monkeypatch.setenv("FEWSTEP_KERNELS", "off")
    default_kernel.cache_clear()
    try:
        assert not kernels.available()
        late = kernels.pack(weight, bias)
        assert late.data.data_ptr() == weight.data_ptr() and late.nbytes == weight.nbytes + bias.nbytes
        y = kernels.linear(x, late)
        assert y.dtype == x_dtype and torch.equal(y, kernels.linear(x, early))
        if x_dtype == w_dtype:
            assert torch.equal(y, F.linear(x, weight, bias))
        reference = F.linear(x.double(), weight.double(), bias.double())
        assert torch.allclose(y.double(), reference, rtol=2**-7, atol=2**-6)
    finally:
        default_kernel.cache_clear()
