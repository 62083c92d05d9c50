"""The kernels at the ends of a call, and a greedy draft of sequential modules in one: what their operators give, bit for bit."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fewstep.core.draft import Verdict
from fewstep.core.mixer import Tree
from fewstep.core.random import CounterRng
from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.drafters.mtp import HeadsState, SequentialDrafter
from fewstep.decode.laws import Sampling, SamplingConfig
from fewstep.decode.prefill import prefill, prompt_chain
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.nn import kernels
from fewstep.nn.heads import SequentialHeadsConfig
from fewstep.nn.packed import pack

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")
VOCAB = 97
CONFIG = DecoderConfig(
    vocab=VOCAB, width=48, depth=2, query_heads=3, hidden=80, heads=(SequentialHeadsConfig(depth=3),), tied=False, embed_std=1.0
)


def network(seed: int, dtype: torch.dtype) -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = CONFIG.build()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return pack(made.to(dtype).eval())  # type: ignore[return-value]


class Lent:
    """A handle with nothing but a law."""

    def __init__(self, law: Sampling) -> None:
        self.law, self.calls = law, 0

    def charge(self, calls: int) -> None:
        self.calls += calls


def begun(target: Decoder, drafter: SequentialDrafter, prompts: Sequence[Sequence[int]], dtype: torch.dtype) -> HeadsState:
    chain = prompt_chain(prompts, "cpu")
    first = prefill(target, chain, target.init_state(len(prompts), 64, device="cpu", dtype=dtype), drafter.taps)
    return drafter.init(chain, first.hidden, 64)


def proposed(
    drafter: SequentialDrafter, state: HeadsState, roots: Tensor, budget: Tensor, law: Sampling
) -> tuple[Tree, HeadsState, int]:
    handle = Lent(law)
    tree, state = drafter.propose(roots, state, handle, budget, CounterRng.seeded([0] * len(roots)))  # type: ignore[arg-type]
    return tree, state, handle.calls


@pytest.mark.parametrize(
    ("dtype", "branching"),  # in bfloat16 equal scores are common, and topk takes any of them
    [*((torch.float32, levels) for levels in ((1, 1, 1), (1,), (3, 2, 1), (2, 2))), (torch.bfloat16, (1, 1, 1))],
)
@pytest.mark.parametrize("lengths", [(9,), (7, 7), (3, 11, 6)])
@torch.inference_mode()
def test_one_call_drafts_what_the_operators_draft(
    seed: int, dtype: torch.dtype, branching: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    draw = torch.Generator().manual_seed(seed)
    target, rows = network(seed, dtype), len(lengths)
    law = Sampling.of([SamplingConfig(temperature=0.0)] * rows, VOCAB)
    prompts = [torch.randint(VOCAB, (length,), generator=draw).tolist() for length in lengths]
    fused = DRAFTERS["mtp"](branching=branching, mode="chosen").build(target, lambda path: target)  # type: ignore[call-arg]
    plain = copy.copy(fused)
    plain._packed = None
    states = [begun(target, drafter, prompts, dtype) for drafter in (fused, plain)]
    for step in range(4):
        roots = torch.randint(VOCAB, (rows,), generator=draw)
        budget = torch.randint(1, 12, (rows,), generator=draw) if step == 3 else torch.full((rows,), 32)
        results = [proposed(d, s, roots, budget, law) for d, s in zip((fused, plain), states, strict=True)]
        (tree, one, calls), (twin, other, twins) = results
        assert torch.equal(tree.parent, twin.parent) and calls == twins == len(branching)
        assert torch.equal(tree.tokens[tree.valid], twin.tokens[twin.valid])
        assert one.carry is not None and other.carry is not None and torch.equal(one.carry, other.carry)
        keep = torch.randint(1, 1 + min(2, tree.size), (rows,), generator=draw)
        path = torch.zeros_like(tree.tokens)
        path[:, 1:2] = 1
        hidden = {"final": torch.randn(rows, tree.size, CONFIG.width, generator=draw).to(dtype)}
        verdict = Verdict(path, keep, roots)
        states = [d.observe(tree, verdict, hidden, s) for d, s in zip((fused, plain), (one, other), strict=True)]
        for mine, theirs in zip(states[0].caches, states[1].caches, strict=True):
            length = mine.slots.lengths  # type: ignore[attr-defined]
            assert torch.equal(length, theirs.slots.lengths)  # type: ignore[attr-defined]
            for row, end in enumerate(length.tolist()):
                assert torch.equal(mine.cache[row, :, :end], theirs.cache[row, :, :end])  # type: ignore[attr-defined]


@torch.inference_mode()
def test_a_history_that_counts_is_left_to_the_operators(seed: int) -> None:
    target = network(seed, torch.float32)
    fused = DRAFTERS["mtp"]().build(target, lambda path: target)
    state = begun(target, fused, [[1, 2, 3, 4, 5]], torch.float32)
    law = Sampling.of([SamplingConfig(temperature=0.0, repetition_penalty=1e9)], VOCAB)
    assert not law.greedy
    for _ in range(2):
        tree, state, _ = proposed(fused, state, torch.tensor([6]), torch.tensor([8]), law)
        assert len(set(tree.tokens[0].tolist())) == tree.size  # a token already on the path is never the most likely one
        state = fused.observe(
            tree,
            Verdict(torch.zeros_like(tree.tokens), torch.tensor([1]), torch.tensor([6])),
            {"final": torch.randn(1, tree.size, CONFIG.width)},
            state,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_is_the_first_of_the_largest(seed: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-5, 6, (40, 5, 67), generator=draw).to(dtype)  # ties everywhere
    assert torch.equal(kernels.argmax(x), (x == x.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1))
    y = torch.randn(50, 2049, generator=draw).to(dtype)
    assert torch.equal(kernels.argmax(y.t().contiguous().t()), y.argmax(-1))
    y[3, 17], y[4] = torch.nan, -torch.inf
    assert kernels.argmax(y)[3] == 17 and kernels.argmax(y)[4] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_join_is_its_modules(seed: int, dtype: torch.dtype, batch: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    module = network(seed, dtype).heads["mtp"].module(2)  # type: ignore[operator]
    assert module.packed is not None
    embedded, hidden = (torch.randn(batch, count, CONFIG.width, generator=draw).to(dtype) for count in (4, 6))
    reads = torch.randint(6, (batch, 4), generator=draw)
    joined = module.join(hidden, embedded, reads)
    module.packed = None
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(joined, module.join(hidden, embedded, reads), **tolerance)  # type: ignore[arg-type]


@torch.no_grad()
def test_what_lies_outside_is_refused(seed: int) -> None:
    module = network(seed, torch.float32).heads["mtp"].module(1)  # type: ignore[operator]
    x = torch.ones(1, 2, CONFIG.width)
    with pytest.raises(ValueError, match="reads="):
        module.join(x, x, torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match="a, b and reads"):
        module.join(x.double(), x, torch.tensor([[0, 1]]))
