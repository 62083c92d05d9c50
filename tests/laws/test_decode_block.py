"""Block verification: by enumeration its emitted tokens have the target's law, and it never keeps fewer than token by token."""

from itertools import product

import pytest
import torch
from exactness import chi_square
from torch import Tensor

from fewstep.core.mixer import Tree
from fewstep.core.random import CounterRng
from fewstep.decode.block import passing, verify_block
from fewstep.decode.verify import verify

V, DEPTH = 3, 3
KINDS = ("drawn", "stopped", "chosen", "mixed", "equal", "pointed")


class Laws:
    """A target's and a draft's next-token laws over `V` tokens by path, with a draft that may stop or choose.

    `q[path]` is the law of the node after `path`, all zero where the node is chosen (then it is `choice[path]`); a path in
    `stops` has no node after it.
    """

    def __init__(self, kind: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        paths = [path for length in range(DEPTH + 1) for path in product(range(V), repeat=length)]
        self.p, self.q = (
            {path: (1.5 * torch.randn(V, generator=generator).double()).softmax(-1) for path in paths} for _ in range(2)
        )
        self.choice = {path: int(torch.randint(V, (1,), generator=generator)) for path in paths}
        self.stops = {path for path in paths if kind == "stopped" and path and float(self.q[path].max()) < 0.6}
        for path in paths:
            if kind == "chosen" or (kind == "mixed" and len(path) == 1):
                self.q[path] = torch.zeros(V).double()
            if kind == "equal" and len(path) != 1:
                self.q[path] = self.p[path]
            if kind == "pointed" and len(path) == 1:
                self.p[path] = torch.eye(V).double()[self.choice[path]]

    def chains(self) -> list[tuple[tuple[int, ...], float]]:
        """Every chain that may be drafted, with its probability."""
        done, open_ends = [], [((), 1.0)]
        while open_ends:
            path, mass = open_ends.pop()
            if len(path) == DEPTH or path in self.stops:
                done.append((path, mass))
            elif not self.q[path].any():
                open_ends.append(((*path, self.choice[path]), mass))
            else:
                open_ends += [((*path, x), mass * float(self.q[path][x])) for x in range(V)]
        return done

    def tree(self, path: tuple[int, ...]) -> tuple[Tree, Tensor]:
        """The chain of one row, padded to `DEPTH`, and the target's laws at its nodes."""
        valid = torch.arange(DEPTH + 1) <= len(path)
        tokens = torch.tensor([[0, *path, *(0,) * (DEPTH - len(path))]])
        parent = torch.where(valid, torch.arange(-1, DEPTH), -2).unsqueeze(0)
        rows = [torch.zeros(V).double(), *(self.q[path[:i]] for i in range(len(path)))]
        q = torch.stack([*rows, *[torch.zeros(V).double()] * (DEPTH + 1 - len(rows))]).unsqueeze(0)
        p = torch.stack([self.p[path[: min(i, len(path))]] for i in range(DEPTH + 1)]).unsqueeze(0)
        return Tree(tokens, parent, q), p


def outcomes(laws: Laws, path: tuple[int, ...]) -> list[tuple[int, float, Tensor]]:
    """For every number of kept draft nodes its probability and the law of the token after them."""
    pass_at, rest = passing(*laws.tree(path))
    found, later = [], 1.0
    for kept in range(len(path), -1, -1):
        here = 1.0 if kept == 0 else float(pass_at[0, kept])
        law = rest[0, kept]
        found.append((kept, later * here, law / law.sum() if float(law.sum()) else law))
        later *= 1 - here
    return found


def emitted_law(laws: Laws) -> Tensor:
    """[V] * (DEPTH + 1): the joint law of the next tokens when one block is verified and plain decoding goes on."""
    joint = torch.zeros((V,) * (DEPTH + 1), dtype=torch.float64)
    for path, mass in laws.chains():
        for kept, share, law in outcomes(laws, path):
            for token in range(V):
                begun = (*path[:kept], token)
                weight = mass * share * float(law[token])
                for rest in product(range(V), repeat=DEPTH + 1 - len(begun)):
                    text, value = begun, weight
                    for x in rest:
                        value *= float(laws.p[text][x])
                        text = (*text, x)
                    joint[text] += value
    return joint


def target_law(laws: Laws) -> Tensor:
    joint = torch.zeros((V,) * (DEPTH + 1), dtype=torch.float64)
    for text in product(range(V), repeat=DEPTH + 1):
        joint[text] = torch.stack([laws.p[text[:i]][text[i]] for i in range(DEPTH + 1)]).prod()
    return joint


def kept_token_by_token(laws: Laws) -> float:
    """The expected number of draft nodes that the rule min(1, p / q), node by node, keeps."""
    total = 0.0
    for path, mass in laws.chains():
        reach = 1.0
        for i, x in enumerate(path):
            q = laws.q[path[:i]]
            reach *= min(1.0, float(laws.p[path[:i]][x]) / (float(q[x]) if q.any() else 1.0))
            total += mass * reach
    return total


def kept_by_block(laws: Laws) -> float:
    return sum(mass * share * kept for path, mass in laws.chains() for kept, share, _ in outcomes(laws, path))


@pytest.mark.parametrize("kind", KINDS)
def test_the_joint_law_is_the_targets(kind: str, seed: int) -> None:
    for offset in range(5):
        laws = Laws(kind, seed + offset)
        torch.testing.assert_close(emitted_law(laws), target_law(laws), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_at_least_what_token_verification_keeps(kind: str, seed: int) -> None:
    gains = [kept_by_block(laws) - kept_token_by_token(laws) for laws in (Laws(kind, seed + offset) for offset in range(8))]
    assert min(gains) > -1e-12
    if kind in ("drawn", "stopped"):
        assert max(gains) > 1e-4  # else nothing is gained anywhere


def test_a_wrong_weight_would_be_seen(seed: int) -> None:
    laws = Laws("drawn", seed)
    other = Laws("drawn", seed + 1)
    laws.q.update({path: other.q[path] for path in laws.q if len(path) == 1 and path[0] == 0})
    right = emitted_law(laws)
    chains = laws.chains()
    laws.q.update({(): other.q[()]})  # drawn from one law, declared as another
    laws.chains = lambda: chains  # type: ignore[method-assign]
    assert (emitted_law(laws) - right).abs().sum() > 1e-6


def test_verdicts_follow_the_probabilities(seed: int) -> None:
    laws, count = Laws("drawn", seed), 20_000
    path = max(laws.chains(), key=lambda chain: chain[1])[0]
    tree, p = laws.tree(path)
    assert tree.q is not None
    many = Tree(tree.tokens.expand(count, -1), tree.parent.expand(count, -1), tree.q.expand(count, -1, -1))
    verdict = verify_block(many, p.expand(count, -1, -1), CounterRng.seeded(range(seed, seed + count)))
    expected = torch.zeros(DEPTH + 1, V, dtype=torch.float64)
    for kept, share, law in outcomes(laws, path):
        expected[kept] = share * law
    assert chi_square((verdict.keep - 1) * V + verdict.next, expected.flatten()) > 1e-6
    assert torch.equal(verdict.path, torch.arange(DEPTH + 1).expand(count, -1))


def test_padding_and_company_change_nothing(seed: int) -> None:
    laws = Laws("stopped", seed)
    trees, laws_at = zip(*(laws.tree(path) for path, _ in laws.chains()), strict=True)
    count = len(trees)
    tree = Tree(*(torch.cat([getattr(t, name) for t in trees]) for name in ("tokens", "parent", "q")))
    together = verify_block(tree, torch.cat(laws_at), CounterRng.seeded(range(seed, seed + count)))
    for row, (path, _) in enumerate(laws.chains()):
        size = len(path) + 1
        assert trees[row].q is not None
        short = Tree(trees[row].tokens[:, :size], trees[row].parent[:, :size], trees[row].q[:, :size])
        alone = verify_block(short, laws_at[row][:, :size], CounterRng.seeded([seed + row]))
        assert (int(alone.keep), int(alone.next)) == (int(together.keep[row]), int(together.next[row]))


def test_greedy_is_token_verification(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, p = (torch.randint(2, (200, 5), generator=generator) for _ in range(2))
    tree, rng = Tree.chain(tokens), CounterRng.seeded(range(200))
    block, plain = verify_block(tree, p, rng), verify(tree, p, rng)
    assert torch.equal(block.keep, plain.keep) and torch.equal(block.next, plain.next) and int(block.keep.max()) > 2


@pytest.mark.parametrize("parent", [[-1, 0, 0], [-1, -2, 1], [-1, -2, 0]])
def test_a_tree_is_refused(parent: list[int], seed: int) -> None:
    tree = Tree(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([parent]))
    with pytest.raises(ValueError, match=r"^tree.parent: branches; [^\n]*$"):
        verify_block(tree, torch.full((1, 3, V), 1 / V).double(), CounterRng.seeded([seed]))
