"""Block diffusion as drafter: drafts are the uncached loop's, the output is plain decoding's, one network serves as both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from exactness import draws
from test_decode_exact import FALSE_ALARM, FIRST, LAWS, PROMPT, VOCAB, p_value_of_stack
from test_decode_mtp import Spy, no_load, prompts_of
from torch import Tensor

from fewstep.core.mixer import Blocks
from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.decode import readers
from fewstep.decode.drafters.block_diffusion import BlockDiffusionConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.readers import Whole
from fewstep.decode.stream import Settings
from fewstep.decode.unmask import canvas_of, fill
from fewstep.diffusion.corruptions import AbsorbingConfig
from fewstep.diffusion.orders.ranked import ConfidenceConfig
from fewstep.models.decoder import Decoder, DecoderConfig

MASK = VOCAB - 1
CONFIGS: Mapping[str, BlockDiffusionConfig] = {
    "drawn": BlockDiffusionConfig(size=4),
    "tree": BlockDiffusionConfig(size=3, branching=(2, 2)),
    "chosen": BlockDiffusionConfig(size=4, branching=(2, 1, 1), mode="chosen"),
    "in steps": BlockDiffusionConfig(size=4, steps=2),
    "one by one": BlockDiffusionConfig(size=5, steps=5),
    "blocks of one": BlockDiffusionConfig(size=1),
}


def network(seed: int, **fields: Any) -> Decoder:
    """A random decoder over VOCAB tokens, whose last is the mask."""
    values = {"vocab": VOCAB, "width": 16, "depth": 2, "query_heads": 2, "hidden": 24, "init_std": 0.4, "mask_token": MASK}
    torch.manual_seed(seed)
    return parse(DecoderConfig, {**values, **fields}).build().double().eval()


def speaking(model: Decoder) -> Decoder:
    """`model`, never to emit the mask, which is no text of a canvas: left to right its logit is far below any other."""
    unembed = model.unembed

    def without(h: Tensor, ids: Tensor | None = None) -> Tensor:
        return unembed(h, ids).index_fill(-1, torch.tensor([MASK]), -1e9)

    extend = model.extend

    def extended(*args: Any, **kwargs: Any) -> Any:
        output = extend(*args, **kwargs)
        logits: Any = output.logits
        return replace(output, logits=logits.index_fill(-1, torch.tensor([MASK]), -1e9))

    model.unembed, model.extend = without, extended  # type: ignore[method-assign]
    return model


def blocks_by_loop(model: Decoder, text: list[int], size: int, steps: int) -> list[int]:
    """How the block that `text` ends in goes on, by the loop without a cache."""
    row: list[int | None] = [*text, *[None] * (size - len(text) % size)]
    canvas = canvas_of([row], model.vocab, model.mask_token)
    corruption = AbsorbingConfig().build(model.vocab, model.mask_token)
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    order = ConfidenceConfig(temperature=0.0).build()
    reader = Whole(model, Blocks(size))
    return fill(reader, corruption, order, grid, canvas, CounterRng.seeded([0]))[0].tokens[len(text) :]


def texts(out: Any, prompt: list[int]) -> list[list[int]]:
    """What each proposal of a row followed: the prompt and the tokens emitted by then, the root last."""
    found, emitted = [], 1
    for accepted in out.accepted:
        found.append(prompt + out.tokens[:emitted])
        emitted += accepted + 1
    return found


@pytest.mark.parametrize(("size", "steps"), [(1, 1), (4, 1), (4, 2), (5, 5)])
def test_drafts_are_those_of_the_uncached_loop(size: int, steps: int, seed: int) -> None:
    model = speaking(network(seed))
    spy = Spy(BlockDiffusionConfig(size=size, steps=steps).build(model, no_load))
    for prompt in prompts_of(seed, VOCAB - 1, [7, 1]):
        spy.proposals.clear()
        out = decode(model, spy, [prompt], Settings(max_new_tokens=14))[0]
        for (nodes,), text in zip(spy.proposals, texts(out, prompt), strict=True):
            room = len(prompt) + 14 - len(text) - 1
            assert nodes == [text[-1], *blocks_by_loop(model, text, size, steps)[:room]]


@pytest.mark.parametrize("noisy", [False, True])
def test_long_prompts_are_read_in_chunks(noisy: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    model, prompts = network(seed, noisy=noisy), prompts_of(seed, VOCAB, [37, 9, 20])
    found = []
    for chunk in (512, 8):
        monkeypatch.setattr(readers, "_CHUNK", chunk)
        spy = Spy(BlockDiffusionConfig(size=3).build(model, no_load))
        decode(model, spy, prompts, Settings(max_new_tokens=6))
        found.append(spy.proposals)
    assert found[0] == found[1]


def test_a_noisy_model_is_told_the_share_of_masks_in_the_block(seed: int) -> None:
    model, size, prompt = speaking(network(seed, noisy=True)), 4, [1, 2, 3]
    spy = Spy(BlockDiffusionConfig(size=size).build(model, no_load))
    out = decode(model, spy, [prompt], Settings(max_new_tokens=14))[0]
    for (nodes,), text in zip(spy.proposals, texts(out, prompt), strict=True):
        known = len(text) % size
        canvas = torch.tensor([text + [MASK] * (size - known)])
        noise = torch.zeros(canvas.shape, dtype=torch.float64)
        noise[:, len(text) - known :] = 1 - known / size
        with torch.no_grad():
            logits = model.unembed(model(canvas, mask=Blocks(size), noise=noise).final)
        best = logits[0, len(text) :, :MASK].argmax(-1).tolist()
        assert nodes == [text[-1], *best[: len(prompt) + 14 - len(text) - 1]]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_plain_decoding(name: str, seed: int) -> None:
    """Of texts that begin anywhere in a block, in any batch, up to the end of a context that no block divides."""
    model, own = network(seed, max_positions=23), network(seed + 1, vocab=VOCAB + 1, mask_token=VOCAB, max_positions=23)
    prompts = prompts_of(seed, VOCAB, [6, 1, 4, 15])
    limits = Settings(max_new_tokens=[23 - len(prompt) for prompt in prompts])
    plain = decode(model, SilentConfig().build(model, no_load), prompts, limits)
    for config, load in ((CONFIGS[name], no_load), (CONFIGS[name].model_copy(update={"path": "own"}), lambda path: own)):
        drafter = config.build(model, load)
        together = decode(model, drafter, prompts, limits)
        assert [row.tokens for row in together] == [row.tokens for row in plain]
        alone = decode(model, drafter, prompts[:1], Settings(max_new_tokens=17))[0]
        assert (alone.tokens, alone.accepted) == (together[0].tokens, together[0].accepted)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_drafts_for_itself_and_keeps_its_law(name: str, seed: int) -> None:
    target = network(seed)
    drafter, law = CONFIGS[name].build(target, no_load), LAWS["everything" if name == "drawn" else "warm"]
    tokens = draws(target, drafter, PROMPT, law, range(seed, seed + 1024), FIRST, budget=8)
    assert p_value_of_stack(tokens, target, law) > FALSE_ALARM
    for batch in (1, 3, 8):
        assert torch.equal(draws(target, drafter, PROMPT, law, range(seed, seed + batch), FIRST, budget=8), tokens[:batch])


@pytest.mark.parametrize("steps", [1, 2])
def test_evaluations_are_counted_and_a_lone_root_costs_none(steps: int, seed: int) -> None:
    model, prompt = network(seed), [1, 2, 3]
    spy = Spy(BlockDiffusionConfig(size=4, steps=steps).build(model, no_load))
    out = decode(model, spy, [prompt], Settings(max_new_tokens=9))[0]
    drafting = [text for (nodes,), text in zip(spy.proposals, texts(out, prompt), strict=True) if len(nodes) > 1]
    assert out.cost.draft_calls == sum(min(steps, 4 - len(text) % 4) for text in drafting)
    assert decode(model, spy, [prompt], Settings(max_new_tokens=2))[0].cost.draft_calls == 0


@torch.no_grad()
def test_what_saw_later_tokens_is_never_called_drawn(seed: int) -> None:
    """A block in one step carries its laws; in two none of its nodes does."""
    model = network(seed)
    for steps, drawn in ((1, True), (2, False)):
        drafter: Any = BlockDiffusionConfig(size=4, steps=steps).build(model, no_load)
        trees: list[Any] = []
        propose = drafter.propose

        def kept(*args: Any, propose: Any = propose, trees: Any = trees) -> Any:
            tree, state = propose(*args)
            trees.append(tree)
            return tree, state

        drafter.propose = kept
        decode(model, drafter, [[1, 2]], Settings(max_new_tokens=12), sampling=SamplingConfig(temperature=1.0), seed=seed)
        laws: list[Tensor | None] = [tree.q for tree in trees if tree.size > 1]
        assert laws and all((q is not None and bool((q[:, 1:].sum(-1) > 0).all())) == drawn for q in laws)


def test_refusals(seed: int) -> None:
    model = network(seed)
    plain = network(seed, mask_token=None)
    for target, config, wrong in (
        (plain, BlockDiffusionConfig(), "without a mask token"),
        (network(seed, vocab=VOCAB + 1), BlockDiffusionConfig(path="own"), "a vocabulary of"),
        (model, BlockDiffusionConfig(branching=(VOCAB + 1,)), "more children"),
    ):
        with pytest.raises(ValueError, match=rf"^drafter\.[^\n]*{wrong}[^\n]*; [^\n]*$"):
            config.build(target, lambda path: model)
    for values in ({"steps": 2, "mode": "drawn"}, {"steps": 2, "branching": [1]}, {"size": 2, "branching": [1, 1, 1]}):
        with pytest.raises(ValueError, match=r"^[^\n]*; [^\n]*$"):
            parse(BlockDiffusionConfig, values)
    short = network(seed, max_positions=16)
    drafter = BlockDiffusionConfig(path="own").build(model, lambda path: short)
    with pytest.raises(ValueError, match=r"^drafter\.path='own': a context of 16 tokens, [^\n]*$"):
        decode(model, drafter, [[1, 2, 3]], Settings(max_new_tokens=20))
    recurrent = network(seed, mixers=["linear"])
    with pytest.raises(ValueError, match=r"^mask=Blocks: [^\n]*$"):
        decode(recurrent, BlockDiffusionConfig().build(recurrent, no_load), [[1, 2, 3, 1, 2]], Settings(max_new_tokens=8))
