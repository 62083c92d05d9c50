"""Encodings that bias scores where scores are not one matrix: few keys of all, a latent's heads, EAGLE's unrolling."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eagles import eagle_model
from sequences import ENCODINGS, HEADS, TIGHT, WIDTH, Book, Sublayer, shaken

from fewstep.core.mixer import Causal, Context, Full
from fewstep.nn.mixers.mla import MLAConfig
from fewstep.nn.mixers.patterns import BlocksConfig, StridedConfig, WindowConfig
from fewstep.nn.mixers.sparse import SparseConfig
from fewstep.nn.mixers.transnormer import DiagAttentionConfig
from fewstep.nn.position import turn
from fewstep.nn.position.rope import tables

Sees = Callable[[int, int], bool]
SCORED: dict[str, tuple[Any, Sees]] = {  # softmax over few keys, of which every law has several groups, blocks and windows
    "strided": (SparseConfig(pattern=StridedConfig(stride=3)), lambda i, j: abs(i - j) < 3 or (i - j) % 3 == 0),
    "window": (SparseConfig(pattern=WindowConfig(window=3, sinks=1)), lambda i, j: abs(i - j) < 3 or j < 1),
    "blocks": (SparseConfig(pattern=BlocksConfig(block=2, local=1, stride=2)), lambda i, j: (i // 2 - j // 2) % 2 == 0),
    "diagonal": (DiagAttentionConfig(block=3), lambda i, j: i // 3 == j // 3),
}
BIASED = [kind for kind in ENCODINGS if not ENCODINGS[kind].build(head_width=4, heads=HEADS).parts.isdisjoint({"bias", "value"})]


def small(config: Any, encoding: str, dtype: torch.dtype = torch.float64) -> Sublayer:
    position = ENCODINGS[encoding].build(head_width=config.widths(WIDTH, HEADS)[1], width=WIDTH, heads=HEADS)
    mixer = config.build(width=WIDTH, heads=HEADS, position=position)
    return Sublayer(shaken(mixer, dtype), mixer.masks, mixer.modes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [*SCORED, "latent"])
def test_all_forms_agree(name: str, dtype: torch.dtype) -> None:
    config = MLAConfig(latent=3, content_width=6, rotary_width=4, value_width=5) if name == "latent" else SCORED[name][0]
    for encoding in ("alibi", "deberta") if name == "latent" else ("alibi", "deberta", "shaw"):
        subject = small(config, encoding, dtype)
        with torch.inference_mode():
            book = Book.open(subject, 2, 24)
            book.extend(subject.inputs(2, 5), torch.tensor([[-1, 0, 1, 2, 3], [-1, 0, -2, -2, -2]]))
            book.commit([[0, 1, 2, 3, 4], [0, 1]])
            book.extend(subject.inputs(2, 5), torch.tensor([[-1, 0, 0, 2, -1], [-1, -1, 1, 1, -2]]))
            book.commit([[0, 2, 3], [1, 2]])
            book.extend(subject.inputs(2, 4))


@pytest.mark.parametrize("encoding", BIASED)
@pytest.mark.parametrize("name", SCORED)
def test_few_keys_are_scored_as_all_would_be(name: str, encoding: str) -> None:
    """The encoding over the whole matrix, then the mask; from a place on that a text of this length never reaches by itself."""
    (config, sees), count = SCORED[name], 11
    subject = small(config, encoding)
    x, places = subject.inputs(2, count), torch.arange(count).expand(2, -1) + torch.tensor([[0], [4]])
    for mask in (mask for mask in (Causal(), Full()) if type(mask) in subject.masks):
        allowed = torch.tensor([[sees(i, j) and (j <= i or isinstance(mask, Full)) for j in range(count)] for i in range(count)])
        q, k, v = subject.module.qkv(x).unflatten(2, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        position = subject.module.position
        q, k = position.rotate(q, k, places, places, {})
        scores = q @ k.mT * q.shape[-1] ** -0.5 + position.bias(q, k, places, places)
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        y = weights @ v
        added = position.value(weights, places, places)
        wanted = subject.module.out((y if added is None else y + added).transpose(1, 2).flatten(2))
        torch.testing.assert_close(subject.module(x, Context(places, mask=mask))[0], wanted, **TIGHT)


def test_latent_attention_is_biased_at_the_scale_of_its_scores() -> None:
    """ALiBi's slopes are added as they are; dynamic NTK's turned parts take the place of the plain ones."""
    config, count = MLAConfig(latent=3, content_width=6, rotary_width=4, value_width=5), 9
    places = torch.arange(count).unsqueeze(0)
    for encoding in ("alibi", "dynamic_ntk"):
        subject = small(config, encoding)
        mixer, position, x = subject.module, subject.module.position, subject.inputs(1, count)
        q, cache = mixer.project(x, places, Context(places))
        kv = (cache[:, 0, :, :3] @ mixer.kv_up.mT).unflatten(2, (HEADS, -1)).transpose(1, 2)
        k_turn = cache[..., 3:].expand(-1, HEADS, -1, -1)
        if encoding == "alibi":
            scores = (q @ torch.cat([kv[..., :6], k_turn], -1).mT) / 10**0.5 + position.bias(q, q, places, places)
        else:
            rows = []
            for i in range(count):
                angles = places.unsqueeze(-1) * position.frequencies(i + 1, x.device, x.dtype)
                mine, theirs = (turn(part, *tables(angles, x.dtype)) for part in (q[..., 6:], k_turn))
                rows.append((mine[:, :, i : i + 1] @ theirs.mT + q[:, :, i : i + 1, :6] @ kv[..., :6].mT) / 10**0.5)
            scores = torch.cat(rows, 2)
        weights = scores.masked_fill(~torch.ones(count, count, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
        torch.testing.assert_close(subject.parallel(x), mixer.out((weights @ kv[..., 6:]).transpose(1, 2).flatten(2)), **TIGHT)


@pytest.mark.parametrize("encoding", ["none", *BIASED])
@torch.no_grad()
def test_eagle_unrolls_what_its_cache_drafts(encoding: str, seed: int) -> None:
    network = eagle_model(seed, mixers=[{"kind": "attention", "kv_heads": 1, "window": 4}], position=ENCODINGS[encoding])
    heads: Any = network.heads["eagle"]
    tokens, features = torch.randint(11, (2, 8)), torch.randn(2, 8, WIDTH, dtype=torch.float64)
    unrolled = heads.unroll(features, tokens, network.embed, network(tokens).context, 3)
    embedded = network.embed(tokens)
    for first in (1, 3, 5):  # positions whose features are known
        state = heads.init_state(2, 16, device="cpu", dtype=torch.float64)
        h, state = heads.extend(heads.fuse(features[:, :first]), embedded[:, 1 : first + 1], Context(), state)
        for step in range(3):
            torch.testing.assert_close(h[:, -1], unrolled[step][:, first - 1], **TIGHT)
            place = first + step
            if step < 2:
                parent = torch.full((2, 1), place - 1)
                h, state = heads.extend(h[:, -1:], embedded[:, place + 1, None], Context(parent=parent), state)
