"""The loop's promises: ends, limits, costs, provenance, logits, reviews, samples, and refusals before any work."""

from typing import Any

import pytest
import torch
from toys import TableModel

from fewstep.core.mixer import Tree
from fewstep.core.random import CounterRng
from fewstep.decode.drafters.draft_model import DraftModel, DraftModelConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.silent import Silent
from fewstep.decode.generate import Transcripts, decode, requests, row_seed
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.narrate import Narrator
from fewstep.decode.prefill import prefill
from fewstep.decode.stream import Settings, Step

VOCAB = 8
PROMPT = [1, 2, 3, 1, 2, 3, 1]
WARM = SamplingConfig(temperature=1.0)


def pair(seed: int) -> tuple[TableModel, DraftModel]:
    target = TableModel(VOCAB, seed)
    draft = TableModel(VOCAB, seed + 1, like=target, near=0.9)
    return target, DraftModel(DraftModelConfig(branching=(2, 1, 1)), draft, target)


def test_an_end_token_ends_a_row_even_inside_an_accepted_path(seed: int) -> None:
    target, drafter = pair(seed)
    free = decode(target, Silent(), [PROMPT], Settings(64), sampling=WARM, seed=seed, samples=16)
    end = free[0].tokens[5]
    cut = decode(target, Silent(), [PROMPT], Settings(64, eos=(end,)), sampling=WARM, seed=seed, samples=16)
    for before, after in zip(free, cut, strict=True):
        stop = before.tokens.index(end) + 1 if end in before.tokens else 64
        assert after.tokens == before.tokens[:stop]
        assert after.finish == ("eos" if end in before.tokens else "length")
    drafted = decode(target, drafter, [PROMPT], Settings(64, eos=(end,)), sampling=WARM, seed=seed, samples=64)
    assert all(done.tokens.count(end) == (done.finish == "eos") for done in drafted)
    assert any(done.drafted[-1] for done in drafted if done.finish == "eos")  # the case in question did occur


def test_every_row_emits_exactly_what_it_may(seed: int) -> None:
    target, drafter = pair(seed)
    limits = list(range(1, 13))
    done = decode(target, drafter, [PROMPT] * 12, Settings(limits), sampling=WARM, seed=range(12))
    assert [len(row.tokens) for row in done] == limits
    assert {row.finish for row in done} == {"length"}


def test_costs_add_up(seed: int) -> None:
    target, drafter = pair(seed)
    events = list(requests(target, drafter, [PROMPT, PROMPT[:3]], Settings(20), sampling=WARM, seed=seed, samples=3))
    total = events[-1].cost
    transcripts = Transcripts(6)
    for event in events:
        transcripts.take(event)
    rows = transcripts.completions()
    for name in ("calls", "draft_calls", "prefill_calls", "tokens"):
        assert getattr(total, name) == sum(getattr(row.cost, name) for row in rows)
    assert total.prefill_calls == 6 and total.tokens == 120 and total.bytes > 0
    for row in rows:
        assert len(row.accepted) == row.cost.calls
        assert len(row.drafted) == len(row.tokens) == 20
        assert sum(row.accepted) == sum(row.drafted)
        # every call emits its accepted drafts and one token more, and so does the prompt
        assert sum(row.accepted) + row.cost.calls + 1 == 20
    assert target.calls == len(events)  # one evaluation per step for all rows, one for both prompts


def test_trees_respect_the_budget_of_each_row(seed: int) -> None:
    target, drafter = pair(seed)
    limits = [4, 30]
    for event in requests(target, drafter, [PROMPT] * 2, Settings(limits, budget=6), sampling=WARM, seed=[1, 2]):
        for row, nodes in zip(event.payload.rows.tolist(), event.payload.nodes.tolist(), strict=True):
            assert nodes <= min(6, limits[row])


@pytest.mark.parametrize("sampling", [SamplingConfig(), WARM])
def test_kept_logits_are_those_each_token_was_drawn_from(sampling: SamplingConfig, seed: int) -> None:
    target, drafter = pair(seed)
    done = decode(target, drafter, [PROMPT, [4]], Settings(20, keep_logits=True), sampling=sampling, seed=seed, samples=2)
    for i, row in enumerate(done):
        assert row.logits is not None and row.logits.shape == (20, VOCAB)
        text = list((PROMPT, [4])[i // 2])
        for token, logits in zip(row.tokens, row.logits.tolist(), strict=True):
            assert logits == target.after(text)
            text.append(token)


def test_samples_share_the_prompt_and_nothing_else(seed: int) -> None:
    target, drafter = pair(seed)
    done = decode(target, drafter, [PROMPT, [5, 6]], Settings(40), sampling=WARM, seed=[seed, seed + 1], samples=5)
    assert len({tuple(row.tokens) for row in done}) == 10
    alone = decode(target, drafter, [[5, 6]], Settings(40), sampling=WARM, seed=seed + 1, samples=2)
    assert [row.tokens for row in alone] == [row.tokens for row in done[5:7]]
    assert row_seed(seed, 0) != row_seed(seed, 1) != row_seed(seed + 1, 1)


def test_a_review_may_end_rows_early(seed: int) -> None:
    target, drafter = pair(seed)

    class Words:
        """Stands in for a tokenizer: token n is the n-th letter."""

        def stream(self) -> "Words":
            return self

        def push(self, token: int) -> str:
            return "abcdefgh"[token]

        def flush(self) -> str:
            return "."

    free = decode(target, drafter, [PROMPT], Settings(40), sampling=WARM, seed=seed, samples=12)
    spelled = ["".join("abcdefgh"[token] for token in row.tokens) for row in free]
    stop = spelled[0][7:9]
    words: Any = Words()
    narrator = Narrator(words, 12, [stop])
    pieces = dict.fromkeys(range(12), "")
    transcripts = Transcripts(12)
    for event in requests(target, drafter, [PROMPT], Settings(40), sampling=WARM, seed=seed, samples=12, review=narrator):
        transcripts.take(event)
        for piece in narrator.pieces():
            pieces[piece.row] += piece.text
    for row, (text, done) in enumerate(zip(spelled, transcripts.completions(), strict=True)):
        if stop in text:
            assert narrator.text(row) == pieces[row] == text[: text.index(stop)]
            assert done.finish == "stop" and len(done.tokens) == text.index(stop) + len(stop)
        else:
            assert narrator.text(row) == pieces[row] == text + "."
            assert done.finish == "length"
    assert stop in spelled[0]


def test_narration_says_which_tokens_were_drafted(seed: int) -> None:
    target, drafter = pair(seed)
    seen: list[Step] = []

    def review(step: Step) -> Step:
        seen.append(step)
        return step

    done = decode(target, drafter, [PROMPT], Settings(30), sampling=WARM, seed=seed, review=review)[0]
    flags = [j < int(step.drafted) for step in seen for j in range(int(step.count))]
    assert flags == done.drafted and any(flags) and not all(flags)


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_prompts_in_chunks_are_prompts(chunk: int, seed: int) -> None:
    target = TableModel(VOCAB, seed)
    prompts = [PROMPT, [2], [3, 4, 5, 6]]
    padded = torch.tensor([prompt + [0] * (7 - len(prompt)) for prompt in prompts])
    chain = Tree.chain(padded, torch.tensor([7, 1, 4]))
    done = prefill(target, chain, target.init_state(3, 8, device="cpu", dtype=torch.float64), ("embed",), chunk)
    assert done.logits.tolist() == [target.after(prompt) for prompt in prompts]
    assert done.hidden["embed"].shape == (3, 7, VOCAB)
    root = target.extend(Tree.chain(torch.tensor([[1], [1], [1]])), done.state)
    assert root.logits is not None and root.logits[:, 0].tolist() == [target.after([*prompt, 1]) for prompt in prompts]


@pytest.mark.parametrize(
    ("prompts", "settings", "field"),
    [
        ([], {}, "prompts"),
        ([[1], []], {"max_new_tokens": 4}, r"prompts\[1\]=\[\]"),
        ([[1, 99]], {"max_new_tokens": 4}, r"prompts\[0\].*99.*0\.\.7"),
        ([[1, -1]], {"max_new_tokens": 4}, r"prompts\[0\].*-1.*0\.\.7"),
        ([[1] * 30], {"max_new_tokens": 11}, "30 tokens and max_new_tokens=11 exceed the context of 40.*at most 10"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"max_new_tokens": [1, 2]}, "max_new_tokens"),
        ([[1]], {"budget": 0}, "budget=0"),
    ],
)
def test_bad_requests_are_refused_before_any_work(prompts: list[list[int]], settings: dict[str, Any], field: str) -> None:
    target = TableModel(VOCAB, 0)
    target.max_positions = 40
    with pytest.raises(ValueError, match=field) as error:
        decode(target, Silent(), prompts, Settings(**settings))
    assert "\n" not in str(error.value) and target.calls == 0


def test_a_full_context_is_used_to_its_last_token(seed: int) -> None:
    target, drafter = pair(seed)
    target.max_positions = drafter.model.max_positions = 40
    for each in (Silent(), drafter, NgramConfig(min_ngram=1, branches=2).build(target, lambda path: target)):
        assert len(decode(target, each, [[1] * 30], Settings(10))[0].tokens) == 10


def test_drafters_that_do_not_fit_are_refused(seed: int) -> None:
    target = TableModel(VOCAB, seed)
    with pytest.raises(ValueError, match=r"path=''"):
        DraftModelConfig().build(target, lambda path: target)
    with pytest.raises(ValueError, match=r"'other': a vocabulary of 5 tokens, the target's has 8"):
        DraftModelConfig(path="other").build(target, lambda path: TableModel(5, seed))
    with pytest.raises(ValueError, match=r"branching=\(9,\)"):
        DraftModelConfig(path="other", branching=(9,)).build(target, lambda path: target)
    short = TableModel(VOCAB, seed)
    short.max_positions = 20
    with pytest.raises(ValueError, match=r"'short': a context of 20 tokens"):
        decode(target, DraftModelConfig(path="short").build(target, lambda path: short), [[1] * 10], Settings(10, budget=1))
    with pytest.raises(ValueError, match="min_ngram"):
        NgramConfig(min_ngram=5, max_ngram=2)


def test_rows_of_drafters_fork_and_join(seed: int) -> None:
    target, drafter = pair(seed)
    ngram = NgramConfig(min_ngram=1, depth=4).build(target, lambda path: target)
    prompts = torch.tensor([[1, 2, 3, 1, 2], [4, 5, 4, 0, 0], [6, 6, 6, 6, 0]])
    lengths = torch.tensor([5, 3, 4])
    roots = torch.tensor([3, 5, 6])

    class Loan:
        """A handle that lends nothing but the law."""

        def __init__(self, rows: int) -> None:
            self.law = SamplingConfig(temperature=1.0).build(rows, VOCAB)

        def charge(self, calls: int) -> None: ...

    def propose(each: Any, state: Any, rows: Any) -> Tree:
        loan: Any = Loan(len(rows))
        rng = CounterRng.seeded([seed, seed + 1, seed + 2]).fork(rows)
        return each.propose(roots[rows], state, loan, torch.full((len(rows),), 9), rng)[0]

    for each in (ngram, drafter):
        whole = propose(each, each.init(Tree.chain(prompts, lengths), {}, 20), torch.arange(3))
        rows = torch.tensor([2, 0])
        forked = propose(each, each.init(Tree.chain(prompts, lengths), {}, 20).fork(rows), rows)
        first = each.init(Tree.chain(prompts[:1], lengths[:1]), {}, 20)
        joined = propose(each, first.join(each.init(Tree.chain(prompts[1:, :4], lengths[1:]), {}, 16)), torch.arange(3))
        assert torch.equal(forked.tokens * forked.valid, (whole.tokens * whole.valid)[rows])
        assert torch.equal(joined.tokens * joined.valid, whole.tokens * whole.valid)
        assert torch.equal(joined.parent, whole.parent)


def test_the_consumer_of_the_stream_keeps_its_own_mode(seed: int) -> None:
    target, drafter = pair(seed)
    for event in requests(target, drafter, [PROMPT], Settings(6)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert event.payload.tokens.is_inference()
