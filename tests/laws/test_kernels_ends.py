"""From tokens to scores in one call: bit for bit what its parts give; and heads that read the end of a prompt."""

import copy
from typing import Any

import pytest
import torch

from fewstep.core.mixer import Causal, Context, Tree
from fewstep.core.recipe import parse
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.prefill import prefill, prompt_chain
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.nn import kernels
from fewstep.nn.heads import ParallelHeadsConfig, SequentialHeadsConfig
from fewstep.nn.packed import pack

pytest_plugins = ("kernel_paths",)
VOCAB = 83


def network(seed: int, dtype: torch.dtype, **more: Any) -> Any:
    torch.manual_seed(seed)
    shape = {"vocab": VOCAB, "width": 48, "depth": 2, "query_heads": 3, "hidden": 80}
    made: Decoder = parse(DecoderConfig, {**shape, **more}).build()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return pack(made.to(dtype).eval())


def random_tree(seed: int, batch: int, size: int) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    parent = [torch.randint(-1, max(node, 1), (batch,), generator=draw) for node in range(size)]
    return Tree(torch.randint(VOCAB, (batch, size), generator=draw), torch.stack([parent[0] * 0 - 1, *parent[1:]], 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.inference_mode()
def test_one_call_scores_what_its_parts_score(
    kernel_path: str, threads_restored: None, dtype: torch.dtype, tied: bool, seed: int
) -> None:
    target = network(seed, dtype, tied=tied)
    for batch, size, threads in ((1, 1, 1), (1, 7, 2), (3, 2, 1), (2, 9, 3), (1, 40, 2)):
        torch.set_num_threads(threads)
        nodes = random_tree(seed + size, batch, size)
        states = [target.init_state(batch, 64, device="cpu", dtype=dtype) for _ in range(2)]
        whole = target.extend(nodes, states[0], taps=("hidden", "final", "logits"))
        ctx = Context(None, parent=nodes.parent, mask=Causal())
        x, _, _ = target.blocks.extend(target.embed(nodes.tokens), ctx, states[1], range(2))
        final = target.norm(x)
        expected = {"hidden": x, "final": final, "logits": target.head(final)}
        assert whole.hidden.keys() == expected.keys() and torch.equal(whole.logits, expected["logits"])
        for name, activation in expected.items():
            assert torch.equal(whole.hidden[name], activation), (name, batch, size)
        for mine, theirs in zip(*(state.caches.tensors for state in states), strict=True):
            assert torch.equal(mine[:, :, :size], theirs[:, :, :size])


@pytest.mark.skipif(not kernels.available(), reason="no C compiler here")
@torch.inference_mode()
def test_a_moved_model_has_its_own_ends(seed: int) -> None:
    target, nodes = network(seed, torch.float32), random_tree(seed, 2, 5)
    state = target.init_state(2, 16, device="cpu", dtype=torch.float32)
    before = target.extend(nodes, state).logits
    twin = copy.deepcopy(target)
    target.embedding.weight.data = target.embedding.weight.data.flip(0)
    target.norm.gain.weight.zero_()
    assert torch.equal(twin.extend(nodes, state).logits, before)
    assert not target.extend(nodes, state).logits.any()


@pytest.mark.skipif(not kernels.available(), reason="no C compiler here")
@torch.inference_mode()
def test_an_unknown_token_is_refused_and_nothing_is_written(seed: int) -> None:
    target, state = (
        network(seed, torch.bfloat16),
        network(seed, torch.bfloat16).init_state(1, 8, device="cpu", dtype=torch.bfloat16),
    )
    for token in (VOCAB, -1):
        with pytest.raises(ValueError, match=rf"^tokens=\[\[1, {token}\]\]: one has no embedding[^\n]*$"):
            target.extend(Tree.chain(torch.tensor([[1, token]])), state)
    assert not any(bool(cache.any()) for cache in state.caches.tensors)


@pytest.mark.parametrize("heads", [SequentialHeadsConfig(depth=3), ParallelHeadsConfig(depth=3)], ids=lambda heads: heads.kind)
@torch.inference_mode()
def test_heads_read_the_prompts_last_positions_alone(heads: Any, seed: int) -> None:
    """Drafts after a long prompt are those after its end, where the same activations are given."""
    torch.manual_seed(seed)
    target: Any = parse(
        DecoderConfig, {"vocab": VOCAB, "width": 32, "depth": 2, "query_heads": 2, "hidden": 40, "heads": (heads,)}
    )
    target = target.build().eval().double()
    prompts = [torch.randint(VOCAB, (length,)).tolist() for length in (23, 6, 11)]
    reading, whole = (MultiTokenConfig(reads=reads, mode="chosen").build(target, lambda path: target) for reads in (9, None))
    chain = prompt_chain(prompts, "cpu")
    hidden = prefill(target, chain, target.init_state(3, 64, device="cpu", dtype=torch.float64), whole.taps).hidden
    mine = reading.init(chain, hidden, 64)
    short = prompt_chain([prompt[-9:] for prompt in prompts], "cpu")
    name = whole.taps[0]
    ends = torch.zeros(3, short.size, hidden[name].shape[2], dtype=torch.float64)
    for row, prompt in enumerate(prompts):
        kept = min(9, len(prompt))
        ends[row, :kept] = hidden[name][row, len(prompt) - kept : len(prompt)]
    theirs = whole.init(short, {name: ends}, 64)
    assert mine.count.tolist() == [9, 6, 9] and mine.fresh.shape[1] == 9
    for row, count in enumerate(mine.count.tolist()):
        assert torch.equal(mine.fresh[row, -count:], theirs.fresh[row, -count:])
        assert torch.equal(mine.tokens[row, 9 - count :], theirs.tokens[row, 9 - count :])
