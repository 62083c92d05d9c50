"""The benchmark beside llama.cpp: the weights it hands over, and the loop that runs there."""

import importlib
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.position import RopeConfig

HEADS, WIDTH, HEAD_WIDTH = 4, 24, 6


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script, imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        return importlib.import_module("llamacpp")


def neighbours_turned(x, position, base):
    """x [T,H,E] with the pairs (0, 1), (2, 3), ... turned, as llama.cpp does for its Llama architecture."""
    angles = position[:, None] / base ** (torch.arange(0, x.shape[-1], 2, dtype=x.dtype) / x.shape[-1])
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def test_scores_are_the_same_when_interleaved_neighbours_are_turned(bench, seed):
    generator = torch.Generator().manual_seed(seed)
    x, q, k = (
        torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) for rows in (7, HEADS * HEAD_WIDTH, HEADS * HEAD_WIDTH)
    )
    rope = RopeConfig(base=100.0).build(head_width=HEAD_WIDTH)
    places = torch.arange(7)
    ours = rope.rotate(
        *((x @ weight.T).view(1, 7, HEADS, HEAD_WIDTH).transpose(1, 2) for weight in (q, k)), places[None], places[None], {}
    )
    theirs = [
        neighbours_turned((x @ bench.interleaved(weight, HEADS).T).view(7, HEADS, HEAD_WIDTH), places.double(), 100.0)
        for weight in (q, k)
    ]
    expected = torch.einsum("hte,hse->hts", *(part[0] for part in ours))
    torch.testing.assert_close(torch.einsum("the,she->hts", *theirs), expected, rtol=1e-10, atol=1e-10)


def test_only_queries_and_keys_are_interleaved_and_heads_stay_here(bench, seed):
    torch.manual_seed(seed)
    mixer = AttentionConfig(kv_heads=2, head_width=HEAD_WIDTH)
    config = DecoderConfig(vocab=11, width=WIDTH, depth=1, query_heads=HEADS, mixers=(mixer,), hidden=16, tied=True)
    model = Model(config.build(), None)
    named = bench.gguf_tensors(model)
    block = model.network.blocks[0]
    q, k, v = block.mixer.qkv.weight.detach().split([HEADS * HEAD_WIDTH, 2 * HEAD_WIDTH, 2 * HEAD_WIDTH])
    pair = named["model.layers.0.self_attn.k_proj.weight"].view(2, HEAD_WIDTH // 2, 2, WIDTH)
    assert torch.equal(pair.transpose(1, 2).reshape(k.shape), k) and not torch.equal(pair.reshape(k.shape), k)
    assert named["model.layers.0.self_attn.q_proj.weight"].shape == q.shape
    assert torch.equal(named["model.layers.0.self_attn.v_proj.weight"], v)
    assert torch.equal(named["model.embed_tokens.weight"], model.network.embedding.weight) and "lm_head.weight" not in named


@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
def test_guesses_change_the_calls_and_not_the_tokens(bench, seed, right):
    draw = np.random.default_rng(seed)
    following = draw.permutation(50)  # the likeliest next token of each
    length = 40

    def lookup(text):
        guess = [int(text[-1])]
        for _ in range(draw.integers(5)):
            guess.append(int(following[min(guess[-1], 49)]) if draw.random() < right else 50)
        return np.array(guess[1:], dtype=np.intc)

    def best(tokens, start):
        assert tokens[0] == plain[start] if plain else len(tokens) == 1
        return following[np.minimum(tokens, 49)]

    plain: list[int] = []
    plain, calls = bench.greedy(best, None, [3, 1], length)
    assert calls == length - 2 == len(plain) - 2 and all(following[a] == b for a, b in pairwise(plain[1:]))
    guessed, fewer = bench.greedy(best, lookup, [3, 1], length)
    assert guessed == plain
    assert fewer == calls if right == 0 else fewer < calls
