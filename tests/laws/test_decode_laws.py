"""The sampling transform against token-by-token reference code, and its life per row."""

import pytest
import torch
from exactness import reference_law
from torch import Tensor

from fewstep.core.draft import Verdict
from fewstep.core.mixer import Tree
from fewstep.core.recipe import parse
from fewstep.decode.laws import Sampling, SamplingConfig

VOCAB = 300  # wider than what is ranked before a full sort
CONFIGS = [
    SamplingConfig(temperature=0.7),
    SamplingConfig(temperature=1.3, top_k=5),
    SamplingConfig(temperature=1.0, top_k=100_000),
    SamplingConfig(temperature=1.0, top_p=0.3),
    SamplingConfig(temperature=40.0, top_p=0.95),
    SamplingConfig(temperature=1.0, min_p=0.1),
    SamplingConfig(temperature=0.9, repetition_penalty=1.5),
    SamplingConfig(temperature=0.9, repetition_penalty=0.8),
    SamplingConfig(temperature=1.1, top_k=40, top_p=0.8, min_p=0.02, repetition_penalty=1.2),
    SamplingConfig(temperature=0.0),
    SamplingConfig(temperature=0.0, repetition_penalty=2.0),
]


def scene(batch: int, seed: int) -> tuple[Tree, Tensor, list[list[list[int]]], Tree]:
    """A tree per row after a prompt, logits, the history of each node, and the prompt."""
    generator = torch.Generator().manual_seed(seed)
    prompt = Tree.chain(torch.randint(VOCAB, (batch, 6), generator=generator), torch.randint(1, 7, (batch,), generator=generator))
    tree = Tree(torch.randint(VOCAB, (batch, 5), generator=generator), torch.tensor([[-1, 0, 0, 2, 3]]).expand(batch, -1))
    logits = 3 * torch.randn(batch, 5, VOCAB, generator=generator, dtype=torch.float64)
    paths = [[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 3, 4]]
    said = [prompt.tokens[b, : int(prompt.valid[b].sum())].tolist() for b in range(batch)]
    return tree, logits, [[said[b] + tree.tokens[b, path].tolist() for path in paths] for b in range(batch)], prompt


def after_prompt(law: Sampling, prompt: Tree) -> Sampling:
    order = torch.arange(prompt.size).expand_as(prompt.tokens)
    return law.commit(prompt, Verdict(order, prompt.valid.sum(1), prompt.tokens[:, 0]))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_one_request_matches_the_reference(config: SamplingConfig, seed: int) -> None:
    tree, logits, histories, prompt = scene(4, seed)
    law = after_prompt(config.build(4, VOCAB), prompt)(logits, tree)
    for b in range(4):
        for n in range(5):
            expected = torch.tensor(reference_law(logits[b, n].tolist(), histories[b][n], config), dtype=torch.float64)
            if config.temperature == 0:
                assert law.dtype == torch.int64 and int(law[b, n]) == int(expected.argmax())
            else:
                assert law.dtype == torch.float64
                torch.testing.assert_close(law[b, n], expected, rtol=1e-10, atol=1e-14)
                assert torch.equal(law[b, n] > 0, expected > 0)


def test_requests_of_all_kinds_share_a_batch(seed: int) -> None:
    tree, logits, histories, prompt = scene(len(CONFIGS), seed)
    law = after_prompt(Sampling.of(CONFIGS, VOCAB), prompt)
    p = law(logits, tree)
    nodes = torch.tensor([[4, 1]]).expand(len(CONFIGS), -1)
    some = law(logits[:, [4, 1]], tree, nodes)
    torch.testing.assert_close(some, p[:, [4, 1]], rtol=0, atol=0)
    for b, config in enumerate(CONFIGS):
        expected = torch.tensor(reference_law(logits[b, 3].tolist(), histories[b][3], config), dtype=torch.float64)
        torch.testing.assert_close(p[b, 3], expected, rtol=1e-10, atol=1e-14)


def test_committed_paths_count_and_rejected_nodes_do_not(seed: int) -> None:
    tree, _, _, _ = scene(1, seed)
    tree = Tree(torch.tensor([[3, 4, 5, 6, 7]]), tree.parent[:1])
    law = SamplingConfig(repetition_penalty=2.0).build(1, VOCAB)
    law = law.commit(tree, Verdict(torch.tensor([[0, 2, 3, 0, 0]]), torch.tensor([3]), torch.tensor([8])))
    logits = torch.zeros(1, 1, VOCAB)
    logits[..., [3, 5, 6, 10]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    root = Tree(torch.tensor([[0]]), torch.tensor([[-1]]))
    assert law(logits, root).item() == 10
    logits[..., 4], logits[..., 7] = 6.5, 6.4  # rejected nodes: nothing is held against them
    assert law(logits, root).item() == 4


def test_equal_logits_are_treated_equally() -> None:
    logits = torch.zeros(1, 1, VOCAB)
    logits[..., [5, 9, 11]] = 4.0
    root = Tree(torch.tensor([[0]]), torch.tensor([[-1]]))
    for config in (SamplingConfig(temperature=1.0, top_k=2), SamplingConfig(temperature=1.0, top_p=0.2)):
        assert config.build(1, VOCAB)(logits, root).nonzero()[:, 2].tolist() == [5, 9, 11]
    assert SamplingConfig().build(1, VOCAB)(logits, root).item() == 5


def test_fork_and_join_keep_each_row(seed: int) -> None:
    tree, logits, _, prompt = scene(len(CONFIGS), seed)
    law = after_prompt(Sampling.of(CONFIGS, VOCAB), prompt)
    whole = law(logits, tree)
    rows = torch.tensor([8, 0, 8, 10])
    torch.testing.assert_close(
        law.fork(rows)(logits[rows], Tree(tree.tokens[rows], tree.parent[rows])), whole[rows], rtol=0, atol=0
    )
    plain, penalised = Sampling.of(CONFIGS[:6], VOCAB), law.fork(torch.arange(6, len(CONFIGS)))
    torch.testing.assert_close(plain.join(penalised)(logits, tree), whole, rtol=0, atol=0)
    assert plain.nbytes() < penalised.nbytes()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -3}, "top_k"),
        ({"temprature": 1}, "temperature"),
    ],
)
def test_bad_values_are_refused_by_name(values: dict[str, float], field: str) -> None:
    with pytest.raises(ValueError, match=field) as error:
        parse(SamplingConfig, values)
    assert "\n" not in str(error.value)
