"""Early exit: drafts are those of the truncated network, stops leave drawn nodes drawn, the output is plain decoding's."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from exactness import cells, chi_square, draws, joint_law
from test_decode_mtp import Spy, no_load, prompts_of
from toys import TableModel

from fewstep.core.mixer import Causal, Context
from fewstep.core.recipe import parse
from fewstep.decode.drafters.early_exit import EarlyExitConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.models.decoder import Decoder, DecoderConfig

SETTINGS: Mapping[str, EarlyExitConfig] = {
    "chain": EarlyExitConfig(layers=2),
    "chain reused": EarlyExitConfig(layers=2, reuse=True),
    "tree reused": EarlyExitConfig(layers=1, branching=(3, 2, 1), reuse=True),
    "all reused": EarlyExitConfig(layers=4, branching=(2, 2), reuse=True),
    "stop reused": EarlyExitConfig(layers=2, branching=(2, 2, 1), confidence=0.3, reuse=True),
    "third": EarlyExitConfig(),
    "tree": EarlyExitConfig(layers=1, branching=(3, 2, 1)),
    "chosen": EarlyExitConfig(layers=2, branching=(2, 2), mode="chosen"),
    "skip": EarlyExitConfig(layers=4, stride=2),
    "stop": EarlyExitConfig(layers=2, branching=(1,) * 6, confidence=0.3),
    "tree that stops": EarlyExitConfig(layers=2, branching=(2, 2, 1), confidence=0.3),
}


def shallow(seed: int, vocab: int = 11) -> Decoder:
    """A random decoder of four blocks, all but the first weak, so that the first ones draft well."""
    torch.manual_seed(seed)
    values = {"vocab": vocab, "width": 16, "depth": 4, "query_heads": 2, "hidden": 24, "init_std": 0.5}
    network = parse(DecoderConfig, values).build().double().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(("blocks.1", "blocks.2", "blocks.3")):
                parameter *= 0.5
    return network


@torch.no_grad()
def best_after(model: Decoder, layers: range, text: list[int]) -> tuple[int, float]:
    """The truncated network's likeliest next token and its probability, by the parallel form."""
    ctx = Context(torch.arange(len(text))[None], mask=Causal())
    x = model.embed(torch.tensor([text]))
    for i in layers:
        x = model.blocks[i](x, ctx)[0]
    law = model.unembed(model.norm(x[0, -1])).softmax(-1)
    return int(law.argmax()), float(law.max())


def nodes_by_block(model: Decoder) -> list[int]:
    """How many nodes each block runs from now on, counted while decoding goes on."""
    counts = [0] * model.depth
    for i, block in enumerate(model.blocks):
        run = type(block).extend

        def counted(x: Any, *rest: Any, i: int = i, block: Any = block, run: Any = run) -> Any:
            counts[i] += x.shape[0] * x.shape[1]
            return run(block, x, *rest)

        block.extend = counted  # type: ignore[method-assign]
    return counts


def between(model: Decoder, layers: range, text: list[int], count: int) -> float:
    """A probability below that of all but one of the `count` drafts after `text`."""
    probabilities = []
    for _ in range(count):
        token, probability = best_after(model, layers, text)
        probabilities.append(probability)
        text = [*text, token]
    return sum(sorted(probabilities)[:2]) / 2


@pytest.mark.parametrize("name", ["chain", "stop"])
def test_drafts_are_the_truncated_networks(name: str, seed: int) -> None:
    model, config, layers = shallow(seed), SETTINGS[name], range(2)
    prompt = prompts_of(seed, model.vocab, [7])[0]
    if name == "stop":  # within the first chain of drafts
        begun = decode(model, SilentConfig().build(model, no_load), [prompt], Settings(max_new_tokens=1))[0].tokens
        confidence = between(model, layers, prompt + begun, len(config.branching))
        config = config.model_copy(update={"confidence": confidence})
    spy = Spy(config.build(model, no_load))
    out = decode(model, spy, [prompt], Settings(max_new_tokens=30))[0]
    emitted, stops = 1, 0
    for (nodes,), accepted in zip(spy.proposals, out.accepted, strict=True):
        text, expected = prompt + out.tokens[:emitted], []
        while len(expected) < min(len(config.branching), 30 - emitted - 1):
            token, probability = best_after(model, layers, text + expected)
            if probability < config.confidence:
                stops += 1
                break
            expected.append(token)
        assert nodes == [text[-1], *expected]
        emitted += accepted + 1
    assert (stops > 0) == (name == "stop")


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_is_plain_decoding(name: str, seed: int) -> None:
    model = shallow(seed)
    prompts = prompts_of(seed, model.vocab, [6, 1, 2, 12])
    plain = decode(model, SilentConfig().build(model, no_load), prompts, Settings(max_new_tokens=20))
    drafted = decode(model, SETTINGS[name].build(model, no_load), prompts, Settings(max_new_tokens=20))
    assert [row.tokens for row in drafted] == [row.tokens for row in plain]
    assert sum(sum(row.accepted) for row in drafted) > 0 and all(row.cost.draft_calls > 0 for row in drafted)


@pytest.mark.parametrize("name", [name for name in SETTINGS if "reused" in name])
def test_reuse_changes_costs_alone(name: str, seed: int) -> None:
    model, config = shallow(seed), SETTINGS[name]
    prompts, sampling = prompts_of(seed, model.vocab, [6, 1, 12]), SamplingConfig(temperature=1.0)
    rows = []
    for reuse in (False, True):
        ran = nodes_by_block(model)
        drafter = config.model_copy(update={"reuse": reuse}).build(model, no_load)
        rows.append((decode(model, drafter, prompts, Settings(max_new_tokens=20), sampling=sampling, seed=seed), ran))
    (plain, before), (reused, after) = rows
    assert [(row.tokens, row.accepted) for row in reused] == [(row.tokens, row.accepted) for row in plain]
    exits = config.layers
    assert after[:exits] < before[:exits] and after[exits:] == before[exits:]  # the first blocks ran each node once


@pytest.mark.parametrize("name", ["tree", "stop", "tree that stops", "stop reused"])
def test_a_row_alone_is_the_row_in_a_batch(name: str, seed: int) -> None:
    model = shallow(seed)
    prompts = prompts_of(seed, model.vocab, [5, 1, 9])
    drafter, sampling = SETTINGS[name].build(model, no_load), SamplingConfig(temperature=1.0, top_p=0.95)
    together = decode(model, drafter, prompts, Settings(max_new_tokens=15), sampling=sampling, seed=seed)
    for prompt, row in zip(prompts, together, strict=True):
        alone = decode(model, drafter, [prompt], Settings(max_new_tokens=15), sampling=sampling, seed=seed)[0]
        assert (alone.tokens, alone.accepted) == (row.tokens, row.accepted)


@pytest.mark.parametrize("mode", ["drawn", "chosen"])
@pytest.mark.parametrize("branching", [(1, 1, 1, 1), (2, 2)])
def test_a_stop_leaves_the_law_of_the_target(branching: tuple[int, ...], mode: Any, seed: int) -> None:
    target, prompt, config = TableModel(5, seed), (1, 2, 3, 1, 2, 4, 1, 2), SamplingConfig(temperature=1.0)
    drafter = EarlyExitConfig(branching=branching, mode=mode, confidence=0.4).build(target, lambda path: target)
    tokens = draws(target, drafter, prompt, config, range(seed, seed + 20_000), 4, budget=6)
    law = joint_law(target.after, prompt, 5, 4, config)
    assert chi_square(cells(tokens, 5), law) > 1e-6


def test_refusals(seed: int) -> None:
    model = shallow(seed)
    for config in (EarlyExitConfig(layers=5), EarlyExitConfig(branching=(12,))):
        with pytest.raises(ValueError, match=r"^drafter\.[^\n]*; [^\n]*$"):
            config.build(model, no_load)
    with pytest.raises(ValueError, match=r"^confidence=1.5: [^\n]*$"):
        parse(EarlyExitConfig, {"confidence": 1.5})
    with pytest.raises(ValueError, match=r"^reuse=True: [^\n]*stride=1[^\n]*$"):
        parse(EarlyExitConfig, {"reuse": True, "stride": 2})
