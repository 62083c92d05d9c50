"""Length extrapolation: every length scores the same tokens, and another encoding keeps the weights."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from fewstep.core.objective import Batch
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.position import POSITIONS
from fewstep.report.claims import CLAIMS
from fewstep.report.claims.length_extrapolation import long_texts, loss, placed

VOCAB = 11


def network(position: str, window: int | None = None) -> Decoder:
    mixer = AttentionConfig(window=window)
    fields: dict[str, Any] = {"vocab": VOCAB, "width": 16, "depth": 1, "query_heads": 2, "hidden": 24, "init_std": 0.5}
    return DecoderConfig(position=POSITIONS[position](), mixers=(mixer,), max_positions=64, **fields).build().eval()


def test_every_length_scores_the_same_tokens() -> None:
    """A network without a past has one loss at all lengths; with a past it has not."""
    texts = torch.randint(VOCAB, (3, 32))
    alone, reading = network("none", window=1), network("alibi")
    losses = [loss(alone, texts, length, 8) for length in (8, 16, 32)]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
    assert abs(loss(reading, texts, 8, 8) - loss(reading, texts, 32, 8)) > 1e-6


@torch.no_grad()
def test_the_loss_of_whole_texts() -> None:
    texts, reading = torch.randint(VOCAB, (2, 24)), network("rope")
    logits = reading.unembed(reading(texts[:, :-1]).final)
    kept = [token for token in range(1, 24) if token % 8]
    wanted = cross_entropy(logits[:, [token - 1 for token in kept]].flatten(0, 1), texts[:, kept].flatten())
    assert loss(reading, texts, 24, 8) == pytest.approx(float(wanted), rel=1e-5)


def test_another_encoding_keeps_the_weights() -> None:
    plain = network("rope")
    scaled = placed(plain, POSITIONS["yarn"](trained_length=8, base=50.0))  # type: ignore[call-arg]
    assert scaled.position.kind == "yarn" and plain.position.kind == "rope"
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, scaled.state_dict()[name])
    texts = torch.randint(VOCAB, (1, 32))
    assert loss(scaled, texts, 32, 8) != loss(plain, texts, 32, 8)


def test_long_texts_lie_within_one_document() -> None:
    tokens = torch.arange(8).unsqueeze(1).expand(-1, 1024)
    segments = torch.zeros(8, 1024, dtype=torch.int64)
    segments[1, 700:], segments[4] = 1, -1

    class Held:
        def validation(self, batch: int, length: int) -> Iterator[Batch]:
            assert length == 1024
            yield from (Batch(tokens[i : i + 4], segments[i : i + 4]) for i in (0, 4))

    held: Any = Held()
    assert long_texts(held, 100)[:, 0].tolist() == [0, 2, 3, 5, 6, 7]
    assert long_texts(held, 3)[:, 0].tolist() == [0, 3, 6]
    none: Any = SimpleNamespace(validation=lambda batch, length: iter([Batch(tokens[1:2], segments[1:2])]))
    with pytest.raises(ValueError, match=r"^model: none of its held-out texts has 1024 tokens; [^\n]*$"):
        long_texts(none, 3)


def test_the_claim_is_named_by_its_encodings() -> None:
    assert {kind for kind, config in POSITIONS.items() if "length-extrapolation" in config.claims} == {"rope", "yarn", "alibi"}
    assert [criterion.name for criterion in CLAIMS["length-extrapolation"].criteria] == [
        "alibi-is-flat",
        "rope-breaks",
        "yarn-repairs",
    ]
