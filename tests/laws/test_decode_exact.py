"""Drafting changes nothing: sampled tokens have the target's law, whatever drafted them, and three known bugs would be seen."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from exactness import cells, chi_square, draws, joint_law
from test_decode_exact_mtp import table
from torch import Tensor
from toys import STACKS, MaskedTable, TableModel, random_decoder

from fewstep.core.draft import Handle, Verdict
from fewstep.core.mixer import Tree
from fewstep.core.random import Rng
from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.drafters.block_diffusion import BlockDiffusionConfig
from fewstep.decode.drafters.config import HeadsDrafterConfig, Load
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.early_exit import EarlyExitConfig
from fewstep.decode.drafters.lookahead import LookaheadConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.decode.drafters.silent import Nothing, SilentConfig
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.verify import draw
from fewstep.models.decoder import Decoder

VOCAB, LENGTH = 5, 5
PROMPT = (1, 2, 3, 1, 2, 4, 1, 2)
FALSE_ALARM = 1e-6
REVEALING = 1  # the seed of a target whose law every bug leaves so far that 20,000 draws have a p-value of 1e-100 at most
SETTINGS = {
    "silent": SilentConfig(),
    "ngram-chain": NgramConfig(min_ngram=1, depth=4),
    "ngram-tree": NgramConfig(min_ngram=1, depth=3, branches=3),
    "draft-chain-drawn": DraftModelConfig(path="toy", branching=(1, 1, 1)),
    "draft-tree-drawn": DraftModelConfig(path="toy", branching=(3, 2, 1)),
    "draft-chain-chosen": DraftModelConfig(path="toy", branching=(1, 1, 1), mode="chosen"),
    "draft-tree-chosen": DraftModelConfig(path="toy", branching=(2, 2, 2), mode="chosen"),
    "retrieval": RetrievalConfig(depth=4),
    "lookahead": LookaheadConfig(window=2, ngram=3),
    "exit-chain-drawn": EarlyExitConfig(branching=(1, 1, 1)),
    "exit-tree-drawn": EarlyExitConfig(branching=(2, 2), confidence=0.3),
    "exit-tree-reused": EarlyExitConfig(branching=(2, 2), reuse=True),
    "block-drawn": BlockDiffusionConfig(path="masked", size=3),
    "block-tree": BlockDiffusionConfig(path="masked", size=4, branching=(2, 1, 2)),
    "block-chosen": BlockDiffusionConfig(path="masked", size=3, mode="chosen"),
    "block-in-steps": BlockDiffusionConfig(path="masked", size=4, steps=2),
}
COUNTS = {"retrieval": 5_000, "lookahead": 3_000}  # they keep their rows' memory in Python
LAWS = {
    "warm": SamplingConfig(temperature=1.0),
    "hot": SamplingConfig(temperature=1.6),
    "cool-nucleus": SamplingConfig(temperature=0.7, top_p=0.8),
    "nucleus": SamplingConfig(temperature=1.0, top_p=0.6),
    "everything": SamplingConfig(temperature=0.9, top_k=4, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
}


ON_STACKS = {
    "ngram-chain": SETTINGS["ngram-chain"],
    "ngram-tree": SETTINGS["ngram-tree"],
    "mtp-chain": MultiTokenConfig(),
    "mtp-tree": MultiTokenConfig(branching=(2, 2, 1)),
    "mtp-tree-chosen": MultiTokenConfig(branching=(2, 1, 2), mode="chosen"),
    "own-tree": DraftModelConfig(path="toy", branching=(2, 2)),
}
QUICK = [
    (stack, name, law)
    for stack, laws in (
        ("mamba2", ("warm", "cool-nucleus")),
        ("linear", ("hot", "everything")),
        ("hybrid", ("cool-nucleus", "hot")),
    )
    for name, law in zip(("mtp-chain", "mtp-tree"), laws, strict=True)
]
FIRST = 3  # tokens of recurrent and hybrid targets that are looked at


class Mixed:
    """Siblings of both kinds under every node: the likeliest token chosen, then one drawn from what is left, then one chosen."""

    taps: tuple[str, ...] = ()
    prompt_taps: tuple[str, ...] = ()

    def __init__(self, model: TableModel) -> None:
        self.model = model

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> Nothing:
        return Nothing()

    def propose(self, root: Tensor, state: Nothing, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, Nothing]:
        # early exit: the first level comes from the target's own shallow pass, the second from the same law again
        tree = Tree(root.unsqueeze(1), torch.full((len(root), 1), -1))
        logits = handle.extend(tree, layers=range(0)).logits
        assert logits is not None
        law = handle.law(logits, tree)
        tokens, q = siblings(law[:, 0], rng.uniform(4)[:, 2])
        nodes = Tree(torch.cat([tree.tokens, tokens], 1), torch.tensor([[-1, 0, 0, 0]]).expand(len(root), -1))
        logits = handle.extend(Tree(tokens, nodes.parent[:, 1:]), layers=range(0)).logits
        assert logits is not None
        law = handle.law(logits, nodes, torch.tensor([[1, 2, 3]]).expand(len(root), -1))
        deeper, deeper_q = siblings(law[:, 1], rng.uniform(7)[:, 5])  # under the drawn node
        tokens = torch.cat([nodes.tokens, deeper], 1)
        parent = torch.cat([nodes.parent, torch.full_like(deeper, 2)], 1)
        q = torch.cat([torch.zeros_like(q[:, :1]), q, deeper_q], 1)
        parent = torch.where(torch.arange(7) < budget.unsqueeze(1), parent, -2)
        return Tree(tokens, parent, q), state

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: Nothing) -> Nothing:
        return state


def siblings(law: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    first = law.argmax(-1, keepdim=True)
    q = law.scatter(1, first, 0.0)
    q = torch.where(q.sum(-1, keepdim=True) > 0, q / q.sum(-1, keepdim=True), law)
    second = draw(q, uniform).unsqueeze(1)
    third = q.scatter(1, second, 0.0).argmax(-1, keepdim=True)
    return torch.cat([first, second, third], 1), torch.stack([torch.zeros_like(q), q, torch.zeros_like(q)], 1)


class Buggy:
    """A drafter that lies about how its nodes came about, in one of three ways that look lossless."""

    taps: tuple[str, ...] = ()
    prompt_taps: tuple[str, ...] = ()

    def __init__(self, bug: str, seed: int) -> None:
        self.bug = bug
        self.first = torch.rand(VOCAB, generator=torch.Generator().manual_seed(seed)).double().softmax(-1)
        second = 2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed + 1)).double()
        self.second = second.softmax(-1)

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> Nothing:
        return Nothing()

    def propose(self, root: Tensor, state: Nothing, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, Nothing]:
        if self.bug == "block":
            return self.block(root, budget, rng), state
        output = handle.extend(Tree(root.unsqueeze(1), torch.full((len(root), 1), -1)), layers=range(0))
        assert output.logits is not None
        q = output.logits.softmax(-1)
        argmax = self.bug == "argmax"
        token = q.argmax(-1) if argmax else draw(q, rng.uniform(1))
        valid = torch.ones_like(token, dtype=torch.bool) if argmax else q.gather(-1, token.unsqueeze(-1)).squeeze(-1) > 0.4
        valid &= budget.unsqueeze(1) > 1
        tokens, parent = torch.cat([root.unsqueeze(1), token], 1), torch.where(valid, 0, -2)
        return Tree(tokens, torch.cat([torch.full_like(parent, -1), parent], 1), torch.cat([torch.zeros_like(q), q], 1)), state

    def block(self, root: Tensor, budget: Tensor, rng: Rng) -> Tree:
        """Two tokens unmasked last first: the law of the earlier one saw the later one."""
        later = draw(self.first.expand(len(root), -1), rng.uniform(3)[:, 2])
        q_earlier = self.second[later]
        earlier = draw(q_earlier, rng.uniform(3)[:, 1])
        q = torch.stack([torch.zeros_like(q_earlier), q_earlier, self.first.expand_as(q_earlier)], 1)
        parent = torch.tensor([[-1, 0, 1]]).expand(len(root), -1)
        parent = torch.where(torch.arange(3) < budget.unsqueeze(1), parent, -2)
        return Tree(torch.stack([root, earlier, later], 1), parent, q)

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: Nothing) -> Nothing:
        return state


def models(seed: int) -> tuple[TableModel, TableModel]:
    target = TableModel(VOCAB, seed)
    return target, TableModel(VOCAB, seed + 1, like=target, near=0.5)


def lent(target: TableModel, draft: TableModel, seed: int) -> Load:
    """What settings name by their path."""
    masked: Any = MaskedTable(target, seed + 2, near=0.7)
    return lambda path: masked if path == "masked" else draft


def p_values(tokens: Tensor, target: TableModel, config: SamplingConfig) -> tuple[float, float]:
    """Of the first three tokens, and of the last three of five (which deeper nodes decide)."""
    law = joint_law(target.after, PROMPT, VOCAB, LENGTH, config)
    table = law.view(VOCAB, VOCAB, -1)
    first = chi_square(
        cells(tokens[:, :3], VOCAB), table.sum(-1).unsqueeze(-1).new_tensor(law.view(VOCAB**3, -1).sum(1).tolist())
    )
    last = chi_square(cells(tokens[:, -3:], VOCAB), law.view(-1, VOCAB**3).sum(0))
    return first, last


def p_value_of_stack(tokens: Tensor, target: Decoder, config: SamplingConfig) -> float:
    """Of the first tokens, against the law that the parallel form gives."""
    after = table(target, PROMPT, FIRST)
    law = joint_law(lambda text: after[tuple(text)], PROMPT, VOCAB, FIRST, config)
    return chi_square(cells(tokens[:, :FIRST], VOCAB), law)


def test_every_registered_drafter_is_here() -> None:
    with_heads = {"mtp", *(kind for kind, config in DRAFTERS.items() if issubclass(config, HeadsDrafterConfig))}
    assert {config.kind for config in SETTINGS.values()} == set(DRAFTERS) - with_heads  # which have files of their own


@pytest.mark.parametrize("name", SETTINGS)
def test_samples_have_the_law_of_the_target(name: str, seed: int) -> None:
    target, draft = models(seed)
    drafter = SETTINGS[name].build(target, lent(target, draft, seed))
    config = LAWS["everything" if name == "draft-tree-drawn" else "cool-nucleus" if "draft" in name else "warm"]
    tokens = draws(target, drafter, PROMPT, config, range(seed, seed + COUNTS.get(name, 20_000)), LENGTH)
    assert min(p_values(tokens, target, config)) > FALSE_ALARM


def test_chosen_and_drawn_siblings_may_mix(seed: int) -> None:
    target, draft = models(seed)
    tokens = draws(target, Mixed(draft), PROMPT, LAWS["warm"], range(seed, seed + 20_000), LENGTH)
    assert min(p_values(tokens, target, LAWS["warm"])) > FALSE_ALARM


@pytest.mark.parametrize("bug", ["argmax", "dropped", "block"])
def test_planted_bugs_are_caught(bug: str, seed: int) -> None:
    target, _ = models(REVEALING)
    tokens = draws(target, Buggy(bug, REVEALING), PROMPT, LAWS["warm"], range(seed, seed + 20_000), LENGTH)
    assert min(p_values(tokens, target, LAWS["warm"])) < FALSE_ALARM


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_alone_equals_the_row_in_any_batch(name: str, seed: int) -> None:
    target, draft = models(seed)
    drafter = SETTINGS[name].build(target, lent(target, draft, seed))
    many = draws(target, drafter, PROMPT, LAWS["hot"], range(seed, seed + 64), 12)
    for batch in (1, 3, 8):
        few = draws(target, drafter, PROMPT, LAWS["hot"], range(seed, seed + batch), 12)
        assert torch.equal(few, many[:batch])


@pytest.mark.parametrize(("stack", "name", "law"), QUICK)
def test_samples_of_recurrent_and_hybrid_targets_have_their_law(stack: str, name: str, law: str, seed: int) -> None:
    target = random_decoder(STACKS[stack], VOCAB, seed)
    drafter = ON_STACKS[name].build(target, lambda path: target)
    tokens = draws(target, drafter, PROMPT, LAWS[law], range(seed, seed + 2048), FIRST, budget=8)
    assert p_value_of_stack(tokens, target, LAWS[law]) > FALSE_ALARM
    for batch in (1, 3, 8):
        few = draws(target, drafter, PROMPT, LAWS[law], range(seed, seed + batch), FIRST, budget=8)
        assert torch.equal(few, tokens[:batch])


@pytest.mark.claims
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ON_STACKS)
@pytest.mark.parametrize("stack", STACKS)
def test_every_stack_with_every_drafter_and_law(stack: str, name: str, law: str, seed: int) -> None:
    target = random_decoder(STACKS[stack], VOCAB, seed)
    drafter: Any = ON_STACKS[name].build(target, lambda path: target)
    runs = [draws(target, drafter, PROMPT, LAWS[law], range(start, start + 4096), FIRST) for start in range(0, 40_960, 4096)]
    assert p_value_of_stack(torch.cat(runs), target, LAWS[law]) > FALSE_ALARM / 10
    for batch in (1, 3, 8):
        assert torch.equal(draws(target, drafter, PROMPT, LAWS[law], range(batch), FIRST), runs[0][:batch])


@pytest.mark.claims
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_full_grid_at_batch_4096(name: str, law: str, seed: int) -> None:
    target, draft = models(seed)
    drafter: Any = SETTINGS[name].build(target, lent(target, draft, seed))
    starts = range(0, 10 * COUNTS.get(name, 20_000), 4096)
    runs = [draws(target, drafter, PROMPT, LAWS[law], range(start, start + 4096), LENGTH) for start in starts]
    assert min(p_values(torch.cat(runs), target, LAWS[law])) > FALSE_ALARM / 10
    for batch in (1, 3, 8):
        assert torch.equal(draws(target, drafter, PROMPT, LAWS[law], range(batch), LENGTH), runs[0][:batch])
