"""With packed weights and the decoding kernels, drafting changes no bit: neither a token nor a logit, alone or in a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from test_decode_mtp import prompts_of

from fewstep.core.recipe import parse
from fewstep.decode.drafters import DrafterConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.early_exit import EarlyExitConfig
from fewstep.decode.drafters.lookahead import LookaheadConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import Completion, decode
from fewstep.decode.stream import Settings
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.nn import kernels
from fewstep.nn.packed import PackedLinear, pack

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C compiler here, so no kernel whose bits could be promised")

VOCAB, NEW = 13, 20
DTYPES = (torch.bfloat16, torch.float32)
DRAFTERS: Mapping[str, DrafterConfig] = {
    "ngram-chain": NgramConfig(min_ngram=1, depth=6),
    "ngram-tree": NgramConfig(min_ngram=1, depth=3, branches=3),
    "draft-chain": DraftModelConfig(path="near"),
    "draft-tree": DraftModelConfig(path="near", branching=(3, 2, 1)),
    "mtp-chain": MultiTokenConfig(),
    "mtp-tree": MultiTokenConfig(branching=(3, 2, 1)),
    "retrieval": RetrievalConfig(),
    "lookahead": LookaheadConfig(window=2, ngram=3),
    "exit-tree": EarlyExitConfig(layers=1, branching=(2, 1, 1), reuse=False),
    "exit-tree-reused": EarlyExitConfig(layers=1, branching=(2, 1, 1), reuse=True),
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "grouped": {"mixers": [{"kind": "attention", "kv_heads": 1}], "heads": [{"kind": "mtp_sequential"}]},
    "normed": {
        "mixers": [{"kind": "attention", "qk_norm": True, "window": 9}, {"kind": "attention", "bias": True}],
        "heads": [{"kind": "mtp_parallel"}],
    },
    "layer-norm": {"norm": "layer", "tied": False, "hidden": 50, "mlp_bias": True, "heads": [{"kind": "mtp_sequential"}]},
}


def decoder(seed: int, dtype: torch.dtype, shape: str) -> Decoder:
    """A random decoder, packed, whose sizes fill no vector register."""
    torch.manual_seed(seed)
    values = {"vocab": VOCAB, "width": 36, "depth": 2, "query_heads": 2, "hidden": 44, "init_std": 0.3}
    network = parse(DecoderConfig, {**values, **SHAPES[shape]}).build().to(dtype).eval()
    pack(network)
    assert isinstance(network.head, PackedLinear)
    return network


def near(target: Decoder, seed: int, shape: str) -> Decoder:
    """A draft model that agrees with `target` often: its weights, the embedding disturbed."""
    draft = decoder(seed, target.embedding.weight.dtype, shape)
    with torch.no_grad():
        draft.embedding.weight += 0.05 * torch.randn_like(draft.embedding.weight)
    return draft


def continued(target: Decoder, config: DrafterConfig, draft: Decoder, prompts: Sequence[Sequence[int]]) -> list[Completion]:
    drafter = config.build(target, lambda path: draft)
    return decode(target, drafter, prompts, Settings(max_new_tokens=NEW, keep_logits=True))


def assert_same_bits(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.logits is not None and other.logits is not None and one.logits.shape == (NEW, VOCAB)
        assert torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
def test_every_drafter_gives_the_bits_of_plain_decoding(dtype: torch.dtype, shape: str, seed: int) -> None:
    target = decoder(seed, dtype, shape)
    draft = near(target, seed, shape)
    prompts = prompts_of(seed, VOCAB, [6, 1, 30, 90])  # the last: a prefill too long for the kernel
    plain = continued(target, SilentConfig(), draft, prompts)
    accepted = 0
    for config in DRAFTERS.values():
        drafted = continued(target, config, draft, prompts)
        assert_same_bits(drafted, plain)
        accepted += sum(sum(row.accepted) for row in drafted)
    assert accepted > 20  # else only roots were compared


@pytest.mark.parametrize("name", ["silent", "ngram-tree", "draft-tree", "mtp-tree"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(dtype: torch.dtype, name: str, seed: int) -> None:
    target = decoder(seed, dtype, "grouped")
    draft, config = near(target, seed, "grouped"), DRAFTERS.get(name, SilentConfig())
    prompts = prompts_of(seed, VOCAB, [6, 1, 17, 40])
    together = continued(target, config, draft, prompts)
    for prompt, row in zip(prompts, together, strict=True):
        assert_same_bits(continued(target, config, draft, [prompt]), [row])


@pytest.mark.parametrize("name", ["ngram-tree", "mtp-tree"])
def test_other_bits_are_seen(name: str, seed: int) -> None:
    target = decoder(seed, torch.float32, "grouped")
    prompts = prompts_of(seed, VOCAB, [6, 30])
    plain = continued(target, SilentConfig(), target, prompts)
    with torch.no_grad():
        target.embedding.weight[:, 0] += 1e-3
    with pytest.raises(AssertionError):
        assert_same_bits(continued(target, DRAFTERS[name], target, prompts), plain)
