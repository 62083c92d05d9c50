"""The shipped model on held-out text: drafting changes no token and no bit, and its card is right about its bits per byte."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from rich.console import Console
from rich.table import Table

import fewstep
from fewstep.core.recipe import resolve
from fewstep.decode.drafters import DRAFTERS, DrafterConfig
from fewstep.decode.drafters.block_diffusion import BlockDiffusionConfig
from fewstep.decode.drafters.config import HeadsDrafterConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.eagle import Eagle2Config, Eagle3Config, EagleConfig
from fewstep.decode.drafters.early_exit import EarlyExitConfig
from fewstep.decode.drafters.lookahead import LookaheadConfig
from fewstep.decode.drafters.medusa import HydraConfig, MedusaConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import Completion, decode
from fewstep.decode.stream import Settings
from fewstep.hub.heads import companion
from fewstep.hub.load import load, locate, shipped
from fewstep.models.decoder import Decoder
from fewstep.models.model import Model
from fewstep.nn import kernels
from fewstep.nn.packed import pack
from fewstep.report.claims.claim import Bench, Effort
from fewstep.report.claims.tuning import heads_at_hand
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
WITH_HEADS: Mapping[str, HeadsDrafterConfig] = {  # that come in a folder of their own
    "medusa": MedusaConfig(),
    "hydra": HydraConfig(),
    "eagle-chain": EagleConfig(),
    "eagle-tree": EagleConfig(branching=(2, 2, 1, 1)),
    "eagle2": Eagle2Config(),
    "eagle3": Eagle3Config(),
}
SHIPPED: Mapping[str, DrafterConfig] = {  # heads that come with the library, beside their target
    "medusa": MedusaConfig(path="code-nano-medusa"),
    "eagle": EagleConfig(path="code-nano-eagle"),
    "eagle2": Eagle2Config(path="code-nano-eagle"),
    "eagle3": Eagle3Config(path="code-nano-eagle3"),
}
# The test of bits: windows of held-out text, their shortest and longest, every which of them alone, the others in batches of 16.
# Its settings are FEWSTEP_PROMPTS, how many windows, and FEWSTEP_HEADS, a folder of heads by kind.
BITS, BITS_NEW = int(os.environ.get("FEWSTEP_PROMPTS", "1000")), 24
SHORT, LONG, ALONE, TOGETHER = 32, 96, 4, 16


@pytest.fixture(scope="module")
def model() -> Model:
    return load(SOURCE)


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    assert model.tokenizer is not None
    return [model.tokenizer.encode(prompt.prompt) for prompt in prompts_for(SOURCE, model, COUNT)]


@pytest.fixture(scope="module")
def near() -> Decoder:
    return disturbed("float32")


def disturbed(dtype: str) -> Decoder:
    """A draft model that often agrees with the shipped one: the same weights, disturbed."""
    network = load(SOURCE, dtype=dtype, packed=False).network
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
    other = {BlockDiffusionConfig.kind}  # wants a model of its own kind, which is not shipped
    assert here == set(DRAFTERS) - heads - other | {MultiTokenConfig.kind}, "the other heads lie beside the model"
    assert {config.kind for config in WITH_HEADS.values()} == heads - {MultiTokenConfig.kind}


def test_what_is_shipped_is_small_and_says_what_it_was_made_from() -> None:
    assert {"code-nano", "code-nano-eagle", "digits-consistency", "digits-edm"} <= set(shipped())
    for directory in shipped().values():
        card = json.loads((directory / CARD).read_text(encoding="utf-8"))
        assert card["name"] == directory.name and card["licence_of_data"] and card["training"] and card["parameters"] > 0
    files = [path for directory in shipped().values() for path in directory.iterdir()]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 40e6


@pytest.mark.parametrize(("name", "steps", "calls"), [("digits-edm", 10, 200), ("digits-consistency", None, 20)])
def test_the_shipped_digits_are_sampled_by_class(name: str, steps: int | None, calls: int) -> None:
    made = fewstep.sample(name, 20, label=[0] * 10 + [1] * 10, steps=steps)
    assert made.x.shape == (20, 1, 8, 8) and made.cost.calls == calls
    zeros, ones = made.x.view(2, 10, 8, 8).mean(1)
    assert zeros[3:5, 3:5].mean() < 6 < 10 < ones[3:5, 3:5].mean()  # a ring is empty inside, a stroke is not


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
    fetch = companion(model)
    for name, config in SHIPPED.items():
        found = decode(model.network, config.build(model.network, fetch), texts, Settings(24))
        assert [row.tokens for row in found] == [row.tokens for row in expected], name
        if name != "medusa":  # its heads agree with the target in a fifth of places
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


@pytest.fixture(scope="module")
def rounded() -> Model:
    if not kernels.available():
        pytest.skip("no C compiler here: in bfloat16 PyTorch's own operators round a call on several tokens otherwise")
    return load(SOURCE, dtype="bfloat16")


@pytest.fixture(scope="module")
def disturbed_too() -> Decoder:
    return disturbed("bfloat16")


@pytest.fixture(scope="module")
def windows(rounded: Model) -> list[list[int]]:
    """Pieces of 32 to 96 tokens from all held-out files, no token in two of them."""
    corpus = cast(DataConfig, resolve(rounded.recipe["data"], DATA, "data")).build()
    assert rounded.tokenizer is not None
    pieces, length = [], SHORT
    for tokens in rounded.tokenizer.encode_documents([document.text for document in corpus.documents("validation")]):
        start = 0
        while start + length <= len(tokens):
            pieces.append(tokens[start : start + length])
            start, length = start + length, SHORT + (7 * len(pieces)) % (LONG + 1 - SHORT)
    assert len(pieces) >= BITS
    return [pieces[i * len(pieces) // BITS] for i in range(BITS)]


@pytest.fixture(scope="module")
def heads(rounded: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with heads of every kind: what FEWSTEP_HEADS names, or some trained for half a minute each."""
    folder = Path(os.environ.get("FEWSTEP_HEADS") or tmp_path_factory.mktemp("heads"))
    effort = Effort(model=SOURCE, heads=str(folder), seconds=30)
    for kind in ("medusa", "hydra", "eagle", "eagle3"):
        heads_at_hand(Bench(rounded, None, (), effort, folder, Console(quiet=True)), kind)
    return folder


@pytest.fixture(scope="module")
def bits(rounded: Model, windows: list[list[int]]) -> list[tuple[list[int], str]]:
    """What plain decoding makes of each window alone."""
    return [row for row, _ in written(rounded, SilentConfig(), rounded.network, windows, 1)]


def written(
    model: Model, config: DrafterConfig, draft: Decoder, prompts: Sequence[Sequence[int]], batch: int
) -> Iterator[tuple[tuple[list[int], str], int]]:
    """Of each prompt the tokens with a digest of the bits of their logits, and the drafts accepted."""
    settings = Settings(BITS_NEW, keep_logits=True)
    fetch = companion(model)
    drafter = config.build(model.network, lambda path: draft if path == "near" else fetch(path))
    for start in range(0, len(prompts), batch):
        for row in decode(model.network, drafter, prompts[start : start + batch], settings):
            assert row.logits is not None and len(row.logits) == len(row.tokens) == BITS_NEW
            content = row.logits.contiguous().view(torch.uint8).numpy().tobytes()
            yield (row.tokens, hashlib.blake2b(content, digest_size=16).hexdigest()), sum(row.accepted)


@pytest.mark.claims
@pytest.mark.parametrize("batch", [1, TOGETHER])
@pytest.mark.parametrize("name", ["silent", *SPECULATIVE, *WITH_HEADS])
def test_in_bfloat16_tokens_and_logits_are_those_of_plain_decoding_bit_by_bit(
    name: str, batch: int, request: pytest.FixtureRequest, rounded: Model, windows: list[list[int]], disturbed_too: Decoder
) -> None:
    config = SPECULATIVE.get(name, SilentConfig())
    if name in WITH_HEADS:
        kind = EagleConfig.kind if name == Eagle2Config.kind else WITH_HEADS[name].kind
        config = WITH_HEADS[name].model_copy(update={"path": str(request.getfixturevalue("heads") / kind)})
    step = ALONE if batch == 1 else 1
    plain = request.getfixturevalue("bits")[::step]
    found = list(written(rounded, config, disturbed_too, windows[::step], batch))
    different = [i for i, (row, _) in enumerate(found) if row != plain[i]]
    tokens = sum(found[i][0][0] != plain[i][0] for i in different)
    assert not different, f"{len(different)} of {len(plain)} windows, {tokens} of them in their tokens: {different[:20]}"
    assert name == "silent" or sum(accepted for _, accepted in found) > 0, "nothing drafted was kept, so nothing was tested"


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
