"""Greedy decoding: every drafter emits exactly the tokens of plain decoding, in any batch, whatever the target is made of."""

from typing import Any

import pytest
import torch
from toys import STACKS, MaskedTable, TableModel, random_decoder

from fewstep.core.event import Cost
from fewstep.core.mixer import Tree
from fewstep.core.random import CounterRng
from fewstep.decode.drafters.block_diffusion import BlockDiffusionConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.early_exit import EarlyExitConfig
from fewstep.decode.drafters.lookahead import LookaheadConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.decode.drafters.silent import Silent
from fewstep.decode.laws import Sampling, SamplingConfig
from fewstep.decode.stream import Settings, stream
from fewstep.decode.verify import verify
from fewstep.models.decoder import Decoder
from fewstep.nn.recurrent import RecurrentState

VOCAB = 7
REVEALING = 3  # the seed of targets to which it matters which branch was kept
DRAFTERS = {
    "ngram-chain": NgramConfig(min_ngram=1, depth=6),
    "ngram-tree": NgramConfig(min_ngram=1, depth=4, branches=3),
    "draft-chain": DraftModelConfig(path="toy", branching=(1, 1, 1, 1)),
    "draft-tree": DraftModelConfig(path="toy", branching=(3, 2, 1)),
    "draft-tree-chosen": DraftModelConfig(path="toy", branching=(2, 2, 2), mode="chosen"),
    "retrieval": RetrievalConfig(depth=6),
    "lookahead": LookaheadConfig(window=3, ngram=3),
    "exit-chain": EarlyExitConfig(),
    "exit-tree": EarlyExitConfig(branching=(2, 2), confidence=0.3),
    "block-chain": BlockDiffusionConfig(path="masked", size=3),
    "block-tree": BlockDiffusionConfig(path="masked", size=4, branching=(2, 2, 1, 1), mode="chosen"),
    "block-in-steps": BlockDiffusionConfig(path="masked", size=4, steps=3),
}
ON_STACKS = {
    "ngram-tree": NgramConfig(min_ngram=1, depth=4, branches=3),
    "mtp-chain": MultiTokenConfig(),
    "mtp-tree": MultiTokenConfig(branching=(3, 2, 1)),
    "mtp-tree-chosen": MultiTokenConfig(branching=(2, 2, 2), mode="chosen"),
    "own-chain": DraftModelConfig(path="toy", branching=(1, 1, 1, 1)),
    "own-tree": DraftModelConfig(path="toy", branching=(2, 2, 1), mode="chosen"),
    "retrieval": RetrievalConfig(depth=6),
    "lookahead": LookaheadConfig(window=3, ngram=3),
}
QUICK = [(stack, name) for stack in ("mamba2", "linear", "hybrid") for name in ("mtp-chain", "mtp-tree", "own-tree")]
GREEDY = SamplingConfig()
PENALISED = SamplingConfig(repetition_penalty=1.7)


def lent(target: TableModel, seed: int) -> Any:
    """What settings name by their path: models near the target."""
    masked = MaskedTable(target, seed + 1, near=0.8)
    return lambda path: masked if path == "masked" else TableModel(VOCAB, seed + 1, like=target, near=0.8)


def prompts(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def tokens_of(
    target: Any, drafter: Any, texts: list[list[int]], configs: list[SamplingConfig], **settings: Any
) -> tuple[list[list[int]], Cost]:
    """What each row emits, and the cost."""
    law, rng = Sampling.of(configs, target.vocab), CounterRng.seeded(range(len(texts)))
    out: list[list[int]] = [[] for _ in texts]
    cost = Cost()
    for event in stream(target, drafter, texts, law, rng, Settings(**settings)):
        step, cost = event.payload, event.cost
        for row, tokens, count in zip(step.rows.tolist(), step.tokens.tolist(), step.count.tolist(), strict=True):
            out[row] += tokens[:count]
    return out, cost


def plain(target: TableModel, prompt: list[int], config: SamplingConfig, length: int) -> list[int]:
    """Greedy decoding by plain lookup."""
    text = list(prompt)
    for _ in range(length):
        scores = target.after(text)
        for token in set(text):
            scores[token] *= config.repetition_penalty if scores[token] < 0 else 1 / config.repetition_penalty
        text.append(scores.index(max(scores)))
    return text[len(prompt) :]


def plain_by_parallel_form(target: Decoder, texts: list[list[int]], length: int) -> list[list[int]]:
    """Greedy decoding without a state: every token from the parallel form over the whole text."""
    texts = [list(text) for text in texts]
    for _ in range(length):
        longest = max(map(len, texts))
        tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        with torch.no_grad():
            choices = target.unembed(target(tokens).final).argmax(-1)
        for text, row in zip(texts, choices.tolist(), strict=True):
            text.append(row[len(text) - 1])
    return [text[-length:] for text in texts]


def check_stack(stack: str, name: str, seed: int, length: int) -> Cost:
    """Batches of 8, 3 and 1 emit what the parallel form says; the cost of the first. A draft model is the target itself."""
    target = random_decoder(STACKS[stack], VOCAB, seed)
    drafter = ON_STACKS[name].build(target, lambda path: target)
    texts = prompts(8, seed)
    truth = plain_by_parallel_form(target, texts, length)
    costs = []
    for batch in (8, 3, 1):
        out, cost = tokens_of(target, drafter, texts[:batch], [GREEDY] * batch, max_new_tokens=length)
        assert out == truth[:batch]
        costs.append(cost)
    return costs[0]


def circling(target: TableModel, prompt: list[int], config: SamplingConfig) -> list[int]:
    """`prompt` gone on with for so long that the text repeats itself, as there are 5 * 7**3 ways to go on: drafts come true."""
    return prompt + plain(target, prompt, config, 300)


@pytest.mark.parametrize("config", [GREEDY, PENALISED], ids=["greedy", "penalised"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_every_drafter_emits_the_tokens_of_plain_decoding(name: str, config: SamplingConfig, seed: int) -> None:
    target = TableModel(VOCAB, seed)
    drafter = DRAFTERS[name].build(target, lent(target, seed))
    texts = [text if i % 3 else circling(target, text, config) for i, text in enumerate(prompts(24, seed))]
    truth = [plain(target, text, config, 40) for text in texts]
    together, cost = tokens_of(target, drafter, texts, [config] * 24, max_new_tokens=40)
    assert together == truth
    assert cost.tokens_per_call > 1.05  # something was accepted, else nothing was tested
    assert [tokens_of(target, drafter, [text], [config], max_new_tokens=40)[0][0] for text in texts[:4]] == truth[:4]


@pytest.mark.parametrize(("stack", "name"), QUICK)
def test_recurrent_and_hybrid_targets_emit_the_tokens_of_their_parallel_form(stack: str, name: str, seed: int) -> None:
    cost = check_stack(stack, name, seed, 16)
    assert not name.startswith("own") or cost.tokens_per_call > 2.5  # what the target itself drafts is accepted, three deep


@pytest.mark.claims
@pytest.mark.parametrize("name", ON_STACKS)
@pytest.mark.parametrize("stack", STACKS)
def test_every_stack_with_every_drafter(stack: str, name: str, seed: int) -> None:
    for shift in range(5):
        check_stack(stack, name, seed + shift, 60)


@pytest.mark.parametrize("stack", ["mamba2", "linear"])
def test_a_recurrent_state_that_commits_another_branch_is_caught(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = RecurrentState.commit
    monkeypatch.setattr(
        RecurrentState, "commit", lambda state, path, keep: commit(state, torch.arange(path.shape[1]).expand_as(path), keep)
    )
    with pytest.raises(AssertionError):
        check_stack(stack, "own-tree", REVEALING, 16)


def test_plain_decoding_is_the_silent_drafter(seed: int) -> None:
    target = TableModel(VOCAB, seed)
    texts = prompts(8, seed)
    out, cost = tokens_of(target, Silent(), texts, [GREEDY] * 8, max_new_tokens=20)
    assert out == [plain(target, text, GREEDY, 20) for text in texts]
    assert (cost.calls, cost.prefill_calls, cost.tokens, cost.draft_calls) == (8 * 19, 8, 8 * 20, 0)
    assert cost.tokens_per_call == 1.0


@pytest.mark.parametrize("name", DRAFTERS)
def test_requests_of_all_kinds_share_a_batch(name: str, seed: int) -> None:
    target = TableModel(VOCAB, seed)
    drafter = DRAFTERS[name].build(target, lent(target, seed))
    configs = [
        GREEDY,
        SamplingConfig(temperature=1.2),
        PENALISED,
        SamplingConfig(temperature=0.8, top_p=0.7, repetition_penalty=1.2),
    ] * 2
    texts, limits = prompts(8, seed), [3, 17, 9, 30, 1, 2, 25, 12]
    together, _ = tokens_of(target, drafter, texts, configs, max_new_tokens=limits)
    assert [len(row) for row in together] == limits
    for i in (0, 2, 4, 6):
        assert together[i] == plain(target, texts[i], configs[i], limits[i])
    for i, (text, config, limit) in enumerate(zip(texts, configs, limits, strict=True)):
        law, rng = config.build(1, VOCAB), CounterRng.seeded([i])
        steps = [event.payload for event in stream(target, drafter, [text], law, rng, Settings(max_new_tokens=limit))]
        alone = [token for step in steps for token in step.tokens[0, : int(step.count)].tolist()]
        assert alone == together[i]


def test_greedy_verification_follows_the_first_child_that_agrees(seed: int) -> None:
    tokens = torch.tensor([[9, 4, 5, 5, 6, 7, 0], [9, 1, 2, 3, 0, 0, 0]])
    parent = torch.tensor([[-1, 0, 0, 0, 2, 3, -2], [-1, 0, 0, 0, -2, -2, -2]])
    p = torch.tensor([[5, 0, 6, 7, 8, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    verdict = verify(Tree(tokens, parent), p, CounterRng.seeded([seed, seed]))
    assert verdict.keep.tolist() == [3, 1]
    assert verdict.path[0, :3].tolist() == [0, 2, 4]
    assert verdict.next.tolist() == [8, 0]  # row 1: the padding's token 0 agrees and is not accepted
