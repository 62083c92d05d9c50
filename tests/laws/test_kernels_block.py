"""A block's step as one call: what the modules compute, to rounding; rows that depend on no other; weights that save."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.core.mixer import Context
from fewstep.core.recipe import parse
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.nn import kernels
from fewstep.nn.blocks import Block
from fewstep.nn.kernels.kernel import default_kernel
from fewstep.nn.mixers.attention import FEW
from fewstep.nn.packed import PackedNorm, pack

pytest_plugins = ("kernel_paths",)

DTYPES = (torch.bfloat16, torch.float32)
CAPACITY = 60
SHAPES: Mapping[str, Mapping[str, Any]] = {  # sizes that do and do not fill vector registers
    "grouped": {"width": 36, "query_heads": 4, "hidden": 44, "mixers": [{"kind": "attention", "kv_heads": 2, "head_width": 18}]},
    "one-key-head": {"width": 64, "query_heads": 2, "hidden": 64, "mixers": [{"kind": "attention", "kv_heads": 1}]},
    "normed": {
        "width": 30,
        "query_heads": 3,
        "hidden": 33,
        "mixers": [{"kind": "attention", "qk_norm": True, "bias": True, "out_bias": True, "window": 5}],
        "mlp_bias": True,
    },
    "gelu": {"width": 20, "query_heads": 4, "hidden": 50, "activation": "gelu", "mlp_bias": True, "position": {"kind": "none"}},
}
BRANCHES = torch.tensor([[-1, 0, 0, 1, -2, 2], [-1, -1, 1, -2, 1, 0], [-1, 0, 1, 2, 3, 4]])


def decoder(shape: str, dtype: torch.dtype, seed: int) -> Decoder:
    """Two random blocks, none of whose biases and gains is neutral."""
    torch.manual_seed(seed)
    network = parse(DecoderConfig, {"vocab": 11, "depth": 2, "init_std": 0.2, **SHAPES[shape]}).build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.to(dtype).eval().requires_grad_(False)


def by_modules(block: Block) -> Block:
    """The same packed weights without the one call."""
    twin = copy.deepcopy(block)
    twin.packed = None
    return twin


class Walk:
    """One block, or its twin, through the calls of a decoding loop."""

    def __init__(self, block: Block, batch: int, dtype: torch.dtype) -> None:
        self.block, self.outputs = block, list[Tensor]()
        self.state: Any = block.init_state(batch, CAPACITY, device="cpu", dtype=dtype)

    def feed(self, x: Tensor, parent: Tensor | None) -> Tensor:
        slots = self.state.slots.extend(parent, x.shape[1])
        y, self.state = self.block.extend(x, Context(slots.index[:, -x.shape[1] :], parent=parent), self.state)
        self.outputs.append(y if parent is None else y[parent > -2])  # what padding gives is nobody's business
        return y

    def commit(self, path: Tensor, keep: Tensor) -> None:
        self.state = self.state.commit(path, keep)


def walked(block: Block, x: Mapping[str, Tensor]) -> Walk:
    """A ragged prompt, a tree of which each row keeps another part, a rejected one, a chain over two calls."""
    walk = Walk(block, 3, x["prompt"].dtype)
    lengths = torch.tensor([7, 3, 1])
    order = torch.arange(7)
    walk.feed(x["prompt"], torch.where(order < lengths[:, None], order - 1, -2))
    walk.commit(order.expand(3, -1), lengths)
    walk.feed(x["tree"], BRANCHES)
    walk.commit(torch.tensor([[0, 2, 5], [1, 4, 0], [0, 1, 2]]), torch.tensor([3, 2, 1]))
    walk.feed(x["tree"].flip(1).contiguous(), BRANCHES)
    walk.state = walk.state.rollback()
    walk.feed(x["chain"][:, :2], None)  # a slice: not contiguous
    walk.feed(x["chain"][:, 2:], None)
    return walk


def inputs(width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.randn(3, count, width).to(dtype) for name, count in (("prompt", 7), ("tree", 6), ("chain", 5))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@torch.inference_mode()
def test_one_call_is_what_the_modules_compute(kernel_path: str, shape: str, dtype: torch.dtype, seed: int) -> None:
    block: Any = pack(decoder(shape, dtype, seed)).blocks[0]  # type: ignore[union-attr, index]
    assert block.packed is not None
    x = inputs(SHAPES[shape]["width"], dtype)
    ours, theirs = walked(block, x), walked(by_modules(block), x)
    limit = 2.0**-6 if dtype == torch.bfloat16 else 1e-5
    for y, expected in zip([*ours.outputs, ours.state.cache], [*theirs.outputs, theirs.state.cache], strict=True):
        assert y.dtype == dtype and bool(y.any())
        difference = (y - expected).double().norm() / expected.double().norm()
        assert difference < limit
        assert (y - expected).abs().max() <= 4 * limit * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@torch.inference_mode()
def test_a_token_has_the_same_bits_in_any_company(
    kernel_path: str, threads_restored: None, shape: str, dtype: torch.dtype, seed: int
) -> None:
    block: Any = pack(decoder(shape, dtype, seed)).blocks[0]  # type: ignore[union-attr, index]
    x = inputs(SHAPES[shape]["width"], dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        together = Walk(block, 3, dtype)
        prompt, tree = together.feed(x["prompt"], None), together.feed(x["tree"], BRANCHES + 7 * (BRANCHES > -2))
        torch.set_num_threads(1)
        for b in range(3):
            for node in range(6):
                path = [node]
                while path[0] > -1:
                    path.insert(0, int(BRANCHES[b, path[0]]))
                if path[0] == -2:
                    continue
                alone = Walk(block, 1, dtype)
                for t in range(7):
                    assert torch.equal(alone.feed(x["prompt"][b : b + 1, t : t + 1], None)[0, 0], prompt[b, t])
                last = [alone.feed(x["tree"][b : b + 1, n : n + 1], None) for n in path[1:]][-1]
                assert torch.equal(last[0, 0], tree[b, node]), (threads, b, node)


@pytest.mark.skipif(not kernels.available(), reason="no C compiler here")
@torch.inference_mode()
def test_rows_over_the_threshold_share_threads_and_keep_their_bits(threads_restored: None, seed: int) -> None:
    block: Any = pack(decoder("one-key-head", torch.bfloat16, seed)).blocks[0]  # type: ignore[union-attr, index]
    x = torch.randn(4, 48, 64).bfloat16()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(Walk(block, 4, torch.bfloat16).feed(x, None))
    assert torch.equal(*found)
    assert torch.equal(Walk(block, 1, torch.bfloat16).feed(x[2:3], None)[0], found[0][2])


@pytest.mark.skipif(not kernels.available(), reason="no C compiler here")
@torch.inference_mode()
def test_over_capacity_is_refused_before_any_write(seed: int) -> None:
    block: Any = pack(decoder("grouped", torch.float32, seed)).blocks[0]  # type: ignore[union-attr, index]
    walk, x = Walk(block, 2, torch.float32), torch.randn(2, FEW, 36)
    walk.feed(x[:, : CAPACITY - 4], None)
    before = walk.state.cache.clone()
    with pytest.raises(ValueError, match=rf"^capacity={CAPACITY}: [^\n]*$"):
        block.extend(x[:, :5], Context(torch.arange(5).expand(2, -1)), walk.state)
    assert torch.equal(walk.state.cache, before)
    walk.feed(x[:, :4], None)
    assert walk.state.slots.end == CAPACITY and bool(walk.state.cache[:, :, -1].any())


@pytest.mark.skipif(not kernels.available(), reason="no C compiler here")
def test_the_modules_take_what_the_call_does_not(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    network = pack(decoder("normed", torch.float32, seed))
    block: Any = network.blocks[0]  # type: ignore[union-attr, index]
    calls = list[int]()
    step = block.packed.forward
    monkeypatch.setattr(block.packed, "forward", lambda x, *rest: calls.append(x.shape[1]) or step(x, *rest))
    positions = torch.arange(FEW + 1)[None]
    with torch.inference_mode():
        for count in (FEW, FEW + 1):
            state = block.init_state(1, FEW + 1, device="cpu", dtype=torch.float32)
            block.extend(torch.randn(1, count, 30), Context(positions[:, :count]), state)
    block.extend(torch.randn(1, 2, 30), Context(positions[:, :2]), block.init_state(1, 2, device="cpu", dtype=torch.float32))
    assert calls == [FEW]  # neither too many tokens nor recorded gradients
    for other in ({"norm": "layer"}, {"tied": False}):
        plain = parse(DecoderConfig, {"vocab": 11, "depth": 1, "width": 16, "hidden": 24, **other}).build()
        packed: Any = pack(plain.double() if "tied" in other else plain)
        assert packed.blocks[0].packed is None


@pytest.mark.skipif(not kernels.available(), reason="no C compiler here")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
def test_packed_weights_save_bit_for_bit(shape: str, dtype: torch.dtype, seed: int) -> None:
    network = decoder(shape, dtype, seed)
    before = {name: weight.clone() for name, weight in network.state_dict().items() if name != "head.weight"}  # it is tied
    after = pack(network).state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype and torch.equal(after[name], weight), name


@pytest.mark.skipif(not kernels.available(), reason="no C compiler here")
@torch.inference_mode()
def test_a_copy_owns_its_weights(seed: int) -> None:
    block: Any = pack(decoder("normed", torch.bfloat16, seed)).blocks[0]  # type: ignore[union-attr, index]
    x = inputs(30, torch.bfloat16)
    expected = walked(block, x).outputs
    twin = copy.deepcopy(block)
    block.mixer.qkv.packed.data.zero_()
    block.mlp_norm.gain.weight.zero_()
    assert all(torch.equal(*pair) for pair in zip(walked(twin, x).outputs, expected, strict=True))
    assert not torch.equal(walked(block, x).outputs[0], expected[0])


@pytest.mark.parametrize("width", [1, 5, 16, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
def test_rms_norm(kernel_path: str, dtype: torch.dtype, width: int, seed: int) -> None:
    x, weight = (3 * torch.randn(4, 7, width)).to(dtype), torch.randn(width)
    y = kernels.rms_norm(x, weight, 1e-3)
    expected = F.rms_norm(x.double(), (width,), weight.double(), 1e-3)
    unit = 2.0**-8 if dtype == torch.bfloat16 else (width + 8) * 2.0**-24
    assert y.dtype == dtype and bool(((y.double() - expected).abs() <= 1.01 * unit * expected.abs()).all())
    assert torch.equal(kernels.rms_norm(x[1:2, 3:4], weight, 1e-3)[0, 0], y[1, 3])
    assert torch.equal(kernels.rms_norm(x[:, ::2], weight, 1e-3), y[:, ::2])
    assert kernels.rms_norm(x[:0], weight, 1e-3).shape == (0, 7, width)


def test_norms_refuse_what_they_cannot_do(seed: int) -> None:
    x, weight = torch.randn(2, 6), torch.randn(6)
    with pytest.raises(ValueError, match=r"shapes \(2, 5\) and \(6,\)"):
        kernels.rms_norm(x[:, 1:], weight, 1e-6)
    with pytest.raises(ValueError, match=r"x is torch.float64 on cpu"):
        kernels.rms_norm(x.double(), weight, 1e-6)
    with pytest.raises(ValueError, match="packed=False"):
        PackedNorm(weight, 1e-6)(x.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
def test_without_the_kernel_norms_are_atens(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    x, weight = torch.randn(3, 40).to(dtype), torch.randn(40)
    here = kernels.rms_norm(x, weight, 1e-6)
    monkeypatch.setenv("FEWSTEP_KERNELS", "off")
    default_kernel.cache_clear()
    try:
        torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6), here)
    finally:
        default_kernel.cache_clear()


@pytest.mark.skipif(not kernels.available(), reason="no C compiler here")
def test_a_step_refuses_what_does_not_fit(seed: int) -> None:
    block: Any = pack(decoder("one-key-head", torch.float32, seed)).blocks[0]  # type: ignore[union-attr, index]
    step, x, cache = block.packed._step, torch.randn(2, 3, 64), torch.zeros(2, 2, 9, 32)
    scene = kernels.Scene(2, 3, 8, None, None)
    assert step(x, cache, scene).shape == (2, 3, 64)
    refused = [
        (x[:1], cache, scene),
        (x, cache[:, :, :7].contiguous(), scene),
        (x, cache[:, :1], scene),
        (x.bfloat16(), cache, scene),
    ]
    refused += [(x, cache.double(), scene), (x, cache.mT.contiguous().mT, scene)]
    for arguments in refused:
        with pytest.raises(ValueError, match=r"x and cache are [^\n]*expected \[2,3,64\] and a contiguous \[2,2,8 or more,32\]"):
            step(*arguments)
    table = (torch.ones(2, 1, 3, 16), torch.ones(2, 1, 3, 16))
    with pytest.raises(ValueError, match=r"turn has width and dtype \(16, torch.float32\): expected 32"):
        step(x, cache, kernels.Scene(2, 3, 8, None, table))
    with pytest.raises(ValueError, match=r"visible is \(2, 1, 3, 7\)"):
        kernels.Scene(2, 3, 8, torch.ones(2, 1, 3, 7, dtype=torch.bool), None)
    with pytest.raises(ValueError, match="count=9"):
        kernels.Scene(2, 9, 8, None, None)
    with pytest.raises(ValueError, match="no_grad"):
        step(x.requires_grad_(), cache, scene)
