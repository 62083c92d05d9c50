"""Medusa's identities: fresh heads are the trunk's law, greedily grown trees are the best there are, and typical acceptance."""

from __future__ import annotations

import math
from itertools import combinations, product
from typing import Any

import pytest
import torch
from exactness import chi_square
from sequences import VOCAB, decoder

from fewstep.core.mixer import Tree
from fewstep.core.random import CounterRng
from fewstep.decode.drafters.tree import RankTree, best_tree, expected_tokens, full_tree
from fewstep.decode.typical import verify_typical
from fewstep.decode.verify import verify
from fewstep.nn.medusa import HydraHeadsConfig, MedusaHeadsConfig

FALSE_ALARM = 1e-6


@pytest.mark.parametrize("unembedding", ["own", "shared"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("config", [MedusaHeadsConfig, HydraHeadsConfig])
def test_fresh_heads_have_the_trunks_law(config: Any, layers: int, unembedding: Any) -> None:
    """Section 2.3 of arXiv 2401.10774: blocks begin at zero and unembeddings as the trunk's; attached or built with the model."""
    heads = config(depth=3, layers=layers, unembedding=unembedding)
    trunk = decoder(tied=False)
    trunk.attach(heads)
    built = type(trunk)(trunk.config).double()
    for network in (trunk, built):
        tokens = torch.randint(VOCAB, (2, 8))
        encoded, fresh = network(tokens), network.heads[config.drafter]
        logits = network.unembed(encoded.final)
        for k, h in enumerate(fresh(encoded.final, tokens, network.embed, encoded.context), 1):
            torch.testing.assert_close(fresh.unembed(k, h, network.unembed), logits[:, : 8 - k], rtol=0, atol=1e-12)
    assert len({id(p) for p in trunk.parameters()}) == len(list(trunk.parameters()))


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (3, 2), (2, 3)])
def test_the_best_tree_is_the_best_of_all_trees(shape: tuple[int, int], seed: int) -> None:
    """Against every prefix-closed set of paths of every size."""
    depth, ranks = shape
    accuracies = (torch.rand(depth, ranks, generator=torch.Generator().manual_seed(seed)).double() / ranks).tolist()
    paths = full_tree((ranks,) * depth)
    for nodes in range(1, min(6, len(paths)) + 1):
        grown = best_tree(accuracies, nodes + 1)
        closed = (set(some) for some in combinations(paths, nodes) if all(len(p) == 1 or p[:-1] in some for p in some))
        assert len(grown) == nodes
        assert expected_tokens(accuracies, grown) == pytest.approx(max(expected_tokens(accuracies, tuple(s)) for s in closed))
        assert RankTree(grown).parents == [-1, *(0 if len(p) == 1 else 1 + grown.index(p[:-1]) for p in grown)]
        assert best_tree(accuracies, nodes + 2)[:nodes] == grown  # a budget cuts it to the best smaller tree


def test_the_expected_tokens_are_those_of_independent_depths(seed: int) -> None:
    accuracies = [[0.5, 0.2], [0.4, 0.3]]
    tree = ((0,), (1,), (0, 1))
    assert expected_tokens(accuracies, tree) == pytest.approx(1 + 0.5 + 0.2 + 0.5 * 0.3)
    assert best_tree(accuracies, 4) == ((0,), (0, 0), (1,))
    assert best_tree([[0.5, 0.0], [0.0, 0.0]], 8) == ((0,),)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (((0,), (0,)), "twice"),
        (((0,), ()), "twice, or empty"),
        (((0,), (1, 0)), r"hangs from \(1,\)"),
    ],
)
def test_what_is_no_tree_is_refused(paths: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^drafter.tree: [^\n]*{message}[^\n]*; [^\n]*$"):
        RankTree(paths)


def test_paths_in_any_order_are_a_tree() -> None:
    tree = RankTree(((0, 1), (0,), (2,)))
    assert (tree.parents, tree.ranks, tree.depths, tree.widest) == ([-1, 0, 0, 1], [0, 0, 2, 1], [0, 1, 1, 2], [3, 2])


def typical_path(tree: Tree, p: torch.Tensor, row: int, epsilon: float, delta: float) -> list[int]:
    """The path of equation 2, section 2.3.1, node by node: the longest of accepted tokens, of several the likeliest."""
    parent, tokens = tree.parent[row].tolist(), tree.tokens[row].tolist()
    best, most = [0], (1, 1.0)
    for leaf in range(1, len(parent)):
        path, node = [], leaf
        while node > 0:
            path.insert(0, node)
            node = parent[node]
        mass = 1.0
        for step in path:
            law = p[row, parent[step]].tolist() if parent[step] >= 0 else None
            if law is None:
                break
            entropy = -sum(x * math.log(x) for x in law if x)
            if law[tokens[step]] <= min(epsilon, delta * math.exp(-entropy)):
                break
            mass *= law[tokens[step]]
        else:
            if node == 0 and (len(path) + 1, mass) > most:
                best, most = [0, *path], (len(path) + 1, mass)
    return best


@pytest.mark.parametrize(("epsilon", "delta"), [(0.09, 0.3), (0.3, 0.6), (1.0, 1.0)])
def test_typical_acceptance_is_its_equation(epsilon: float, delta: float, seed: int) -> None:
    rows, vocab = 200, 6
    generator = torch.Generator().manual_seed(seed)
    parent = torch.tensor([[-1, 0, 0, 1, 1, 2, 3, -2]]).expand(rows, -1)
    tokens = torch.randint(vocab, parent.shape, generator=generator)
    p = (2 * torch.randn(rows, 8, vocab, generator=generator)).double().softmax(-1)
    tree = Tree(tokens, parent)
    verdict = verify_typical(tree, p, CounterRng.seeded(range(rows)), epsilon, delta)
    paths = [typical_path(tree, p, row, epsilon, delta) for row in range(rows)]
    assert verdict.keep.tolist() == [len(path) for path in paths]
    assert [verdict.path[i, : len(path)].tolist() for i, path in enumerate(paths)] == paths
    assert len(set(verdict.keep.tolist())) > 1
    assert (verdict.path < 8).all() and (verdict.path >= 0).all()


def test_what_follows_a_typical_path_is_drawn_from_the_target(seed: int) -> None:
    rows = 20_000
    p = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]]).double().expand(rows, -1, -1)
    tree = Tree(torch.tensor([[2, 0]]).expand(rows, -1), torch.tensor([[-1, 0]]).expand(rows, -1))
    verdict = verify_typical(tree, p, CounterRng.seeded(range(seed, seed + rows)))
    assert (verdict.keep == 2).all()
    assert chi_square(verdict.next, p[0, 1]) > FALSE_ALARM


def test_typical_acceptance_keeps_more_than_it_may_and_greedy_nothing_more(seed: int) -> None:
    """It is lossy: a likely token is always kept, where `verify` keeps it with its probability; point masses leave no choice."""
    tree = Tree(torch.tensor([[0, 1]]), torch.tensor([[-1, 0]]))
    p = torch.tensor([[[0.4, 0.35, 0.25]] * 2]).double()
    kept = [[int(rule(tree, p, CounterRng.seeded([i])).keep) for i in range(200)] for rule in (verify, verify_typical)]
    assert set(kept[0]) == {1, 2} and set(kept[1]) == {2}
    tokens = torch.tensor(list(product((3,), (0, 1), (0, 1))))
    tree, best = Tree.chain(tokens), torch.tensor([[1, 0, 2]]).expand(4, -1)
    rng = CounterRng.seeded([seed] * 4)
    exact, typical = verify(tree, best, rng), verify_typical(tree, best, rng)
    assert torch.equal(exact.keep, typical.keep) and torch.equal(exact.next, typical.next)
    assert exact.keep.tolist() == [1, 1, 3, 2]


@pytest.mark.parametrize(("field", "values"), [("epsilon", (0.0, 0.3)), ("delta", (0.09, 1.5))])
def test_thresholds_out_of_range_are_refused(field: str, values: tuple[float, float], seed: int) -> None:
    tree = Tree(torch.tensor([[0, 1]]), torch.tensor([[-1, 0]]))
    with pytest.raises(ValueError, match=rf"^{field}=[^\n]*; [^\n]*$"):
        verify_typical(tree, torch.full((1, 2, 4), 0.25).double(), CounterRng.seeded([seed]), *values)
