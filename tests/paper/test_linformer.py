"""Linformer (arXiv 2006.04768): its equation, what becomes of it without projection, and the lengths it takes."""

import math

import pytest
import torch

from fewstep.core.mixer import Causal, Context, Full, Tree
from fewstep.models.decoder import DecoderConfig
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.mixers.linformer import Linformer, LinformerConfig, Sharing

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH, HEADS = 12, 3


def made(sharing: Sharing = "none", rank: int = 4, length: int = 10) -> Linformer:
    return LinformerConfig(length=length, rank=rank, sharing=sharing, bias=True).build(width=WIDTH, heads=HEADS).double()


def whole(mixer: Linformer, x: torch.Tensor) -> torch.Tensor:
    y, _ = mixer(x, Context(torch.arange(x.shape[1]).expand(len(x), -1), mask=Full()))
    return y


@pytest.mark.parametrize("sharing", ["none", "heads", "keys_and_values"])
@pytest.mark.parametrize("count", [1, 7, 10])
def test_is_the_papers_head(sharing: Sharing, count: int) -> None:
    """softmax(Q (E_i K)' / sqrt(d)) F_i V (eq. 7), head by head; a short sequence is one followed by zeros."""
    mixer, x = made(sharing), torch.randn(2, count, WIDTH, dtype=torch.float64)
    e, f = mixer.along.expand(2, -1, -1).chunk(2) if len(mixer.along) == 1 else mixer.along.chunk(2)
    assert len(mixer.along) == {"none": 2 * HEADS, "heads": 2, "keys_and_values": 1}[sharing]
    e, f = (part.expand(HEADS, -1, -1) for part in (e, f))
    for row in range(2):
        q, k, v = mixer.qkv(x[row]).view(count, 3, HEADS, WIDTH // HEADS).unbind(1)
        heads = []
        for h in range(HEADS):
            keys, values = e[h, :, :count] @ k[:, h], f[h, :, :count] @ v[:, h]
            heads.append((q[:, h] @ keys.T / math.sqrt(WIDTH // HEADS)).softmax(-1) @ values)
        torch.testing.assert_close(whole(mixer, x)[row], mixer.out(torch.cat(heads, 1)), **TIGHT)


def test_projections_that_change_nothing_leave_attention() -> None:
    mixer = made("heads", rank=8, length=8)
    attention = AttentionConfig(bias=True, out_bias=True).build(width=WIDTH, heads=HEADS).double()
    with torch.no_grad():
        mixer.along.copy_(torch.eye(8))
    attention.load_state_dict({name: value for name, value in mixer.state_dict().items() if name != "along"})
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    wanted, _ = attention(x, Context(torch.arange(8).expand(2, -1), mask=Full()))
    torch.testing.assert_close(whole(mixer, x), wanted, **TIGHT)


def test_what_it_cannot_do_is_refused() -> None:
    mixer = made()
    with pytest.raises(ValueError, match=r"^length=10: a sequence has 11 tokens; shorten it or [^\n]*larger length$"):
        whole(mixer, torch.randn(1, 11, WIDTH, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^mask=Causal: linformer takes Full; choose one of them$"):
        mixer(torch.randn(1, 3, WIDTH, dtype=torch.float64), Context(torch.arange(3)[None], mask=Causal()))
    for step in (
        lambda: mixer.init_state(1, 8, device="cpu", dtype=torch.float64),
        lambda: mixer.extend(torch.randn(1, 1, WIDTH, dtype=torch.float64), Context(), None),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"^mixer='linformer': looks both ways [^\n]*; choose a causal mixer to decode$"):
            step()
    with pytest.raises(ValueError, match=r"rank=11: must be at most length=10; lower it"):
        LinformerConfig(length=10, rank=11)


def test_packed_sequences_are_each_as_long_as_they_are() -> None:
    """Two of 6 tokens fit a length of 10, packed in 12."""
    mixer, x = made(), torch.randn(1, 12, WIDTH, dtype=torch.float64)
    segments, positions = torch.tensor([[0] * 6 + [1] * 6]), torch.arange(6).repeat(2)[None]
    y, _ = mixer(x, Context(positions, segments=segments, mask=Full()))
    torch.testing.assert_close(y, whole(mixer, x.view(2, 6, WIDTH)).view(1, 12, WIDTH), **TIGHT)


def test_a_decoder_of_it_reads_whole_sequences_and_does_not_generate() -> None:
    decoder = DecoderConfig(vocab=7, width=WIDTH, depth=2, query_heads=HEADS, hidden=8, mixers=(LinformerConfig(),)).build()
    encoded = decoder(torch.randint(7, (2, 5)), mask=Full())
    assert encoded.final.shape == (2, 5, WIDTH)
    with pytest.raises(ValueError, match="choose a causal mixer to decode"):
        decoder.extend(
            Tree.chain(torch.zeros(1, 1, dtype=torch.int64)), decoder.init_state(1, 8, device="cpu", dtype=torch.float32)
        )
