"""Drafting with multi-token heads changes nothing: sampled tokens have the target's law, and known bugs on this path are seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from exactness import cells, chi_square, draws, joint_law
from test_decode_mtp import FORMS, no_load, tiny
from torch import Tensor

from fewstep.core.draft import Handle
from fewstep.core.mixer import Tree
from fewstep.core.random import Rng
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.verify import draw
from fewstep.models.decoder import Decoder

VOCAB, LENGTH = 5, 5
PROMPT = (1, 2, 3, 1, 2, 4, 1, 2)
FALSE_ALARM = 1e-6
DRAFTERS = {
    "chain-drawn": MultiTokenConfig(),
    "chain-chosen": MultiTokenConfig(mode="chosen"),
    "tree-drawn": MultiTokenConfig(branching=(3, 2, 1)),
    "tree-chosen": MultiTokenConfig(branching=(2, 2, 2), mode="chosen"),
}
TEMPERATURES, NUCLEI = (0.7, 1.0, 1.6), (1.0, 0.8, 0.6)
WARM = SamplingConfig(temperature=1.0)


def table(target: Decoder, prompt: Sequence[int], length: int) -> Mapping[tuple[int, ...], list[float]]:
    """The logits after every continuation of fewer than `length` tokens, each text through the target's parallel form."""
    texts = torch.tensor([[*prompt, *rest] for rest in product(range(target.vocab), repeat=length - 1)])
    with torch.no_grad():
        logits = target.unembed(target(texts).final)
    rows = zip(texts.tolist(), logits.tolist(), strict=True)
    return {tuple(text[: i + 1]): row[i] for text, row in rows for i in range(len(prompt) - 1, len(text))}


def p_values(tokens: Tensor, target: Decoder, config: SamplingConfig) -> tuple[float, float]:
    """Of the first three tokens, and of the last three of five (which a second proposal decides)."""
    after = table(target, PROMPT, LENGTH)
    law = joint_law(lambda text: after[tuple(text)], PROMPT, VOCAB, LENGTH, config)
    first, last = law.view(VOCAB**3, -1).sum(1), law.view(-1, VOCAB**3).sum(0)
    return chi_square(cells(tokens[:, :3], VOCAB), first), chi_square(cells(tokens[:, -3:], VOCAB), last)


def drawn(target: Decoder, drafter: Any, config: SamplingConfig, first: int, count: int) -> Tensor:
    """`count` continuations, 4096 in a batch forked from one prompt."""
    seeds = [range(start, min(start + 4096, first + count)) for start in range(first, first + count, 4096)]
    return torch.cat([draws(target, drafter, PROMPT, config, batch, LENGTH) for batch in seeds])


@pytest.mark.parametrize("name", ["chain-drawn", "tree-drawn"])
@pytest.mark.parametrize("form", FORMS)
def test_samples_have_the_law_of_the_target(form: str, name: str, seed: int) -> None:
    target = tiny(form, seed, vocab=VOCAB)
    config = SamplingConfig(temperature=0.9, top_p=0.9, repetition_penalty=1.2)
    tokens = drawn(target, DRAFTERS[name].build(target, no_load), config, seed, 20_000)
    assert min(p_values(tokens, target, config)) > FALSE_ALARM
