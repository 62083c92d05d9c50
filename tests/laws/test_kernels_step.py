"""A stack's step as one call: what the modules compute, to rounding; rows that depend on no other; nodes kept in place."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewstep.core.mixer import Blocks, Causal, Context, Window
from fewstep.core.recipe import parse
from fewstep.models.decoder import DecoderConfig
from fewstep.nn import kernels
from fewstep.nn.kernels import Caches, Gain, Parts, Scene, Steps
from fewstep.nn.mixers.scores import cached_visible
from fewstep.nn.position import Rope
from fewstep.nn.slots import Slots

pytest_plugins = ("kernel_paths",)
needs_kernel = pytest.mark.skipif(not kernels.available(), reason="no C compiler here")

DTYPES = (torch.bfloat16, torch.float32)
CAPACITY = 90
SHAPES: Mapping[str, Mapping[str, Any]] = {  # sizes that do and do not fill vector registers
    "grouped": {
        "depth": 2,
        "width": 36,
        "query_heads": 4,
        "hidden": 44,
        "mixers": [{"kind": "attention", "kv_heads": 2, "head_width": 18}],
    },
    "wide": {  # enough work for threads even on one row, each of which norms it for itself
        "depth": 2,
        "width": 160,
        "query_heads": 3,
        "hidden": 416,
        "mixers": [{"kind": "attention", "kv_heads": 1, "head_width": 64}],
    },
    "one-key-head": {
        "depth": 1,
        "width": 64,
        "query_heads": 3,
        "hidden": 64,
        "mixers": [{"kind": "attention", "kv_heads": 1, "head_width": 32}],
    },
    "normed": {
        "depth": 3,
        "width": 30,
        "query_heads": 3,
        "hidden": 33,
        "mixers": [{"kind": "attention", "qk_norm": True, "bias": True, "out_bias": True, "window": 5}, {"kind": "attention"}],
        "mlp_bias": True,
    },
    "gelu": {
        "depth": 2,
        "width": 20,
        "query_heads": 4,
        "hidden": 50,
        "activation": "gelu",
        "mlp_bias": True,
        "position": {"kind": "none"},
    },
}
LENGTHS = torch.tensor([7, 3, 1])
PROMPT = torch.where(torch.arange(7) < LENGTHS[:, None], torch.arange(-1, 6), -2)
TREE = torch.tensor([[-1, 0, 0, 1, -2, 2], [-1, -1, 1, -2, 1, 0], [-1, 0, 1, 2, 3, 4]])
NONE = torch.zeros(3, dtype=torch.int64)


class Stack:
    """Random blocks, none of whose biases and gains is neutral: as modules, and as the kernel's steps.

    Queries and keys are of unit size, so that scores are: a sharper softmax would magnify the rounding of a score.
    """

    def __init__(self, shape: str, dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        self.dtype, self.width = dtype, SHAPES[shape]["width"]
        network = parse(DecoderConfig, {"vocab": 11, "init_std": self.width**-0.5, **SHAPES[shape]}).build()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.blocks: Any = network.to(dtype).eval().requires_grad_(False).blocks
        self.steps = Steps([parts(block) for block in self.blocks])
        self.rope: Any = self.blocks[0].mixer.position

    def caches(self, batch: int, capacity: int = CAPACITY, fill: float = 0.0) -> Caches:
        sides = [(2 * block.mixer.kv_heads, block.mixer.head_width) for block in self.blocks]
        return Caches([torch.full((batch, side, capacity, width), fill, dtype=self.dtype) for side, width in sides])

    @property
    def turn(self) -> tuple[Tensor, Tensor] | None:
        if not isinstance(self.rope, Rope):
            return None
        cos, sin = self.rope.table(torch.arange(CAPACITY)[None], self.dtype)
        return cos[0, 0].contiguous(), sin[0, 0].contiguous()

    def scene(self, lengths: Tensor, base: int, pending: int, count: int, parent: Tensor | None = None, **more: Any) -> Scene:
        given = (more.get("positions"), self.turn, more.get("mask", Causal()))
        return Scene(count, base, pending, lengths, parent, *given)

    def by_modules(self, x: Tensor, caches: list[Tensor], slots: Slots, ctx: Context) -> Tensor:
        """In float32, whatever the weights: the truth to which bfloat16 rounds."""
        for block, cache in zip(copy.deepcopy(self.blocks).float(), caches, strict=True):
            mixer, (batch, count, _) = block.mixer, x.shape
            heads = mixer.qkv(block.mixer_norm(x)).view(batch, count, -1, mixer.head_width).transpose(1, 2)
            q, k, v = heads.split([mixer.heads, mixer.kv_heads, mixer.kv_heads], 1)
            if mixer.q_norm is not None:
                q, k = mixer.q_norm(q), mixer.k_norm(k)
            q, k = mixer.position.rotate(q, k, ctx.positions, ctx.positions, {})
            cache[:, :, slots.end - count : slots.end] = torch.cat([k, v], 1)
            k, v = cache[:, :, : slots.end].split(mixer.kv_heads, 1)
            mask = cached_visible(replace(ctx, shared={}), slots, count, mixer._window(ctx))
            y = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=mixer.heads != mixer.kv_heads)
            x = x + mixer.out(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_norm(x))
        return x


def parts(block: Any) -> Parts:
    mixer, mlp = block.mixer, block.mlp
    layers = (kernels.pack(layer.weight, layer.bias) for layer in (mixer.qkv, mixer.out, mlp.up, mlp.down))
    norms = (block.mixer_norm, block.mlp_norm, mixer.q_norm, mixer.k_norm)
    gains: Any = (None if norm is None else Gain(norm.weight.float(), norm.eps) for norm in norms)
    return Parts(*layers, *gains, mixer.heads, mixer.kv_heads, mlp.gated, mixer.config.window)


def calls() -> Iterator[tuple[Tensor, int, int, int, Tensor | None, dict[str, Any]]]:
    """lengths, base, pending, count, parent, more: prompts, trees, chains, over several calls, with windows and positions."""
    yield NONE, 0, 7, 7, PROMPT, {}
    yield LENGTHS, 7, 6, 6, TREE, {}
    yield LENGTHS, 7, 6, 6, TREE, {"mask": Window(4)}
    yield LENGTHS, 7, 6, 1, TREE, {"mask": Window(2)}  # the last node, after earlier ones
    yield LENGTHS, 7, 8, 2, torch.cat([TREE, torch.tensor([[1, 6], [-1, 4], [-2, 5]])], 1), {}
    yield LENGTHS, 7, 6, 6, TREE[1:2], {"positions": torch.arange(20, 26)[None]}
    yield LENGTHS, 7, 6, 6, TREE, {"positions": torch.arange(3, 21).view(3, 6)}
    yield LENGTHS, 9, 2, 2, None, {}  # slots 7 and 8 are skipped
    yield LENGTHS, 9, 5, 3, None, {}
    yield LENGTHS, 9, 5, 3, None, {"mask": Window(3)}
    yield LENGTHS, 9, 1, 1, None, {}
    yield LENGTHS, 9, 6, 6, TREE, {"mask": Blocks(2)}
    yield LENGTHS, 9, 5, 5, None, {"mask": Blocks(3)}
    yield LENGTHS, 9, 5, 3, None, {"mask": Blocks(3)}  # after earlier ones


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@torch.inference_mode()
def test_one_call_is_what_the_modules_compute(kernel_path: str, shape: str, dtype: torch.dtype, seed: int) -> None:
    stack = Stack(shape, dtype, seed)
    ours = stack.caches(3)
    limit = len(stack.steps) * (2.0**-6 if dtype == torch.bfloat16 else 1e-5)
    for lengths, base, pending, count, parent, more in calls():
        x = torch.randn(3, count, stack.width).to(dtype)
        caches = [cache.float() for cache in ours.tensors]
        tree = None if parent is None else parent.expand(3, -1)
        slots = Slots(lengths, CAPACITY, base, uniform=False, pending=pending, parent=tree)
        positions = more.get("positions", slots.index[:, pending - count :]).expand(3, -1)
        expected = stack.by_modules(x.float(), caches, slots, Context(positions, mask=more.get("mask", Causal())))
        y = stack.steps(x, ours, stack.scene(lengths, base, pending, count, parent, **more))
        assert y.dtype == dtype and bool(y.any())
        for a, b in zip([y, *ours.tensors], [expected, *caches], strict=True):
            assert (a.double() - b.double()).norm() < limit * b.double().norm()
            assert (a - b).abs().max() <= 4 * limit * b.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@torch.inference_mode()
def test_a_token_has_the_same_bits_in_any_company(
    kernel_path: str, threads_restored: None, shape: str, dtype: torch.dtype, seed: int
) -> None:
    stack = Stack(shape, dtype, seed)
    prompt, tree = torch.randn(3, 60, stack.width).to(dtype), torch.randn(3, 6, stack.width).to(dtype)
    lengths = torch.tensor([60, 60, 60])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        caches = stack.caches(3, fill=float("nan"))  # what nobody sees is not read
        y = stack.steps(prompt, caches, stack.scene(NONE, 0, 60, 60))
        z = stack.steps(tree, caches, stack.scene(lengths, 64, 6, 6, TREE))  # slots 60 .. 63 are hidden
        if threads == 1:
            first = y, z, caches
        for a, b in zip((y, z, *caches.tensors), (*first[:2], *first[2].tensors), strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), threads
    for b in range(3):
        alone = stack.caches(1, 71, fill=float("inf"))
        for t in range(60):
            start = stack.scene(torch.tensor([t]), t, 1, 1)
            assert torch.equal(stack.steps(prompt[b : b + 1, t : t + 1], alone, start)[0, 0], y[b, t])
        for node in range(6):
            path = [node]
            while path[0] > -1:
                path.insert(0, int(TREE[b, path[0]]))
            if path[0] == -2:
                continue
            for depth, n in enumerate(path[1:]):
                last = stack.steps(tree[b : b + 1, n : n + 1], alone, stack.scene(torch.tensor([60]), 60, depth + 1, 1))
            assert torch.equal(last[0, 0], z[b, node]), node


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@torch.inference_mode()
def test_a_block_has_the_same_bits_in_any_company(kernel_path: str, dtype: torch.dtype, seed: int) -> None:
    stack = Stack("grouped", dtype, seed)
    x, size = torch.randn(3, 12, stack.width).to(dtype), 4
    lengths, caches = torch.tensor([0, 4, 8]), stack.caches(3, fill=float("nan"))
    written = torch.randn(3, 4, 8, 18).to(dtype)
    for cache in caches.tensors:
        cache[:, :, :8] = written
    spans = torch.tensor([12, 8, 7])  # whole blocks, the last one not
    chain = torch.where(torch.arange(12) < spans[:, None], torch.arange(-1, 11), -2)
    y = stack.steps(x, caches, stack.scene(lengths, 8, 12, 12, chain, mask=Blocks(size)))
    for b, (length, span) in enumerate(zip(lengths.tolist(), spans.tolist(), strict=True)):
        alone = stack.caches(1, 25, fill=float("inf"))
        for cache in alone.tensors:
            cache[0, :, :length] = written[b, :, :length]
        for first in range(0, span, size):
            last, begun = min(first + size, span), length + first
            scene = stack.scene(torch.tensor([begun]), begun, last - first, last - first, mask=Blocks(size))
            assert torch.equal(stack.steps(x[b : b + 1, first:last], alone, scene)[0], y[b, first:last])


@needs_kernel
@torch.inference_mode()
def test_a_stack_runs_in_parts(seed: int) -> None:
    stack, x = Stack("normed", torch.bfloat16, seed), torch.randn(3, 7, 30).bfloat16()
    scene, whole, halves = stack.scene(NONE, 0, 7, 7, PROMPT), stack.caches(3), stack.caches(3)
    y = stack.steps(x, whole, scene)
    assert torch.equal(stack.steps(stack.steps(x, halves, scene, 0, 2), halves, scene, 2), y)
    assert all(torch.equal(*pair) for pair in zip(whole.tensors, halves.tensors, strict=True))
    transposed = x.mT.contiguous().mT
    assert torch.equal(stack.steps(transposed, halves, scene), y)


@needs_kernel
@torch.inference_mode()
def test_a_copy_owns_its_weights(seed: int) -> None:
    stack, x = Stack("normed", torch.bfloat16, seed), torch.randn(3, 7, 30).bfloat16()
    scene = stack.scene(NONE, 0, 7, 7, PROMPT)
    expected = stack.steps(x, stack.caches(3), scene)
    twin = copy.deepcopy(stack.steps)
    stack.steps.parts[1].up.data.zero_()
    assert torch.equal(twin(x, stack.caches(3), scene), expected)
    assert not torch.equal(stack.steps(x, stack.caches(3), scene), expected)


@needs_kernel
@torch.inference_mode()
def test_a_forked_child_computes_alone(threads_restored: None, holds_in_a_fork: Any, seed: int) -> None:
    stack, x = Stack("grouped", torch.float32, seed), torch.randn(3, 60, 36)
    torch.set_num_threads(2)
    scene, caches = stack.scene(NONE, 0, 60, 60), stack.caches(3)
    expected = stack.steps(x, caches, scene)  # the parent's threads exist from here on
    assert holds_in_a_fork(lambda: torch.equal(stack.steps(x, caches, scene), expected))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
def test_kept_nodes_move_to_each_rows_end(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = [torch.randn(3, 2 * heads, 20, width).to(dtype) for heads, width in ((1, 8), (3, 5))]
    slots = Slots(LENGTHS, 20, 7, uniform=False, pending=6, parent=TREE)
    for path, count in (([[0, 2, 5], [1, 4, 5], [0, 1, 2]], [3, 2, 1]), ([[1, 4], [0, 3], [2, 5]], [2, 0, 1])):
        path, count = torch.tensor(path), torch.tensor(count)
        caches = Caches([cache.clone() for cache in tensors])
        caches.keep(7, LENGTHS, path, count)
        after, moves = slots.commit(path, count), slots.moves(path, count)
        assert moves is not None
        for ours, before in zip(caches.tensors, tensors, strict=True):
            theirs = moves.apply(before.clone())
            for b in range(3):
                assert torch.equal(ours[b, :, : after.lengths[b]], theirs[b, :, : after.lengths[b]])
                assert torch.equal(ours[b, :, after.lengths[b] :], before[b, :, after.lengths[b] :])


@needs_kernel
def test_keep_refuses_what_is_out_of_range(seed: int) -> None:
    torch.manual_seed(seed)
    caches = Caches([torch.randn(1, 2, 9, 4)])
    before = caches.tensors[0].clone()

    def keep(lengths: int, path: list[int], count: int, base: int = 5) -> None:
        caches.keep(base, torch.tensor([lengths]), torch.tensor([path]), torch.tensor([count]))

    refused: list[tuple[str, tuple[Any, ...]]] = [
        (r"lengths=\[6\]: must lie in 0 .. base=5", (6, [0], 1)),
        (r"lengths=\[-1\]: must", (-1, [0], 1)),
        (r"path=\[\[0, 4\]\]: must increase within 0 .. 3 ", (2, [0, 4], 2)),
        (r"path=\[\[2, 1\]\]: must increase", (2, [2, 1], 2)),
        (r"path=\[\[-1\]\]: must increase", (2, [-1], 1)),
        (r"count=\[3\]: must lie in 0 .. 2", (2, [0, 1], 3)),
        (r"base=10: must lie in 0 .. capacity=9", (2, [0], 1, 10)),
    ]
    for message, arguments in refused:
        with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
            keep(*arguments)
    with pytest.raises(ValueError, match=r"path and count have shapes \(1,\), \(2, 1\), \(1,\): expected int64 \[1\], \[1,K\]"):
        caches.keep(5, torch.tensor([2]), torch.tensor([[0], [1]]), torch.tensor([1]))
    assert torch.equal(caches.tensors[0], before)
    keep(2, [0, 9], 1)  # what is not kept may be anything
    assert torch.equal(caches.tensors[0][:, :, 2], before[:, :, 5])


@needs_kernel
def test_a_step_refuses_what_does_not_fit(seed: int) -> None:
    stack = Stack("one-key-head", torch.float32, seed)
    x, caches, scene = torch.randn(2, 3, 64), stack.caches(2, 8), stack.scene(LENGTHS[:2], 7, 1, 1)
    before = caches.tensors[0].clone()
    two = torch.tensor([1, 1])
    refused: list[tuple[str, Any]] = [
        (r"x is \(2, 3, 64\) torch.float32 on cpu: expected \[2,1,64\]", lambda: stack.steps(x, caches, scene)),
        (r"caches have batch 2, capacity 8", lambda: stack.steps(x, caches, stack.scene(two, 6, 3, 3))),
        (r"caches have batch 3", lambda: stack.steps(x, stack.caches(3), stack.scene(two, 1, 3, 3))),
        (r"x is [^\n]*torch.bfloat16", lambda: stack.steps(x.bfloat16(), caches, stack.scene(two, 1, 3, 3))),
        (r"first=1, last=1: expected 0 <= first < last <= 1", lambda: stack.steps(x, caches, scene, 1)),
        (r"lengths=\[1, 1\]: must lie in 0 .. base=0", lambda: stack.steps(x, caches, stack.scene(two, 0, 3, 3))),
        (r"parent=[^\n]*: must be at least -2", lambda: stack.steps(x, caches, stack.scene(two, 1, 3, 3, TREE[:2, :3] + 3))),
        (r"parent=[^\n]*: must be at least -2", lambda: stack.steps(x, caches, stack.scene(two, 1, 3, 3, TREE[:2, :3] - 2))),
        (
            r"positions=\[\[0, 1, 90\]\]: must lie in 0 .. 89",
            lambda: stack.steps(x, caches, stack.scene(two, 1, 3, 3, positions=torch.tensor([[0, 1, 90]]))),
        ),
        (r"x requires a gradient", lambda: stack.steps(x.clone().requires_grad_(), caches, stack.scene(two, 1, 3, 3))),
        (r"parent is \(2, 4\) torch.int64 on cpu: expected int64 \[2 or 1,3\]", lambda: stack.scene(two, 1, 3, 3, TREE[:2, :4])),
        (r"positions is \(3, 3\)", lambda: stack.scene(two, 1, 3, 3, positions=torch.ones(3, 3, dtype=torch.int64))),
        (r"lengths is \(2,\) torch.int32", lambda: stack.scene(two.int(), 1, 3, 3)),
        (r"count=4, pending=3, base=1: expected 0 <= count <= pending", lambda: stack.scene(two, 1, 3, 4)),
        (r"mask=Window\(size=0\): the size must be at least 1", lambda: stack.scene(two, 1, 3, 3, mask=Window(0))),
        (r"turn is \(9, 7\)", lambda: Scene(3, 1, 3, two, None, None, (torch.ones(9, 7), torch.ones(9, 7)))),
        (
            r"turn has width and dtype \(16, torch.float32\): expected \[32\]",
            lambda: stack.steps(x, caches, Scene(3, 1, 3, two, None, None, (torch.ones(9, 16), torch.ones(9, 16)))),
        ),
        (r"a cache is \(2, 2, 9, 32\) torch.float32", lambda: Caches([caches.tensors[0], torch.zeros(2, 2, 9, 32)])),
        (r"a cache is [^\n]*torch.float64", lambda: Caches([torch.zeros(2, 2, 9, 32).double()])),
        (r"parts is empty", lambda: Steps([])),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
            call()
    assert torch.equal(caches.tensors[0], before)
    assert stack.steps(x, caches, stack.scene(two, 1, 3, 3)).shape == (2, 3, 64)
    assert stack.steps(x[:, :0], caches, stack.scene(two, 1, 3, 0)).shape == (2, 0, 64)
