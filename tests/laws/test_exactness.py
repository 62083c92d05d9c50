"""The exactness test that users run: a correct drafter passes, planted bugs and a biased verifier fail, with the stated power."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from scipy.stats import chi2, ncx2
from test_decode_exact import FALSE_ALARM, VOCAB, Buggy, models
from torch import Tensor
from toys import TableModel

from fewstep.core.draft import Verdict
from fewstep.core.mixer import Tree
from fewstep.core.random import Rng
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.early_exit import EarlyExitConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.silent import Silent
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.decode.verify import verify
from fewstep.report.certificate import same_bits
from fewstep.report.exactness import ExactnessConfig, certify, liveliest
from fewstep.report.power import Outcome, draws_needed, exceedance, goodness_of_fit, noncentrality

CONTEXTS = ([1, 2, 0, 1, 2, 0, 1], [3, 0, 2, 2, 1])
MANY = [[a, b, c] for a in range(2) for b in range(3) for c in range(4)]  # a bug need not show everywhere
WARM = SamplingConfig(temperature=0.8)
SMALL = ExactnessConfig(draws=30_000, alarm=FALSE_ALARM)
HONEST: Mapping[str, DrafterConfig] = {
    "ngram": NgramConfig(min_ngram=1, depth=3, branches=2),
    "draft-chain": DraftModelConfig(path="near", branching=(1, 1)),
    "draft-tree": DraftModelConfig(path="near", branching=(3, 2)),
    "exit": EarlyExitConfig(layers=1, branching=(2, 1)),
}


def biased(tree: Tree, p: Tensor, rng: Rng) -> Verdict:
    """`verify` against a law that has moved a total variation of 0.01 from the likeliest token to the others."""
    best = p.argmax(-1, keepdim=True)
    rest = p.scatter(-1, best, 0.0)
    moved = p + 0.01 * rest / rest.sum(-1, keepdim=True)
    return verify(tree, moved.scatter_add(-1, best, torch.full_like(p[..., :1], -0.01)), rng)


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("law", [WARM, SamplingConfig(temperature=1.2, top_p=0.9, repetition_penalty=1.3)])
def test_a_correct_drafter_passes(name: str, law: SamplingConfig, seed: int) -> None:
    target, draft = models(seed)
    found = certify(
        target, HONEST[name].build(target, lambda path: draft), CONTEXTS, law, SMALL.model_copy(update={"seed": seed})
    )
    assert found.passed(SMALL)
    assert found.evaluation < 1e-12
    assert found.first.draws >= 30_000
    assert found.first.freedom > 2
    assert found.second.draws > 1_000 or name == "ngram"


@pytest.mark.parametrize("bug", ["argmax", "dropped", "block"])
def test_planted_bugs_fail(bug: str, seed: int) -> None:
    target, _ = models(seed)
    drafter: Any = Buggy(bug, seed)
    found = certify(target, drafter, MANY, WARM, SMALL.model_copy(update={"contexts": len(MANY), "draws": 120_000}))
    assert not found.passed(SMALL)
    if bug == "block":  # the first token is right: only its successor's law was misstated
        assert found.first.p_value > FALSE_ALARM > found.second.p_value


def test_a_verifier_that_is_off_by_one_in_a_hundred_fails(seed: int) -> None:
    """With 300,000 draws the noncentrality is at least 120 at 8 degrees of freedom: missed once in 10^7."""
    target, draft = models(seed)
    drafter = HONEST["ngram"].build(target, lambda path: draft)
    config = ExactnessConfig(draws=300_000, alarm=FALSE_ALARM, seed=seed)
    assert not certify(target, drafter, CONTEXTS, WARM, config, biased).passed(config)
    assert certify(target, drafter, CONTEXTS, WARM, config).passed(config)


def test_a_tree_call_of_another_law_is_seen(seed: int) -> None:
    class Wavering(TableModel):
        """Answers differently when it is asked about several tokens at once."""

        def extend(self, tree: Tree, state: Any, **options: Any) -> Any:
            output = super().extend(tree, state, **options)
            if tree.size > 1 and output.logits is not None:
                output.logits.mul_(0.8)
            return output

    target = Wavering(VOCAB, seed)
    found = certify(target, Silent(), CONTEXTS, WARM, SMALL)
    assert found.evaluation > 0.01
    assert not found.passed(SMALL)


def test_chosen_trees_serve_several_draws_with_numbers_of_their_own(seed: int) -> None:
    target, _ = models(seed)
    found = certify(target, Silent(), CONTEXTS, WARM, SMALL)
    assert found.passed(SMALL)
    assert found.second.draws == 0


def test_many_tokens_share_a_cell(seed: int) -> None:
    torch.manual_seed(seed)
    law = torch.rand(4, 200, dtype=torch.float64).softmax(-1)
    heads = law[0].topk(63).indices
    from_parts = torch.cat([law[:, heads], (law.sum(1) - law[:, heads].sum(1)).unsqueeze(1)], 1)
    draws = torch.multinomial(from_parts[0], 40_000, replacement=True, generator=torch.Generator().manual_seed(seed))
    counts = torch.bincount(draws, minlength=64)
    assert goodness_of_fit([counts], [from_parts[0]]).p_value > FALSE_ALARM
    assert goodness_of_fit([counts], [from_parts[0].flip(0)]).p_value < FALSE_ALARM


def test_an_impossible_outcome_fails() -> None:
    law = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    assert goodness_of_fit([torch.tensor([50, 49, 1])], [law]).p_value == 0
    assert goodness_of_fit([torch.tensor([50, 50, 0])], [law]).p_value > 0.5


@pytest.mark.parametrize(("freedom", "shift"), [(1, 0.0), (3, 2.5), (63, 90.0), (252, 152.0), (1008, 3000.0)])
def test_chances_agree_with_scipy(freedom: int, shift: float) -> None:
    for point in (0.5 * freedom, freedom + shift, freedom + shift + 4 * (freedom + 2 * shift) ** 0.5):
        expected = ncx2.sf(point, freedom, shift) if shift else chi2.sf(point, freedom)
        assert exceedance(point, freedom, shift) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    needed = noncentrality(freedom, 1e-3, 0.99)
    assert ncx2.sf(chi2.isf(1e-3, freedom), freedom, needed) == pytest.approx(0.99, abs=1e-6)


def test_draws_and_what_they_see_are_each_others_inverse() -> None:
    draws = draws_needed(126, 0.01, 1e-3 / 3, 0.99)
    assert Outcome(126.0, 126, 0.5, draws).detectable(1e-3 / 3, 0.99) == pytest.approx(0.01, rel=1e-4)
    assert draws_needed(126, 0.02, 1e-3 / 3, 0.99) < draws / 3


def test_the_liveliest_contexts_are_taken(seed: int) -> None:
    target, _ = models(seed)
    named = {str(i): [i % VOCAB, (2 * i) % VOCAB, 1, i % 3] for i in range(12)}
    chosen = liveliest(target, named, WARM, 3)

    def entropy(tokens: Any) -> float:
        law = (torch.tensor(target.after(list(tokens))) / 0.8).softmax(-1)
        return float(torch.special.entr(law).sum())

    assert list(chosen) == sorted(named, key=lambda name: -entropy(named[name]))[:3]


def test_greedy_bits_are_compared_and_the_first_difference_is_named(seed: int) -> None:
    target, draft = models(seed)
    prompts = {"one": [1, 2, 0], "two": [2, 1, 1, 0]}
    same = same_bits(target, HONEST["draft-tree"].build(target, lambda path: draft), prompts, Settings(12), "float64")
    assert same.passed
    assert (same.prompts, same.tokens, same.logits, same.difference) == (2, 2, 2, "")

    class Tilted(TableModel):
        def extend(self, tree: Tree, state: Any, **options: Any) -> Any:
            output = super().extend(tree, state, **options)
            if tree.size > 1 and output.logits is not None and options.get("need") is None:
                output.logits.add_(1e-9)
            return output

    tilted = Tilted(VOCAB, seed)
    same = same_bits(tilted, HONEST["draft-tree"].build(tilted, lambda path: draft), prompts, Settings(12), "float64")
    assert not same.passed
    assert (same.tokens, same.logits) == (2, 0)
    assert same.difference.startswith("one: logits of token ")


@pytest.mark.parametrize(
    ("sampling", "contexts", "names"), [(SamplingConfig(), CONTEXTS, "temperature"), (WARM, [[1, 2]], "contexts")]
)
def test_what_cannot_be_tested_is_refused(sampling: SamplingConfig, contexts: Any, names: str, seed: int) -> None:
    target, _ = models(seed)
    with pytest.raises(ValueError, match=names):
        certify(target, Silent(), contexts, sampling, SMALL)


@pytest.mark.claims
def test_alarms_and_power_are_as_stated(seed: int) -> None:
    """2,000 tests each of a law and of one at a total variation of 0.02, at the number of draws that is said to see it."""
    generator = torch.Generator().manual_seed(seed)
    law = torch.rand(64, dtype=torch.float64, generator=generator).softmax(-1)
    draws = draws_needed(63, 0.02, 0.01, 0.9)
    sign = torch.where(law.cumsum(0) < 0.5, 1.0, -1.0)
    other = law + 0.02 * torch.where(sign > 0, law / law[sign > 0].sum(), -law / law[sign < 0].sum())
    alarms, seen = (
        sum(
            goodness_of_fit([torch.bincount(torch.multinomial(p, draws, True, generator=generator), minlength=64)], [law]).p_value
            < 0.01
            for _ in range(2000)
        )
        for p in (law, other)
    )
    assert alarms < 20 + 5 * 20**0.5
    assert seen > 1800 - 5 * 180**0.5
