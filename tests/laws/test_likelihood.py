"""Bits per byte: every token of a text is scored once, in the window it should be in, and every byte of it counts."""

import math

import pytest
import torch
from raced import small_model, source

from fewstep.models.model import Model
from fewstep.report.likelihood import BitsPerByte, bits_per_byte

TEXTS = [source("ab", 9), "é – naïve 日本語\n" * 4, "x", ""]


def brute_force(model: Model, text: str, context: int, stride: int) -> list[float]:
    """The nats of each token of `text`, one evaluation each: of the windows, at multiples of `stride`, the first to reach it."""
    assert model.tokenizer is not None and model.tokenizer.eos is not None
    ids = [model.tokenizer.eos, *model.tokenizer.encode(text)]
    nats = []
    for place in range(1, len(ids)):
        start = next(start for start in range(0, len(ids), stride) if place <= start + context)
        law = model.logits(torch.tensor([ids[start:place]]))[0, -1].double().log_softmax(-1)
        nats.append(-float(law[ids[place]]))
    return nats


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (16, 5), (500, 250)])
def test_equals_one_evaluation_for_each_token(context: int, stride: int) -> None:
    model = small_model(heads=False)
    found = bits_per_byte(model, TEXTS, context, stride)
    nats = [value for text in TEXTS for value in brute_force(model, text, context, stride)]
    assert found.tokens == len(nats) > 100
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.nats == pytest.approx(sum(nats), rel=1e-5)
    assert found.value == pytest.approx(sum(nats) / math.log(2) / found.bytes, rel=1e-5)


def test_texts_do_not_see_each_other() -> None:
    model = small_model(heads=False)
    together, parts = bits_per_byte(model, TEXTS, 8, 3), [bits_per_byte(model, [text], 8, 3) for text in TEXTS[:3]]
    assert together.nats == pytest.approx(sum(part.nats for part in parts), rel=1e-5)
    assert (together.tokens, together.bytes) == (sum(part.tokens for part in parts), sum(part.bytes for part in parts))


def test_a_uniform_law_costs_its_logarithm() -> None:
    model = small_model(heads=False)
    model.network.norm.weight.data.zero_()
    found = bits_per_byte(model, TEXTS)
    assert found.nats == pytest.approx(found.tokens * math.log(model.network.vocab), rel=1e-5)
    assert BitsPerByte(nats=8 * math.log(2), tokens=3, bytes=4).value == 2.0


def test_refusals() -> None:
    model = small_model(heads=False)
    for stride in (0, 9):
        with pytest.raises(ValueError, match=rf"stride={stride}: must be from 1 to context=8; "):
            bits_per_byte(model, TEXTS, 8, stride)
    with pytest.raises(ValueError, match="texts: no character"):
        bits_per_byte(model, [""])
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        bits_per_byte(model, TEXTS)
