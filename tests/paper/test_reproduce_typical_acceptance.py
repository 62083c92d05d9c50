"""Typical acceptance: its deviation from the target's law is computed exactly, and its claim measured on a tiny model."""

from pathlib import Path

import pytest
import torch
from exactness import chi_square
from raced import prompts, small_model
from rich.console import Console
from torch import Tensor

from fewstep.core.mixer import Tree
from fewstep.core.random import CounterRng
from fewstep.decode.drafters.medusa import MedusaConfig
from fewstep.decode.drafters.silent import Silent
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.decode.typical import verify_typical
from fewstep.decode.verify import verify
from fewstep.nn.medusa import MedusaHeadsConfig
from fewstep.report.claims import CLAIMS
from fewstep.report.claims.claim import Bench, Effort
from fewstep.report.claims.typical_acceptance import Deviations, told

DRAWS = 20_000
FALSE_ALARM = 1e-6
LIKED = (0.02, 0.5, 0.08, 0.4)  # exp(-entropy) is near 0.36: token 1 is kept, token 0 is not


@pytest.mark.parametrize("drafted", [1, 0])
def test_the_deviation_of_the_next_token_is_that_of_many_draws(drafted: int, seed: int) -> None:
    """0.5 for a token of probability 0.5 that is always kept, 0 where nothing is: the law of 20000 draws says the same."""
    p = torch.tensor(LIKED, dtype=torch.float64)
    tree = Tree(torch.tensor([[3, drafted]]), torch.tensor([[-1, 0]]))
    noted = Deviations()
    noted(tree, p.expand(1, 2, -1), CounterRng.seeded([seed]))
    assert noted.first == pytest.approx([0.5 if drafted else 0.0])
    tokens = first_tokens(tree, p, seed)
    if drafted:
        law = torch.bincount(tokens, minlength=4) / len(tokens)
        assert float((law - p).abs().sum()) / 2 == pytest.approx(noted.first[0])
    else:
        assert chi_square(tokens, p) > FALSE_ALARM


def first_tokens(tree: Tree, p: Tensor, seed: int) -> Tensor:
    many = Tree(tree.tokens.expand(DRAWS, -1), tree.parent.expand(DRAWS, -1))
    rng = CounterRng.seeded([seed]).fork(torch.zeros(DRAWS, dtype=torch.int64)).at(torch.arange(DRAWS))
    verdict = verify_typical(many, p.expand(DRAWS, tree.size, -1), rng)
    return torch.where(verdict.keep > 1, many.tokens[:, 1], verdict.next)


def test_every_kept_token_counts_and_the_drawn_one_is_exact(seed: int) -> None:
    p = torch.tensor([LIKED, (0.9, 0.04, 0.04, 0.02), LIKED, LIKED], dtype=torch.float64)
    chain = Tree(torch.tensor([[3, 1, 0, 0]]), torch.tensor([[-1, 0, 1, 2]]))
    noted = Deviations()
    noted(chain, p.unsqueeze(0), CounterRng.seeded([seed]))
    assert noted.all == pytest.approx([0.5, 0.1, 0.0]), "1 and 0 kept, the second 0 not"
    assert noted.first == pytest.approx([0.5])
    assert told(noted.all) == {"mean": pytest.approx(0.2), "max": pytest.approx(0.5), "contexts": 3}


def test_the_text_is_that_of_whoever_judges(seed: int) -> None:
    model = small_model()
    model.network.attach(MedusaHeadsConfig(depth=2))
    drafter = MedusaConfig(branching=(3, 1)).build(model.network, lambda path: model.network)
    assert model.tokenizer is not None
    ids = [model.tokenizer.encode(prompt.prompt) for prompt in prompts()]
    warm = SamplingConfig(temperature=0.7)
    for follow, judge in ((None, verify_typical), (verify, verify)):
        noted = Deviations(follow)
        found, expected = (
            decode(model.network, drafter, ids, Settings(24, verify=one), sampling=warm, seed=seed) for one in (noted, judge)
        )
        assert [row.tokens for row in found] == [row.tokens for row in expected]
        steps = sum(row.cost.calls + 1 for row in found)  # the first token comes with the prompt
        assert len(noted.first) == steps
        if follow is None:
            assert len(noted.all) == 3 * 24 and noted.all.count(0.0) >= steps
        assert min(noted.all) >= 0 and max(noted.all) < 1


def test_nothing_drafted_is_no_deviation(seed: int) -> None:
    model, noted = small_model(), Deviations()
    decode(model.network, Silent(), [[1, 2, 3]], Settings(8, verify=noted), sampling=SamplingConfig(temperature=1.0), seed=seed)
    assert noted.all == noted.first == [0.0] * 8


def test_every_criterion_is_found(tmp_path: Path) -> None:
    model = small_model()
    model.network.attach(MedusaHeadsConfig(depth=3))
    effort = Effort(count=2, max_new_tokens=12, rounds=1)
    bench = Bench(model, None, prompts(2), effort, tmp_path / "scratch", Console(quiet=True), tmp_path / "kept")
    claim = CLAIMS["typical-acceptance"]
    found = list(claim.measure(bench))
    assert tuple(one.criterion for one in found) == claim.criteria
    by_name = {one.criterion.name: one for one in found}
    assert all(one.value is not None for one in found)
    numbers = by_name["total-variation"].numbers["temperature 0.7"]["own text"]
    assert numbers["mean"] == by_name["total-variation"].value and numbers["contexts"] == 2 * 12
    assert f"largest {numbers['max']:.3f}" in by_name["total-variation"].how
