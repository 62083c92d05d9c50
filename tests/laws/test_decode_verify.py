"""The verifier alone: acceptance rates, residuals, degenerate laws, and independence of padding."""

import pytest
import torch
from exactness import chi_square
from torch import Tensor

from fewstep.core.mixer import Tree
from fewstep.core.random import CounterRng
from fewstep.decode.verify import draw, verify

DRAWS = 20_000
V = 6


def random_law(seed: int, *shape: int) -> Tensor:
    return (2 * torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed)).double()).softmax(-1)


def batch(tree: Tree) -> Tree:
    q = None if tree.q is None else tree.q.expand(DRAWS, -1, -1)
    return Tree(tree.tokens.expand(DRAWS, -1), tree.parent.expand(DRAWS, -1), q)


def seeds(seed: int, count: int = DRAWS) -> CounterRng:
    return CounterRng.seeded(range(seed, seed + count))


def first_token(tree: Tree, p: Tensor, rng: CounterRng) -> Tensor:
    """The token after the root, accepted or drawn."""
    verdict = verify(tree, p, rng)
    accepted = tree.tokens.gather(1, verdict.path[:, 1:2]).squeeze(1)
    return torch.where(verdict.keep > 1, accepted, verdict.next)


def test_chosen_siblings_are_accepted_with_their_probability(seed: int) -> None:
    tree = batch(Tree(torch.tensor([[0, 3, 3, 1]]), torch.tensor([[-1, 0, 0, 0]])))  # a duplicate among them
    p = random_law(seed, 1, 4)
    verdict = verify(tree, p.expand(DRAWS, -1, -1), seeds(seed))
    outcome = torch.where(verdict.keep == 1, 0, verdict.path[:, 1])
    law = torch.stack([1 - p[0, 0, 3] - p[0, 0, 1], p[0, 0, 3], torch.tensor(0.0), p[0, 0, 1]])
    assert chi_square(outcome, law) > 1e-6  # the duplicate (node 2) never: its token is gone
    assert not bool(torch.isin(verdict.next[verdict.keep == 1], torch.tensor([1, 3])).any())
    assert chi_square(first_token(tree, p.expand(DRAWS, -1, -1), seeds(seed)), p[0, 0]) > 1e-6


def test_a_drawn_node_is_accepted_as_often_as_the_laws_overlap(seed: int) -> None:
    p, q = random_law(seed, 2), random_law(seed + 1, 1)[0]
    token = draw(q.expand(DRAWS, -1), seeds(seed).split("draft").uniform(1)[:, 0])
    tree = Tree(torch.stack([torch.zeros_like(token), token], 1), torch.tensor([[-1, 0]]).expand(DRAWS, -1))
    laws = torch.stack([torch.zeros(V).double(), q]).expand(DRAWS, -1, -1)
    verdict = verify(Tree(tree.tokens, tree.parent, laws), p.expand(DRAWS, -1, -1), seeds(seed))
    overlap = torch.minimum(p[0], q).sum()
    assert chi_square(verdict.keep - 1, torch.stack([1 - overlap, overlap])) > 1e-6
    residual = (p[0] - q).clamp(min=0)
    assert chi_square(verdict.next[verdict.keep == 1], residual / residual.sum()) > 1e-6
    assert chi_square(verdict.next[verdict.keep == 2], p[1]) > 1e-6


def test_impossible_tokens_are_never_emitted(seed: int) -> None:
    p = torch.zeros(3, V).double()
    p[:, 2], p[:, 4] = 0.25, 0.75
    tree = batch(Tree(torch.tensor([[0, 1, 5]]), torch.tensor([[-1, 0, 0]])))
    emitted = first_token(tree, p.expand(DRAWS, -1, -1), seeds(seed))
    assert set(emitted.tolist()) == {2, 4}
    assert chi_square(emitted, p[0]) > 1e-6


@pytest.mark.parametrize("drawn", [False, True])
def test_a_point_mass_is_always_accepted_when_drafted(drawn: bool, seed: int) -> None:
    p = torch.zeros(2, V).double()
    p[0, 3], p[1, 5] = 1.0, 1.0
    q = torch.zeros(1, 2, V).double()
    q[0, 1, 3] = 1.0
    tree = batch(Tree(torch.tensor([[0, 3]]), torch.tensor([[-1, 0]]), q if drawn else None))
    verdict = verify(tree, p.expand(DRAWS, -1, -1), seeds(seed))
    assert bool((verdict.keep == 2).all()) and bool((verdict.next == 5).all())


def test_equal_laws_are_always_accepted_and_leave_finite_residuals(seed: int) -> None:
    p = random_law(seed, 2)
    token = draw(p[0].expand(DRAWS, -1), seeds(seed).split("draft").uniform(1)[:, 0])
    tokens = torch.stack([torch.zeros_like(token), token], 1)
    q = torch.stack([torch.zeros(V).double(), p[0]]).expand(DRAWS, -1, -1)
    verdict = verify(Tree(tokens, torch.tensor([[-1, 0]]).expand(DRAWS, -1), q), p.expand(DRAWS, -1, -1), seeds(seed))
    assert bool((verdict.keep == 2).all())


def test_padding_and_company_change_nothing(seed: int) -> None:
    p, count = random_law(seed, 300, 5), 300
    tokens = torch.randint(V, (count, 5), generator=torch.Generator().manual_seed(seed))
    parent = torch.tensor([[-1, 0, 0, 1, 1]]).expand(count, -1)
    verdict = verify(Tree(tokens, parent), p, seeds(seed, count))
    wide = Tree(torch.cat([tokens, tokens], 1), torch.cat([parent, torch.full_like(parent, -2)], 1))
    padded = verify(wide, torch.cat([p, p], 1), seeds(seed, count))
    assert torch.equal(padded.keep, verdict.keep) and torch.equal(padded.next, verdict.next)
    for row in range(0, count, 37):
        alone = verify(Tree(tokens[row : row + 1], parent[row : row + 1]), p[row : row + 1], seeds(seed + row, 1))
        keep = int(alone.keep)
        assert keep == int(verdict.keep[row]) and int(alone.next) == int(verdict.next[row])
        assert alone.path[0, :keep].tolist() == verdict.path[row, :keep].tolist() == padded.path[row, :keep].tolist()
        assert int(alone.path.max()) < 5


def test_draws_have_their_law_and_avoid_zeros(seed: int) -> None:
    weight = torch.tensor([0.0, 2.0, 0.0, 1.0, 5.0, 0.0]).double()
    tokens = draw(weight.expand(DRAWS, -1), seeds(seed).uniform(1)[:, 0])
    assert chi_square(tokens, weight / weight.sum()) > 1e-6
    edges = torch.tensor([0.0, 1 - 2.0**-53]).double()
    assert draw(weight.expand(2, -1), edges).tolist() == [1, 4]
