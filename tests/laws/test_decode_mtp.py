"""Drafting with multi-token heads: proposals are what the heads' parallel form predicts, and the output is plain decoding's."""

from typing import Any

import pytest
import torch

from fewstep.core.recipe import parse
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.models.decoder import Decoder, DecoderConfig

FORMS = ("mtp_sequential", "mtp_parallel")


def tiny(form: str, seed: int, depth: int = 3, vocab: int = 11) -> Decoder:
    """A random decoder in float64 with heads of the given form; large weights, so that its choices vary."""
    values = {
        "vocab": vocab,
        "width": 16,
        "depth": 2,
        "query_heads": 2,
        "hidden": 24,
        "mixers": [{"kind": "attention", "kv_heads": 1}],
        "heads": [{"kind": form, "depth": depth}],
        "init_std": 0.3,
    }
    torch.manual_seed(seed)
    return parse(DecoderConfig, values).build().double().eval()


def prompts_of(seed: int, vocab: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def no_load(path: str) -> Any:
    raise AssertionError("heads need no second model")


class Spy:
    """A drafter that writes down what another one proposed, with the committed tokens it proposed from."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.taps, self.prompt_taps = inner, inner.taps, inner.prompt_taps
        self.proposals: list[list[list[int]]] = []

    def init(self, *arguments: Any) -> Any:
        return self.inner.init(*arguments)

    def observe(self, *arguments: Any) -> Any:
        return self.inner.observe(*arguments)

    def propose(self, *arguments: Any) -> Any:
        tree, state = self.inner.propose(*arguments)
        self.proposals.append(tree.tokens.tolist())
        return tree, state


@pytest.mark.parametrize("form", FORMS)
def test_drafts_are_the_parallel_form(form: str, seed: int) -> None:
    model = tiny(form, seed)
    heads: Any = model.heads["mtp"]
    prompt = prompts_of(seed, model.vocab, [7])[0]
    spy = Spy(MultiTokenConfig().build(model, no_load))
    out = decode(model, spy, [prompt], Settings(max_new_tokens=24))[0]
    emitted = 1
    for (nodes,), accepted in zip(spy.proposals, out.accepted, strict=True):
        committed = prompt + out.tokens[:emitted]
        assert nodes[0] == committed[-1]
        # padding beyond the drafts: the parallel form of module k stops k tokens short of the end
        sequence = torch.tensor([committed + nodes[1:] + [0] * heads.depth])
        encoded = model(sequence, taps=(heads.tap,))
        outputs = heads(encoded.hidden[heads.tap], sequence, model.embed, encoded.context)
        expected = [int(model.unembed(h[0, len(committed) - 2]).argmax()) for h in outputs]
        assert nodes[1:] == expected[: len(nodes) - 1]
        emitted += accepted + 1
    assert len(spy.proposals) > 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("branching", [(), (1,), (2, 1, 1), (3, 2, 2)])
@pytest.mark.parametrize("mode", ["drawn", "chosen"])
def test_greedy_is_plain_decoding(form: str, branching: tuple[int, ...], mode: str, seed: int) -> None:
    model = tiny(form, seed)
    prompts = prompts_of(seed, model.vocab, [6, 1, 2, 12])
    plain = decode(model, SilentConfig().build(model, no_load), prompts, Settings(max_new_tokens=20))
    drafter = parse(MultiTokenConfig, {"branching": branching, "mode": mode}).build(model, no_load)
    drafted = decode(model, drafter, prompts, Settings(max_new_tokens=20))
    assert [row.tokens for row in drafted] == [row.tokens for row in plain]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["drawn", "chosen"])
def test_a_row_alone_is_the_row_in_a_batch(form: str, mode: str, seed: int) -> None:
    model = tiny(form, seed)
    prompts = prompts_of(seed, model.vocab, [5, 1, 9])
    drafter = parse(MultiTokenConfig, {"branching": (2, 2, 1), "mode": mode}).build(model, no_load)
    sampling = SamplingConfig(temperature=1.0, top_p=0.95)
    together = decode(model, drafter, prompts, Settings(max_new_tokens=15), sampling=sampling, seed=seed)
    for prompt, row in zip(prompts, together, strict=True):
        alone = decode(model, drafter, [prompt], Settings(max_new_tokens=15), sampling=sampling, seed=seed)[0]
        assert alone.tokens == row.tokens


def test_refusals(seed: int) -> None:
    model = tiny("mtp_sequential", seed)
    with pytest.raises(ValueError, match="4 levels, the model has 3 heads"):
        MultiTokenConfig(branching=(1, 1, 1, 1)).build(model, no_load)
    bare = parse(DecoderConfig, {"vocab": 11, "width": 16, "depth": 2, "query_heads": 2, "hidden": 24}).build()
    with pytest.raises(ValueError, match="no mtp heads"):
        MultiTokenConfig().build(bare, no_load)
