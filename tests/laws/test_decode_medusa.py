"""Drafting with Medusa and Hydra heads: what is proposed, and that the output is plain decoding's, whatever was."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from exactness import draws
from sequences import shaken
from test_decode_exact_mtp import FALSE_ALARM, LENGTH, PROMPT, WARM, drawn, p_values
from test_decode_mtp import Spy, no_load, prompts_of
from torch import Tensor
from torch.nn.functional import one_hot

from fewstep.core.mixer import depths
from fewstep.core.recipe import parse
from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.medusa import HydraConfig, MedusaConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.drafters.tree import best_tree, full_tree
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.nn.packed import pack

FORMS = ("medusa", "hydra")
VOCAB = 5
TREE = ((0,), (1,), (0, 0), (0, 2), (1, 0), (2,), (0, 0, 1), (0, 2, 0))
DRAFTER: Mapping[str, Mapping[str, Any]] = {
    "chain-chosen": {"branching": (1, 1, 1)},
    "tree-chosen": {"branching": (2, 1, 2)},
    "tree-ranked": {"tree": TREE},
    "chain-drawn": {"mode": "drawn"},
    "tree-drawn": {"mode": "drawn", "branching": (2, 2, 1)},
}


def tiny(form: str, seed: int, vocab: int = VOCAB, **fields: Any) -> Decoder:
    """A random float64 decoder whose heads are near its own law of the next token, so that some drafts are right."""
    values = {
        "vocab": vocab,
        "width": 16,
        "depth": 2,
        "query_heads": 2,
        "hidden": 24,
        "tied": False,
        "heads": [{"kind": form, "depth": 3, "layers": 2, **fields}],
        "init_std": 0.3,
    }
    torch.manual_seed(seed)
    network = parse(DecoderConfig, values).build()
    shaken(network.heads[form])
    return network.double().eval()


def drafter_of(form: str, name: str, target: Decoder) -> Any:
    return parse(DRAFTERS[form], DRAFTER[name]).build(target, no_load)


def foreseen(target: Decoder, text: list[int], drafts: list[int]) -> list[Tensor]:
    """The logits [V] of every head after `text`, whose last token is a tree's root; Hydra's read `drafts` too."""
    heads: Any = next(iter(target.heads.values()))
    sequence = torch.tensor([text + drafts + [0] * heads.depth])
    encoded = target(sequence)
    outputs = heads(encoded.final, sequence, target.embed, encoded.context)
    return [heads.unembed(k, h[0, len(text) - 2], target.unembed) for k, h in enumerate(outputs, 1)]


@torch.no_grad()
def learn(target: Decoder, texts: Sequence[list[int]]) -> None:
    """Fit the unembeddings of the heads to `texts` by least squares, so that many drafts of what they hold are right."""
    heads: Any = next(iter(target.heads.values()))
    read: list[list[Tensor]] = []
    for text in texts:
        encoded = target(torch.tensor([text]))
        read.append(heads(encoded.final, torch.tensor([text]), target.embed, encoded.context))
    for k, own in enumerate(heads.unembeddings, 1):
        h = torch.cat([outputs[k - 1][0, :-1] for outputs in read])
        wanted = torch.cat([torch.tensor(text[k + 1 :]) for text in texts])
        own.weight.copy_(torch.linalg.lstsq(h, one_hot(wanted, target.vocab).double()).solution.T)


@pytest.mark.parametrize("unembedding", ["own", "shared"])
@pytest.mark.parametrize("form", FORMS)
def test_drafts_are_the_ranks_of_the_parallel_form(form: str, unembedding: str, seed: int) -> None:
    target = tiny(form, seed, vocab=11, unembedding=unembedding)
    prompt = prompts_of(seed, 11, [7])[0]
    spy = Spy(drafter_of(form, "tree-ranked", target))
    out = decode(target, spy, [prompt], Settings(max_new_tokens=30))[0]
    emitted = 1
    for (nodes,), accepted in zip(spy.proposals, out.accepted, strict=True):
        text = prompt + out.tokens[:emitted]
        assert nodes[0] == text[-1]
        token: dict[tuple[int, ...], int] = {}
        for path, node in zip(TREE, nodes[1:], strict=False):
            drafts = [token[path[:depth]] for depth in range(1, len(path))]
            ranked = foreseen(target, text, drafts)[len(path) - 1].argsort(descending=True)
            token[path] = node
            assert node == int(ranked[path[-1]])
        emitted += accepted + 1
    assert len(spy.proposals) > 4 and max(map(len, (nodes for (nodes,) in spy.proposals))) == len(TREE) + 1


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(repetition_penalty=1.6)], ids=["greedy", "penalised"])
@pytest.mark.parametrize("name", DRAFTER)
@pytest.mark.parametrize("form", FORMS)
def test_greedy_output_is_that_of_plain_decoding(form: str, name: str, sampling: SamplingConfig, seed: int) -> None:
    target = tiny(form, seed, vocab=11)
    prompts = prompts_of(seed, 11, [5, 1, 9, 2])
    plain = decode(target, SilentConfig().build(target, no_load), prompts, Settings(max_new_tokens=24), sampling=sampling)
    learn(target, [prompt + row.tokens for prompt, row in zip(prompts, plain, strict=True)])
    drafter = drafter_of(form, name, target)
    ours = decode(target, drafter, prompts, Settings(max_new_tokens=24), sampling=sampling)
    assert [row.tokens for row in ours] == [row.tokens for row in plain]
    assert sum(sum(row.accepted) for row in ours) > 0  # something was accepted, else nothing was tested
    for prompt, row in zip(prompts, ours, strict=True):
        assert decode(target, drafter, [prompt], Settings(max_new_tokens=24), sampling=sampling)[0].tokens == row.tokens


@pytest.mark.parametrize("name", ["tree-ranked", "tree-drawn"])
@pytest.mark.parametrize("form", FORMS)
def test_samples_have_the_law_of_the_target(form: str, name: str, seed: int) -> None:
    target = tiny(form, seed).float()
    pack(target)
    config = SamplingConfig(temperature=0.9, top_k=4, top_p=0.95, repetition_penalty=1.2)
    tokens = drawn(target, drafter_of(form, name, target), config, seed, 12_288)
    assert min(p_values(tokens, target, config)) > FALSE_ALARM


@pytest.mark.parametrize("form", FORMS)
def test_ranks_sent_as_drawn_are_caught(form: str, seed: int) -> None:
    """The test above can fail: chosen nodes that claim to be drawn shift the law."""
    target = tiny(form, 1).float()

    class Lying:
        def __init__(self, inner: Any) -> None:
            self.inner, self.init, self.observe = inner, inner.init, inner.observe
            self.taps, self.prompt_taps = inner.taps, inner.prompt_taps

        def propose(self, *arguments: Any) -> Any:
            tree, state = self.inner.propose(*arguments)
            logits = self.inner.heads.unembed(1, state.hidden * 0, target.unembed).double()
            flat = torch.full_like(logits, 1 / VOCAB).unsqueeze(1).repeat(1, tree.size, 1)
            flat[:, 0] = 0
            return type(tree)(tree.tokens, tree.parent, flat), state

    tokens = drawn(target, Lying(drafter_of(form, "chain-chosen", target)), WARM, seed, 12_288)
    assert min(p_values(tokens, target, WARM)) < FALSE_ALARM


@pytest.mark.parametrize("name", DRAFTER)
@pytest.mark.parametrize("form", FORMS)
def test_a_row_alone_equals_the_row_in_any_batch(form: str, name: str, seed: int) -> None:
    target = tiny(form, seed)
    drafter, hot = drafter_of(form, name, target), SamplingConfig(temperature=1.6)
    many = draws(target, drafter, PROMPT, hot, range(seed, seed + 32), 12)
    for batch in (1, 3, 8):
        assert torch.equal(draws(target, drafter, PROMPT, hot, range(seed, seed + batch), 12), many[:batch])
    prompts = prompts_of(seed, VOCAB, [5, 1, 9])
    together = decode(target, drafter, prompts, Settings(max_new_tokens=15), sampling=hot, seed=seed)
    for prompt, row in zip(prompts, together, strict=True):
        assert decode(target, drafter, [prompt], Settings(max_new_tokens=15), sampling=hot, seed=seed)[0].tokens == row.tokens


@pytest.mark.parametrize("name", DRAFTER)
@pytest.mark.parametrize("form", FORMS)
def test_the_budget_is_never_exceeded(form: str, name: str, seed: int) -> None:
    """Node n of a row is padding iff n is at or beyond the row's budget."""
    target = tiny(form, seed)
    drafter = drafter_of(form, name, target)
    trees = []

    class Kept(Spy):
        def propose(self, *arguments: Any) -> Any:
            tree, state = self.inner.propose(*arguments)
            trees.append((tree, arguments[3]))
            return tree, state

    prompts = prompts_of(seed, VOCAB, [4, 4, 4])
    hot = SamplingConfig(temperature=1.3)
    decode(target, Kept(drafter), prompts, Settings([4, 7, 12], budget=6), sampling=[hot] * 3, seed=seed)
    whole = len(drafter.tree.parents)
    for tree, budget in trees:
        assert tree.size == min(whole, int(budget.max()))
        assert torch.equal(tree.valid, torch.arange(tree.size) < budget.unsqueeze(1).clamp(max=whole))
        inside = tree.parent.where(tree.valid, -1)
        assert (depths(tree.parent) < LENGTH + 1).all() and (inside < torch.arange(tree.size)).all()
    assert any(int(budget.min()) < int(budget.max()) for _, budget in trees)


@pytest.mark.parametrize("form", FORMS)
def test_the_default_tree_is_the_measured_one(form: str, seed: int) -> None:
    accuracies = ((0.5, 0.3), (0.6, 0.1), (0.2, 0.1))
    measured, bare = tiny(form, seed, accuracies=accuracies), tiny(form, seed)
    config: Any = DRAFTERS[form]

    def parents(target: Decoder, **fields: Any) -> list[int]:
        drafter: Any = config(**fields).build(target, no_load)
        return drafter.tree.parents

    assert parents(measured, nodes=7) == parents(measured, tree=best_tree(accuracies, 7))
    assert parents(bare) == [-1, 0, 1, 2]
    assert parents(measured, branching=(2, 1)) == parents(bare, tree=full_tree((2, 1)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"branching": (1, 1, 1, 1)}, "drafter.branching: 4 levels, the model has 3 heads"),
        ({"tree": ((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0))}, "drafter.tree: 4 levels, the model has 3 heads"),
        ({"branching": (6,)}, "drafter.branching: rank 5, of 5 tokens"),
        ({"tree": ((0, 1),)}, "hangs from"),
        ({"tree": ((0,),), "branching": (1,)}, "which branching does not go with"),
        ({"tree": ((0,),), "mode": "drawn"}, "which mode='drawn' does not go with"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_refusals(form: str, fields: Any, message: str, seed: int) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        parse(DRAFTERS[form], fields).build(tiny(form, seed), no_load)
    assert "\n" not in str(refusal.value) and "; " in str(refusal.value)


@pytest.mark.parametrize(("form", "other"), [FORMS, FORMS[::-1]])
def test_a_model_without_such_heads_is_refused(form: str, other: str, seed: int) -> None:
    config: DrafterConfig = {"medusa": MedusaConfig(), "hydra": HydraConfig()}[form]
    with pytest.raises(ValueError, match=rf"^drafter='{form}': the model has no {form} heads; [^\n]*$"):
        config.build(tiny(other, seed), no_load)
    wide = tiny(form, seed, vocab=7)
    with pytest.raises(ValueError, match=r"^drafter.path='wide': heads for a width of 16 and 7 tokens, the target has 16 and 5"):
        parse(DRAFTERS[form], {"path": "wide"}).build(tiny(form, seed), lambda path: wide)
