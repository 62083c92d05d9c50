"""The shipped model on its held-out prompts: drafting changes no token, and its card says the truth about its bits per byte."""

import json
import platform
from collections.abc import Mapping, Sequence
from typing import cast

import pytest
import torch
from rich.console import Console
from rich.table import Table

from fewstep.core.recipe import resolve
from fewstep.decode.drafters import DRAFTERS, DrafterConfig
from fewstep.decode.drafters.config import HeadsDrafterConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.early_exit import EarlyExitConfig
from fewstep.decode.drafters.lookahead import LookaheadConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import Completion, decode
from fewstep.decode.stream import Settings
from fewstep.hub.load import load, locate
from fewstep.models.decoder import Decoder
from fewstep.models.model import Model
from fewstep.nn import kernels
from fewstep.nn.packed import pack
from fewstep.report.likelihood import bits_per_byte
from fewstep.report.prompts import FILES, prompts_for
from fewstep.report.ship import CARD, CONTEXT, STRIDE
from fewstep.training.data import DATA
from fewstep.training.data.grouping import xz_bits_per_byte
from fewstep.training.data.sources import PARTS, DataConfig

SOURCE = "code-nano"
COUNT, NEW, BATCH = 200, 64, 8
SPECULATIVE: Mapping[str, DrafterConfig] = {
    "ngram-chain": NgramConfig(),
    "ngram-tree": NgramConfig(min_ngram=1, depth=4, branches=3),
    "draft-chain": DraftModelConfig(path="near"),
    "draft-tree": DraftModelConfig(path="near", branching=(3, 2, 1)),
    "mtp-chain": MultiTokenConfig(),
    "mtp-tree": MultiTokenConfig(branching=(3, 2, 1)),
    "retrieval": RetrievalConfig(),
    "lookahead": LookaheadConfig(),
    "early-exit": EarlyExitConfig(),
}


@pytest.fixture(scope="module")
def model() -> Model:
    return load(SOURCE)


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    assert model.tokenizer is not None
    return [model.tokenizer.encode(prompt.prompt) for prompt in prompts_for(SOURCE, model, COUNT)]


@pytest.fixture(scope="module")
def near() -> Decoder:
    """A draft model that often agrees with the shipped one: the same weights, disturbed."""
    network = load(SOURCE, packed=False).network
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=generator) if weight.ndim > 1 else 0.0
    pack(network)
    return network


@pytest.fixture(scope="module")
def plain(model: Model, prompts: list[list[int]]) -> list[list[int]]:
    """What plain decoding makes of each prompt alone."""
    return [row.tokens for prompt in prompts for row in continued(model, SilentConfig(), model.network, [prompt], NEW)]


def continued(
    model: Model, config: DrafterConfig, draft: Decoder, prompts: Sequence[Sequence[int]], count: int
) -> list[Completion]:
    return decode(model.network, config.build(model.network, lambda path: draft), prompts, Settings(count))


def test_every_registered_drafter_is_here() -> None:
    heads = {kind for kind, config in DRAFTERS.items() if issubclass(config, HeadsDrafterConfig)}
    here = {config.kind for config in SPECULATIVE.values()} | {SilentConfig.kind}
    assert here == set(DRAFTERS) - heads | {MultiTokenConfig.kind}, "the other heads are not shipped"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_prompts_go_on_alike(prompts: list[list[int]], near: Decoder, dtype: str) -> None:
    if dtype == "bfloat16" and not kernels.available():
        pytest.skip("no C compiler here: in bfloat16 PyTorch's own operators round a call on several tokens otherwise")
    model, texts = load(SOURCE, dtype=dtype), prompts[:4]
    draft = near if dtype == "float32" else load(SOURCE, dtype=dtype).network
    expected = continued(model, SilentConfig(), draft, texts, 24)
    for name, config in SPECULATIVE.items():
        found = continued(model, config, draft, texts, 24)
        assert [row.tokens for row in found] == [row.tokens for row in expected], name
        if name.startswith(("mtp", "draft")):  # the others depend on the text
            assert sum(map(sum, (row.accepted for row in found))) > 20, name


@pytest.mark.claims
@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("name", ["silent", *SPECULATIVE])
def test_greedy_is_plain_decoding_on_every_prompt(
    name: str, batch: int, model: Model, prompts: list[list[int]], plain: list[list[int]], near: Decoder
) -> None:
    assert len(plain) == COUNT and all(len(tokens) == NEW for tokens in plain)
    config = SPECULATIVE.get(name, SilentConfig())
    groups = [prompts[start : start + batch] for start in range(0, COUNT, batch)]
    found = [row.tokens for group in groups for row in continued(model, config, near, group, NEW)]
    different = [i for i in range(COUNT) if found[i] != plain[i]]
    assert not different, f"{len(different)} of {COUNT} prompts: {different}"


@pytest.mark.claims
def test_the_card_tells_the_bits_per_byte(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    directory = locate(SOURCE)
    card, files = (json.loads((directory / name).read_text(encoding="utf-8")) for name in (CARD, FILES))
    corpus = cast(DataConfig, resolve(model.recipe["data"], DATA, "data")).build()
    if any(corpus.hashes(part) != files[part] for part in PARTS):
        pytest.skip(f"trained on the library of Python {files['python']}, which is not that of {platform.python_version()}")
    train, held_out = ([document.text for document in corpus.documents(part)] for part in PARTS)
    found = bits_per_byte(model, held_out, CONTEXT, STRIDE)
    text, primer = "".join(held_out).encode(), "".join(train).encode()
    measured = {
        "bits_per_byte": found.value,
        "bits_per_byte_xz": xz_bits_per_byte(text),
        "bits_per_byte_xz_primed_with_training_text": xz_bits_per_byte(text, primer),
    }
    table = Table("", "measured", "card", title=f"{SOURCE}: {found.bytes} bytes of {len(held_out)} held-out files")
    for name, value in measured.items():
        table.add_row(name, f"{value:.4f}", f"{card['validation'][name]:.4f}")
    with capsys.disabled():
        Console().print(table)
    assert found.bytes == len(text) == card["validation"]["bytes"]
    assert {name: card["validation"][name] for name in measured} == pytest.approx(measured, rel=1e-3)
