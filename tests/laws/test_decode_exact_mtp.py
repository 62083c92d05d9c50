"""Drafting with multi-token heads changes nothing: sampled tokens have the target's law, and known bugs on this path are seen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from exactness import cells, chi_square, draws, joint_law
from test_decode_mtp import FORMS, no_load, tiny
from torch import Tensor

from fewstep.core.draft import Handle
from fewstep.core.mixer import Tree
from fewstep.core.random import Rng
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.decode.verify import draw
from fewstep.models.decoder import Decoder
from fewstep.nn.packed import pack

VOCAB, LENGTH = 5, 5
PROMPT = (1, 2, 3, 1, 2, 4, 1, 2)
FALSE_ALARM = 1e-6
DRAFTERS: Mapping[str, MultiTokenConfig] = {
    "chain-drawn": MultiTokenConfig(),
    "chain-chosen": MultiTokenConfig(mode="chosen"),
    "tree-drawn": MultiTokenConfig(branching=(2, 2, 1)),
    "tree-chosen": MultiTokenConfig(branching=(2, 1, 2), mode="chosen"),
}
TEMPERATURES, NUCLEI = (0.7, 1.0, 1.6), (1.0, 0.75)
WARM = SamplingConfig(temperature=1.0)
REVEALING = 5  # the seed of a model whose heads are so far from its law that every bug shows in a few thousand draws


def model(form: str, seed: int) -> Decoder:
    """A random model as users decode with it: float32, packed for the kernels where there are any."""
    network = tiny(form, seed, vocab=VOCAB).float()
    pack(network)
    return network


def table(target: Decoder, prompt: Sequence[int], length: int) -> Mapping[tuple[int, ...], list[float]]:
    """The logits after every continuation of fewer than `length` tokens, each text through the target's parallel form."""
    texts = torch.tensor([[*prompt, *rest] for rest in product(range(target.vocab), repeat=length - 1)])
    with torch.no_grad():
        logits = target.unembed(target(texts).final)
    rows = zip(texts.tolist(), logits.tolist(), strict=True)
    return {tuple(text[: i + 1]): row[i] for text, row in rows for i in range(len(prompt) - 1, len(text))}


def p_values(tokens: Tensor, target: Decoder, config: SamplingConfig) -> tuple[float, float]:
    """Of the first three tokens, and of the last three of five (which a second proposal decides)."""
    after = table(target, PROMPT, LENGTH)
    law = joint_law(lambda text: after[tuple(text)], PROMPT, VOCAB, LENGTH, config)
    first, last = law.view(VOCAB**3, -1).sum(1), law.view(-1, VOCAB**3).sum(0)
    return chi_square(cells(tokens[:, :3], VOCAB), first), chi_square(cells(tokens[:, -3:], VOCAB), last)


def drawn(target: Decoder, drafter: Any, config: SamplingConfig, first: int, count: int) -> Tensor:
    """`count` continuations, 4096 in a batch, forked from one prompt."""
    batches = [range(start, min(start + 4096, first + count)) for start in range(first, first + count, 4096)]
    return torch.cat([draws(target, drafter, PROMPT, config, batch, LENGTH) for batch in batches])


class Overheard:
    """A handle that is its own law and writes down what a drafter asks of it."""

    def __init__(self, handle: Handle) -> None:
        self.handle, self.target, self.law, self.greedy = handle, handle.target, self, handle.law.greedy
        self.laws: list[Tensor] = []

    def __call__(self, logits: Tensor, tree: Tree, nodes: Tensor) -> Tensor:
        self.laws.append(self.handle.law(logits, tree, nodes))
        return self.laws[-1]

    def charge(self, calls: int) -> None:
        self.handle.charge(calls)


Lie = Callable[[Tree, list[Tensor], Rng], Tree]


class Lying:
    """Multi-token heads whose tree says something else than how it came about."""

    def __init__(self, inner: Any, lie: Lie) -> None:
        self.inner, self.taps, self.prompt_taps, self.lie = inner, inner.taps, inner.prompt_taps, lie
        self.init, self.observe = inner.init, inner.observe

    def propose(self, root: Tensor, state: Any, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, Any]:
        overheard = Overheard(handle)
        tree, state = self.inner.propose(root, state, overheard, budget, rng)
        return self.lie(tree, overheard.laws, rng.split("lie")), state


def argmax_sent_as_drawn(tree: Tree, laws: list[Tensor], rng: Rng) -> Tree:
    q = torch.cat([torch.zeros_like(laws[0]), *laws], 1)
    return replace(tree, q=q[:, : tree.size])


def dropped_for_its_own_q(tree: Tree, laws: list[Tensor], rng: Rng) -> Tree:
    assert tree.q is not None
    likely = tree.q.gather(2, tree.tokens.unsqueeze(2)).squeeze(2) > 0.3
    likely[:, 0] = True
    return replace(tree, parent=torch.where(likely.long().cumprod(1) > 0, tree.parent, -2))


def siblings_with_replacement(tree: Tree, laws: list[Tensor], rng: Rng) -> Tree:
    assert tree.q is not None
    return replace(tree, q=torch.cat([tree.q[:, :1], tree.q[:, 1:2].expand(-1, tree.size - 1, -1)], 1))


def block_that_saw_later_tokens(tree: Tree, laws: list[Tensor], rng: Rng) -> Tree:
    """The first draft is drawn anew, with the second one known: more likely to repeat it."""
    if tree.q is None or tree.size < 3:
        return tree
    q = tree.q[:, 1].scatter_add(1, tree.tokens[:, 2:], torch.full_like(tree.q[:, 1], 3.0))
    q = q / q.sum(1, keepdim=True)
    tokens = tree.tokens.clone()
    tokens[:, 1] = draw(q, rng.uniform(1)[:, 0])
    return replace(tree, tokens=tokens, q=torch.cat([tree.q[:, :1], q.unsqueeze(1), tree.q[:, 2:]], 1))


BUGS: Mapping[str, tuple[MultiTokenConfig, Lie]] = {
    "argmax": (MultiTokenConfig(mode="chosen"), argmax_sent_as_drawn),
    "dropped": (MultiTokenConfig(branching=(1,)), dropped_for_its_own_q),
    "siblings": (MultiTokenConfig(branching=(3,)), siblings_with_replacement),
    "block": (MultiTokenConfig(branching=(1, 1)), block_that_saw_later_tokens),
}


@pytest.mark.parametrize("form", FORMS)
def test_samples_have_the_law_of_the_target(form: str, seed: int) -> None:
    target = model(form, seed)
    config = SamplingConfig(temperature=0.9, top_k=4, top_p=0.95, repetition_penalty=1.2)
    tokens = drawn(target, DRAFTERS["tree-drawn"].build(target, no_load), config, seed, 20_000)
    assert min(p_values(tokens, target, config)) > FALSE_ALARM


@pytest.mark.parametrize(("form", "bug"), [(form, bug) for form in FORMS for bug in BUGS if bug != "block" or "parallel" in form])
def test_planted_bugs_are_caught(form: str, bug: str, seed: int) -> None:
    target = model(form, REVEALING)
    config, lie = BUGS[bug]
    tokens = drawn(target, Lying(config.build(target, no_load), lie), WARM, seed, 12_288)
    assert min(p_values(tokens, target, WARM)) < FALSE_ALARM


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_row_alone_equals_the_row_in_any_batch(form: str, name: str, seed: int) -> None:
    target = tiny(form, seed, vocab=VOCAB)
    drafter, hot = DRAFTERS[name].build(target, no_load), SamplingConfig(temperature=1.6)
    many = draws(target, drafter, PROMPT, hot, range(seed, seed + 64), 12)
    for batch in (1, 3, 8):
        assert torch.equal(draws(target, drafter, PROMPT, hot, range(seed, seed + batch), 12), many[:batch])


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("form", FORMS)
def test_drafts_of_every_depth_are_accepted_and_refused(form: str, name: str, seed: int) -> None:
    target = model(form, REVEALING)
    drafter = DRAFTERS[name].build(target, no_load)
    rows = decode(target, drafter, [PROMPT], Settings(LENGTH + 16), sampling=WARM, seed=seed, samples=256)
    assert {accepted for row in rows for accepted in row.accepted} == {0, 1, 2, 3}


@pytest.mark.claims
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("top_p", NUCLEI)
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("form", FORMS)
def test_the_full_grid_at_batch_4096(form: str, name: str, top_p: float, temperature: float, seed: int) -> None:
    target, config = model(form, seed), SamplingConfig(temperature=temperature, top_p=top_p)
    drafter = DRAFTERS[name].build(target, no_load)
    tokens = drawn(target, drafter, config, 0, 200_704)
    assert min(p_values(tokens, target, config)) > FALSE_ALARM / 10
    for batch in (1, 3, 8):
        assert torch.equal(drawn(target, drafter, config, 0, batch), tokens[:batch])
