"""Decode attention against float64, and the law that makes trees and chains agree: a query's result depends on its keys alone."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewstep.nn.kernels import attend
from fewstep.nn.kernels.kernel import default_kernel

DTYPES = (torch.bfloat16, torch.float32)


pytest_plugins = ("kernel_paths",)


@dataclass(frozen=True)
class Scene:
    """Queries [B,H,T,E] over the first S slots of a cache [B,2G,S+5,E], laid out as a decoder has them."""

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor

    @classmethod
    def draw(cls, sizes: tuple[int, int, int, int, int, int], dtype: torch.dtype, seed: int) -> "Scene":
        batch, heads, kv_heads, queries, keys, width = sizes
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(batch, queries, heads, width, generator=generator).to(dtype).transpose(1, 2)
        cache = torch.randn(batch, 2 * kv_heads, keys + 5, width, generator=generator).to(dtype)
        k, v = cache[:, :, :keys].split(kv_heads, 1)
        visible = torch.rand(batch, 1, queries, keys, generator=generator) < 0.7
        visible[..., 0] = True
        return cls(q, k, v, visible)

    def reference(self, visible: Tensor | None) -> Tensor:
        q, k, v = self.q.double(), self.k.double(), self.v.double()
        y = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    def error_bound(self, y: Tensor) -> Tensor:
        """What float32 rounding may do to scores (an exponent's absolute error is a weight's relative one), weights and sums."""
        unit, (keys, width) = 2.0**-24, self.k.shape[2:]
        k = self.k.double().abs().repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)
        score = (self.q.double().abs() @ k.mT).max() * width**-0.5
        weight = 2 * (2 * width + 4) * unit * score + 4 * unit
        last = 2.0**-8 if y.dtype == torch.bfloat16 else unit
        return 2 * (weight + 2 * (2 * keys + 4) * unit) * self.v.double().abs().max() + 1.01 * last * y.double().abs()


SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 6, 2, 5, 37, 10),
    (1, 6, 2, 1, 100, 64),
    (3, 4, 4, 9, 70, 32),
    (1, 8, 1, 8, 33, 96),
    (2, 4, 2, 32, 17, 8),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_float64_up_to_rounding(
    kernel_path: str, sizes: tuple[int, int, int, int, int, int], dtype: torch.dtype, seed: int
) -> None:
    scene = Scene.draw(sizes, dtype, seed)
    for visible in (None, scene.visible):
        y = attend(scene.q, scene.k, scene.v, visible)
        assert y.dtype == dtype and y.is_contiguous()
        assert bool(((y.double() - scene.reference(visible)).abs() <= scene.error_bound(y)).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2, 6, 2, 11, 90, 32), (3, 4, 4, 3, 50, 40), (1, 8, 4, 32, 65, 64)])
def test_a_query_depends_on_the_keys_it_sees_alone(
    kernel_path: str, threads_restored: None, sizes: tuple[int, int, int, int, int, int], dtype: torch.dtype, seed: int
) -> None:
    scene = Scene.draw(sizes, dtype, seed)
    for count in (1, 2):  # sizes exceed the work that a second thread waits for
        torch.set_num_threads(count)
        y = attend(scene.q, scene.k, scene.v, scene.visible)
        for b in range(sizes[0]):
            for t in range(sizes[3]):
                seen = scene.visible[b, 0, t]
                row = slice(b, b + 1)
                alone = attend(scene.q[row, :, t : t + 1], scene.k[row][:, :, seen], scene.v[row][:, :, seen])
                assert torch.equal(alone[0, 0], y[b, t]), (count, b, t)


def test_one_mask_serves_all_rows(kernel_path: str, seed: int) -> None:
    scene = Scene.draw((3, 4, 2, 5, 20, 16), torch.float32, seed)
    shared = scene.visible[:1]
    expanded = attend(scene.q, scene.k, scene.v, shared.expand(3, -1, -1, -1).contiguous())
    assert torch.equal(attend(scene.q, scene.k, scene.v, shared), expanded)
    assert torch.equal(attend(scene.q, scene.k, scene.v, shared.expand(3, -1, -1, -1)), expanded)
    assert not torch.equal(attend(scene.q, scene.k, scene.v, scene.visible), expanded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_nothing_gives_zeros_and_nan_stays_in_its_query(
    kernel_path: str, dtype: torch.dtype, seed: int
) -> None:
    scene = Scene.draw((2, 4, 2, 6, 30, 16), dtype, seed)
    clean = attend(scene.q, scene.k, scene.v, scene.visible)
    scene.visible[1, 0, 2] = False
    scene.q[0, :, 4] = torch.nan
    y = attend(scene.q, scene.k, scene.v, scene.visible)
    assert not y[1, 2].any() and bool(y[0, 4].isnan().all())
    clean[1, 2], clean[0, 4], y[0, 4] = 0.0, 0.0, 0.0
    assert torch.equal(y, clean)


def test_scale_and_empty_calls(kernel_path: str, seed: int) -> None:
    scene = Scene.draw((2, 4, 2, 3, 20, 16), torch.float32, seed)
    halved = attend(scene.q * 0.5, scene.k, scene.v, scale=0.25)  # powers of two: exact
    assert torch.equal(halved, attend(scene.q, scene.k, scene.v, scale=0.125))
    assert attend(scene.q[:0], scene.k[:0], scene.v[:0]).shape == (0, 3, 64)
    assert attend(scene.q[:, :, :0], scene.k, scene.v).shape == (2, 0, 64)
    assert not attend(scene.q, scene.k[:, :, :0], scene.v[:, :, :0]).any()


@pytest.mark.claims
def test_torch_compile_keeps_the_operator_whole(kernel_path: str, seed: int) -> None:
    scene = Scene.draw((2, 4, 2, 3, 20, 16), torch.bfloat16, seed)
    arguments = (scene.q, scene.k, scene.v, scene.visible)
    with torch.no_grad():
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*arguments), attend(*arguments))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fewstep.decode_attention.default, (*arguments, 0.25), test_utils=tests)


def test_refusals_name_the_value_and_the_remedy(seed: int) -> None:
    scene = Scene.draw((2, 4, 2, 3, 20, 16), torch.float32, seed)
    q, k, v, visible = scene.q, scene.k, scene.v, scene.visible
    with pytest.raises(ValueError, match=r"shapes \(2, 3, 3, 16\), \(2, 2, 20, 16\)"):
        attend(q[:, :3], k, v)
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 19\): expected"):
        attend(q, k, v, visible[..., 1:])
    with pytest.raises(ValueError, match="shapes"):
        attend(q, k, v[..., 1:])
    with pytest.raises(ValueError, match=r"k is torch.bfloat16 on cpu"):
        attend(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match=r"q is torch.float64 on cpu"):
        attend(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match="v has strides"):
        attend(q, k, v.mT.contiguous().mT)
    with pytest.raises(ValueError, match=r"visible is torch.float32"):
        attend(q, k, v, visible.float())
    with pytest.raises(ValueError, match="no_grad"):
        attend(q.requires_grad_(), k, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_kernel_it_is_aten(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setenv("FEWSTEP_KERNELS", "off")
    default_kernel.cache_clear()
    try:
        scene = Scene.draw((2, 4, 2, 3, 20, 16), dtype, seed)
        y = attend(scene.q, scene.k, scene.v, scene.visible)
        tolerance = 2**-6 if dtype == torch.bfloat16 else 2**-18
        assert torch.allclose(y.double(), scene.reference(scene.visible), rtol=tolerance, atol=tolerance)
        scene.visible[1, 0, 2] = False
        blind = attend(scene.q, scene.k, scene.v, scene.visible)
        assert not blind[1, 2].any() and torch.equal(blind[0], y[0])
    finally:
        default_kernel.cache_clear()
