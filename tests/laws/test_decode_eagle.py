"""Drafting with EAGLE's networks changes nothing: greedy tokens are plain decoding's, sampled ones have the target's law."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from eagles import eagle_model, no_load
from test_decode_exact_mtp import FALSE_ALARM, LENGTH, PROMPT, VOCAB, WARM, drawn, p_values
from test_decode_mtp import prompts_of
from torch import Tensor

from fewstep.core.draft import Verdict
from fewstep.core.mixer import Context, Tree
from fewstep.core.random import CounterRng
from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.drafters.eagle import Eagle2Config, Eagle3Config, EagleConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.prefill import prefill, prompt_chain
from fewstep.decode.stream import Settings
from fewstep.decode.verify import verify
from fewstep.models.decoder import Decoder
from fewstep.nn.packed import pack

SETTINGS: Mapping[str, Any] = {
    "1-chain-drawn": EagleConfig(branching=(1, 1, 1)),
    "1-chain-chosen": EagleConfig(branching=(1, 1, 1), mode="chosen"),
    "1-tree-drawn": EagleConfig(branching=(2, 2, 1)),
    "1-tree-chosen": EagleConfig(branching=(2, 1, 2), mode="chosen"),
    "2": Eagle2Config(topk=3, depth=3, nodes=8),
    "3-chain-drawn": Eagle3Config(branching=(1, 1, 1)),
    "3-tree-drawn": Eagle3Config(branching=(2, 2, 1)),
    "3-tree-chosen": Eagle3Config(branching=(2, 1, 2), mode="chosen"),
    "3-dynamic": Eagle3Config(topk=3, depth=3, nodes=8),
}
MIXED = SamplingConfig(temperature=0.9, top_k=4, top_p=0.95, repetition_penalty=1.2)
AGREEING = 6  # the seed of a model whose heads are so near its law that 256 samples hold every acceptance more than fifty times


def model(seed: int, vocab: int = VOCAB) -> Decoder:
    """As users decode with it: float32, packed for the kernels where there are any. One token cannot be drafted."""
    network = eagle_model(seed, vocab, draft_vocab=vocab - 1).float()
    pack(network)
    return network


class Watched:
    """A drafter whose proposals are kept, with the budgets they were made for."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.init, self.observe = inner, inner.init, inner.observe
        self.taps, self.prompt_taps = inner.taps, inner.prompt_taps
        self.seen: list[tuple[Tree, Tensor]] = []

    def propose(self, root: Tensor, state: Any, handle: Any, budget: Tensor, rng: Any) -> Any:
        tree, state = self.inner.propose(root, state, handle, budget, rng)
        self.seen.append((tree, budget))
        return tree, state


def test_every_registered_drafter_is_here() -> None:
    assert {config.kind for config in SETTINGS.values()} == {kind for kind in DRAFTERS if kind.startswith("eagle")}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_is_plain_decoding(name: str, seed: int) -> None:
    network = eagle_model(seed)
    prompts, settings = prompts_of(seed, network.vocab, [6, 1, 2, 12]), Settings(max_new_tokens=[20, 3, 17, 9])
    drafter = SETTINGS[name].build(network, no_load)
    for sampling in (SamplingConfig(), SamplingConfig(repetition_penalty=1.7)):
        plain = decode(network, SilentConfig().build(network, no_load), prompts, settings, sampling=sampling)
        drafted = decode(network, drafter, prompts, settings, sampling=sampling)
        assert [row.tokens for row in drafted] == [row.tokens for row in plain]


@pytest.mark.parametrize("name", SETTINGS)
def test_samples_have_the_law_of_the_target(name: str, seed: int) -> None:
    target = model(seed)
    tokens = drawn(target, SETTINGS[name].build(target, no_load), MIXED, seed, 8_192)
    assert min(p_values(tokens, target, MIXED)) > FALSE_ALARM


class Heard:
    """A law, or a handle that lends it, which remembers what it last said."""

    greedy = False

    def __init__(self, handle: Any) -> None:
        self.target, self.charge, self.law, self.inner, self.said = handle.target, handle.charge, self, handle.law, torch.empty(0)

    def __call__(self, *arguments: Any) -> Tensor:
        self.said = self.inner(*arguments)
        return self.said


class SentAsDrawn(Watched):
    """A dynamic tree of one node, with the draft's law as its q."""

    def propose(self, root: Tensor, state: Any, handle: Any, budget: Tensor, rng: Any) -> Any:
        heard = Heard(handle)
        tree, state = super().propose(root, state, heard, budget, rng)
        q = torch.cat([torch.zeros_like(heard.said), heard.said], 1)[:, : tree.size] if heard.said.numel() else None
        return Tree(tree.tokens, tree.parent, q), state


@pytest.mark.parametrize("name", ["2", "3-dynamic"])
def test_a_dynamic_tree_sent_as_drawn_is_caught(name: str, seed: int) -> None:
    """Its nodes stay for their own probability: with the draft's law as their q the output has another law."""
    target = model(5)
    config = SETTINGS[name].model_copy(update={"topk": 1, "depth": 1, "nodes": 1})
    tokens = drawn(target, SentAsDrawn(config.build(target, no_load)), WARM, seed, 2_048)
    assert min(p_values(tokens, target, WARM)) < FALSE_ALARM


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_alone_equals_the_row_in_any_batch(name: str, seed: int) -> None:
    """Also in prompts of other lengths, and beside requests that sample in other ways."""
    network = eagle_model(seed)
    prompts = prompts_of(seed, network.vocab, [5, 1, 9, 30])
    ways = [SamplingConfig(temperature=1.3), SamplingConfig(), MIXED, SamplingConfig(temperature=0.8, top_p=0.7)]
    drafter, settings = SETTINGS[name].build(network, no_load), Settings(max_new_tokens=15, budget=6)
    together = decode(network, drafter, prompts, settings, sampling=ways, seed=seed)
    for prompt, way, row in zip(prompts, ways, together, strict=True):
        alone = decode(network, drafter, [prompt], settings, sampling=way, seed=seed)[0]
        assert alone.tokens == row.tokens


@pytest.mark.parametrize("name", SETTINGS)
def test_the_budget_of_each_row_is_kept(name: str, seed: int) -> None:
    """Padding comes last, and every node hangs from one that is there."""
    network = eagle_model(seed)
    watched = Watched(SETTINGS[name].build(network, no_load))
    settings = Settings(max_new_tokens=[3, 12, 1, 7], budget=5)
    decode(network, watched, prompts_of(seed, network.vocab, [4, 2, 3, 1]), settings, sampling=WARM, seed=seed)
    grew = 0
    for tree, budget in watched.seen:
        index = torch.arange(tree.size)
        sizes = tree.valid.sum(1)
        assert torch.equal(tree.valid, index < sizes.unsqueeze(1)) and bool((sizes <= budget).all())
        assert bool(((tree.parent < index) & (tree.parent[:, :1] == -1)).all())
        grew = max(grew, int(sizes.max()))
    assert grew > 2


@pytest.mark.parametrize("name", SETTINGS)
def test_drafts_are_accepted_and_refused(name: str, seed: int) -> None:
    target = model(AGREEING)
    drafter = SETTINGS[name].build(target, no_load)
    rows = decode(target, drafter, [PROMPT], Settings(LENGTH + 16), sampling=WARM, seed=seed, samples=256)
    assert {accepted for row in rows for accepted in row.accepted} == {0, 1, 2, 3}


class Lent:
    """What the loop lends a drafter that borrows nothing but laws."""

    def __init__(self, target: Decoder, rows: int) -> None:
        self.target, self.law, self.calls = target, SamplingConfig(temperature=1.0).build(rows, target.vocab), 0

    def charge(self, calls: int) -> None:
        self.calls += calls


class Round:
    """One batch by hand: prompts, and as many rounds of proposing and verifying as asked for."""

    def __init__(self, network: Decoder, drafter: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        self.network, self.drafter, self.rng = network, drafter, CounterRng.seeded(seeds)
        chain, rows = prompt_chain(prompts, "cpu"), len(prompts)
        empty = network.init_state(rows, 64, device="cpu", dtype=torch.float64)
        first = prefill(network, chain, empty, drafter.taps)
        self.state, self.drafts = first.state, drafter.init(chain, first.hidden, 64)
        self.root = first.logits.argmax(-1)

    def propose(self) -> Tree:
        rows = len(self.root)
        tree, self.drafts = self.drafter.propose(
            self.root, self.drafts, Lent(self.network, rows), torch.full((rows,), 8), self.rng
        )
        return tree

    def step(self) -> Tree:
        tree = self.propose()
        output = self.network.extend(tree, self.state, taps=self.drafter.taps)
        assert output.logits is not None
        verdict: Verdict = verify(tree, output.logits.softmax(-1), self.rng.split("verify"))
        self.state = output.state.commit(verdict.path, verdict.keep)
        self.drafts = self.drafter.observe(tree, verdict, output.hidden, self.drafts)
        self.root = verdict.next
        return tree


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_states_join_and_fork(name: str, seed: int) -> None:
    """Batches joined after a round draft what they would have drafted apart; a copied row drafts the same again."""
    network = eagle_model(seed)
    drafter, prompts, seeds = SETTINGS[name].build(network, no_load), prompts_of(seed, network.vocab, [5, 9, 1]), [3, 1, 4]
    parts = [Round(network, drafter, prompts[:2], seeds[:2]), Round(network, drafter, prompts[2:], seeds[2:])]
    for part in parts:
        part.step()
    joined, rows = Round(network, drafter, prompts, seeds), torch.tensor([2, 0, 1, 2])
    joined.root, joined.rng = torch.cat([part.root for part in parts])[rows], joined.rng.fork(rows)
    joined.drafts = parts[0].drafts.fork(torch.arange(2)).join(parts[1].drafts.fork(torch.arange(1))).fork(rows)
    trees, both = [part.propose() for part in parts], joined.propose()
    for i, row in enumerate(rows.tolist()):
        tree, own = (trees[0], row) if row < 2 else (trees[1], 0)
        size = int(tree.valid[own].sum())
        assert int(both.valid[i].sum()) == size
        assert torch.equal(both.tokens[i, :size], tree.tokens[own, :size])
        assert torch.equal(both.parent[i, :size], tree.parent[own, :size])
    assert joined.drafts.nbytes() > 0


@torch.no_grad()
def test_a_long_prompt_is_read_in_chunks(seed: int) -> None:
    """The cache after it is that of one call over the whole prompt."""
    network, length = eagle_model(seed), 600
    drafter = Eagle3Config().build(network, no_load)
    chain = prompt_chain(prompts_of(seed, network.vocab, [length]), "cpu")
    empty = network.init_state(1, length, device="cpu", dtype=torch.float64)
    hidden = prefill(network, chain, empty, drafter.taps, chunk=length).hidden
    found = drafter.init(chain, hidden, length).cache
    read = drafter.heads.fuse(torch.cat([hidden[tap] for tap in drafter.taps], -1)[:, :-1])
    whole = drafter.heads.init_state(1, length, device="cpu", dtype=torch.float64)
    _, whole = drafter.heads.extend(read, network.embed(chain.tokens[:, 1:]), Context(), whole)
    torch.testing.assert_close(found.cache[:, :, : length - 1], whole.cache[:, :, : length - 1], rtol=0, atol=1e-10)


def test_refusals(seed: int) -> None:
    network = eagle_model(seed)
    with pytest.raises(ValueError, match=r"^drafter.branching=\(12,\): more children than the 11 tokens"):
        EagleConfig(branching=(12,)).build(network, no_load)
    with pytest.raises(ValueError, match=r"^drafter.topk=8: more children than the 7 tokens that can be drafted; lower it$"):
        Eagle3Config(topk=8).build(network, no_load)
    bare = eagle_model(seed, heads=[{"kind": "eagle3", "layers": [0, 1, 2]}])
    for config in (EagleConfig(), Eagle2Config()):
        with pytest.raises(ValueError, match=r"^drafter='eagle': the model has no eagle heads; train some"):
            config.build(bare, no_load)
    deep = eagle_model(seed, depth=3, heads=[{"kind": "eagle3", "layers": [0, 1, 3]}])
    network.extra["eagle3"] = deep.extra["eagle3"]
    with pytest.raises(ValueError, match=r"^heads: they read layer.2, the target has layer.0 .. layer.1; "):
        Eagle3Config().build(network, no_load)
    stray = eagle_model(seed)
    stray.heads["eagle3"].get_buffer("d2t")[-1] = 9
    with pytest.raises(ValueError, match=r"^heads.d2t: leads outside of the target's 11 tokens; "):
        Eagle3Config().build(stray, no_load)
    for path, message in (("narrow", "width of 8"), ("wordy", "13 tokens")):
        other = {"narrow": {"width": 8, "mixers": [{"kind": "attention", "head_width": 4}]}, "wordy": {"vocab": 13}}[path]
        owner = eagle_model(seed, **{"heads": [{"kind": "eagle"}, {"kind": "eagle3", "layers": [0, 1, 2]}], **other})
        with pytest.raises(ValueError, match=message):
            EagleConfig(path=path).build(network, lambda _, owner=owner: owner)
