"""Extra heads: what each may look at, packing, and the same numbers step by step as all at once."""

from typing import Any

import pytest
import torch
from sequences import TIGHT, VOCAB, decoder
from torch import Tensor

from fewstep.core.mixer import Causal, Context, Full, Mask
from fewstep.core.recipe import Config
from fewstep.models.decoder import Decoder
from fewstep.nn.heads import HEADS, ParallelHeads, SequentialHeads
from fewstep.nn.mixers.attention import AttentionConfig

DEPTH = 3
KINDS = ("mtp_sequential", "mtp_parallel", "medusa", "hydra")  # those with one parallel form; others have files of their own
LOOKING_AHEAD = ("mtp_sequential", "hydra")


def with_heads(kind: str, **fields: Any) -> tuple[Decoder, Any]:
    head: type[Config] = HEADS[kind]
    network = decoder(heads=(head(depth=DEPTH),), **fields)  # type: ignore[call-arg]
    return network, network.heads[head.drafter]


def outputs(
    network: Decoder, heads: Any, tokens: Tensor, segments: Tensor | None = None, mask: Mask | None = None
) -> list[Tensor]:
    encoded = network(tokens, segments, mask=mask, taps=(heads.tap,))
    result: list[Tensor] = heads(encoded.hidden[heads.tap], tokens, network.embed, encoded.context)
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 3])
def test_a_head_sees_no_token_it_will_have_to_predict(kind: str, window: int | None) -> None:
    """Depth k at i may read tokens up to i + k (looking ahead) or i, and does read the last of them."""
    network, heads = with_heads(kind, mixers=(AttentionConfig(window=window),))
    tokens = torch.randint(VOCAB, (1, 10))
    before = outputs(network, heads, tokens)
    assert [h.shape for h in before] == [(1, 10 - k, network.width) for k in range(1, DEPTH + 1)]
    for place in range(10):
        other = tokens.clone()
        other[0, place] = (tokens[0, place] + 1) % VOCAB
        for k, (old, new) in enumerate(zip(before, outputs(network, heads, other), strict=True), 1):
            change = (old - new).abs().amax(2)[0]
            first = max(0, place - k) if kind in LOOKING_AHEAD else place
            assert (change[:first] < 1e-12).all()
            assert (change[first : first + 1] > 1e-7).all()


@pytest.mark.parametrize("mask", [Causal(), Full()], ids=["causal", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_segments_equal_separate_sequences(kind: str, mask: Mask) -> None:
    network, heads = with_heads(kind)
    lengths = (5, 1, 4, 3)
    tokens = torch.randint(VOCAB, (1, 15))
    segments = torch.tensor([[i for i, length in enumerate(lengths) for _ in range(length)] + [-1, -1]])
    together = outputs(network, heads, tokens, segments, mask)
    start = 0
    for length in lengths:
        alone = outputs(network, heads, tokens[:, start : start + length], mask=mask)
        for k in range(1, min(DEPTH, length - 1) + 1):
            mine = together[k - 1][:, start : start + length - k]
            torch.testing.assert_close(mine, alone[k - 1][:, : length - k], **TIGHT)
        start += length


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_shorter_than_the_heads(kind: str) -> None:
    network, heads = with_heads(kind)
    for count in range(1, DEPTH + 2):
        shapes = [h.shape[1] for h in outputs(network, heads, torch.randint(VOCAB, (2, count)))]
        assert shapes == [max(0, count - k) for k in range(1, DEPTH + 1)]


def test_sequential_modules_step_by_step() -> None:
    """A module extended by random chunks gives its parallel form: what a drafter runs is what was trained."""
    network, heads = with_heads("mtp_sequential")
    assert isinstance(heads, SequentialHeads)
    tokens = torch.randint(VOCAB, (2, 11))
    wanted = outputs(network, heads, tokens)
    h, embedded = network(tokens).final, network.embed(tokens)
    for k in range(1, DEPTH + 1):
        module, count = heads.module(k), 11 - k
        state, parts = module.block.init_state(2, 16, device="cpu", dtype=torch.float64), []
        for start, end in ((0, 4), (4, 5), (5, count)):
            ctx = Context(torch.arange(start, end).expand(2, -1))
            y, state = module.extend(h[:, start:end], embedded[:, start + k : end + k], ctx, state)
            state = state.commit(torch.arange(end - start).expand(2, -1), torch.full((2,), end - start))
            parts.append(y)
        h = torch.cat(parts, 1)
        torch.testing.assert_close(module.norm(h), wanted[k - 1], **TIGHT)


def test_parallel_heads_stand_beside_the_last_block() -> None:
    """A head with the last block's weights and the trunk's norm is the trunk."""
    network, heads = with_heads("mtp_parallel", depth=3)
    assert isinstance(heads, ParallelHeads)
    assert heads.tap == "layer.1"
    heads.block(2).load_state_dict(network.blocks[-1].state_dict())
    heads.norms[1].load_state_dict(network.norm.state_dict())
    tokens = torch.randint(VOCAB, (2, 8))
    torch.testing.assert_close(outputs(network, heads, tokens)[1], network(tokens).final[:, :-2], **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_have_weights_of_their_own(kind: str) -> None:
    """No two depths share a parameter, and none is the trunk's."""
    network, heads = with_heads(kind)
    own = [id(p) for p in heads.parameters()]
    assert len(own) == len(set(own))
    assert not {id(p) for part in (network.blocks, network.norm, network.embedding) for p in part.parameters()} & set(own)
