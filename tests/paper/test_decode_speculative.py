"""Published numbers of speculative sampling, met on a model that can be enumerated."""

import torch
from scipy.stats import norm
from toys import TableModel

from fewstep.decode.drafters.draft_model import DraftModel, DraftModelConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings

VOCAB = 6


def test_tokens_per_call_follow_the_acceptance_rate(seed: int) -> None:
    """Leviathan et al. 2023, arXiv 2211.17192, eq. 1: E[tokens] = (1 - a^(g+1)) / (1 - a), where every draft is accepted with a.

    A law that ignores its history makes acceptances independent, and a = sum min(p, q) exact (corollary 3.6).
    """
    target, draft = TableModel(VOCAB, seed), TableModel(VOCAB, seed + 1)
    for model in (target, draft):
        model.table.copy_(model.table[0, 0, 0, 0].expand_as(model.table))
    p, q = target.table[0, 0, 0, 0].softmax(-1), draft.table[0, 0, 0, 0].softmax(-1)
    rate, depth, rows, tokens = float(torch.minimum(p, q).sum()), 3, 400, 60
    drafter = DraftModel(DraftModelConfig(branching=(1,) * depth), draft, target)
    done = decode(target, drafter, [[1]], Settings(tokens), sampling=SamplingConfig(temperature=1.0), seed=seed, samples=rows)
    # the last calls have smaller trees: leave them out
    per_call = torch.tensor([accepted + 1 for row in done for accepted in row.accepted[: (tokens - 8) // (depth + 1)]]).double()
    expected = (1 - rate ** (depth + 1)) / (1 - rate)
    deviation = (per_call.mean() - expected) / (per_call.std() / len(per_call) ** 0.5)
    assert 2 * norm.sf(abs(float(deviation))) > 1e-6


def test_prompt_lookup_copies_what_it_has_seen(seed: int) -> None:
    """Saxena 2023: where output repeats input, almost every call emits the whole draft."""
    target = TableModel(VOCAB, seed)
    period = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))
    target.table.zero_()
    target.table[:, period, :, :, period.roll(-1)] = 10.0  # a cycle through all tokens
    prompt = period.repeat(2).tolist()
    done = decode(target, NgramConfig(depth=7).build(target, lambda path: target), [prompt], Settings(81))[0]
    assert done.tokens == period.repeat(14).tolist()[:81]
    assert done.cost.tokens_per_call == 8.0
