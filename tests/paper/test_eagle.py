"""EAGLE-1, 2 and 3 against references written from the papers: one vector at a time, no cache, no batch, all of it in loops."""

import cmath
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from eagles import HEAD_WIDTH, QUERY_HEADS, WIDTH, eagle_model, no_load
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.decode.drafters.eagle import Eagle2Config, Eagle3Config, EagleConfig
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.models.decoder import Decoder
from fewstep.training.objectives.eagle import Eagle3Config as Eagle3Objective
from fewstep.training.objectives.eagle import EagleConfig as EagleObjective

KINDS = ("eagle", "eagle3")
BASE, EPS = 10000.0, 1e-6
EXACT = 1e-10


# --- the papers, literally -------------------------------------------------------------------------------------------------


def times(linear: Any, x: Sequence[float]) -> list[float]:
    rows, bias = linear.weight.tolist(), [0.0] * linear.out_features if linear.bias is None else linear.bias.tolist()
    return [sum(w * value for w, value in zip(row, x, strict=True)) + b for row, b in zip(rows, bias, strict=True)]


def rms(gain: Any, x: Sequence[float]) -> list[float]:
    scale = math.sqrt(sum(value * value for value in x) / len(x) + EPS)
    return [g * value / scale for g, value in zip(gain.weight.tolist(), x, strict=True)]


def turned(x: Sequence[float], position: int) -> list[float]:
    """Rotary position: channels i and i + E/2 as the real and imaginary part of a number that is turned."""
    half = len(x) // 2
    numbers = [complex(x[i], x[i + half]) * cmath.exp(1j * position * BASE ** (-i / half)) for i in range(half)]
    return [number.real for number in numbers] + [number.imag for number in numbers]


def attention(mixer: Any, inputs: Sequence[Sequence[float]]) -> list[float]:
    """The output at the last of `inputs`, which sees all of them; two query heads share one of keys and values."""
    size = HEAD_WIDTH
    projected = [times(mixer.qkv, x) for x in inputs]
    keys = [turned(p[QUERY_HEADS * size : (QUERY_HEADS + 1) * size], i) for i, p in enumerate(projected)]
    values = [p[(QUERY_HEADS + 1) * size :] for p in projected]
    mixed: list[float] = []
    for head in range(QUERY_HEADS):
        query = turned(projected[-1][head * size : (head + 1) * size], len(inputs) - 1)
        scores = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(size) for key in keys]
        weights = [math.exp(score - max(scores)) for score in scores]
        mixed += [sum(w * value[c] for w, value in zip(weights, values, strict=True)) / sum(weights) for c in range(size)]
    return times(mixer.out, mixed)


def mlp(network: Any, x: Sequence[float]) -> list[float]:
    up = times(network.up, x)
    half = len(up) // 2
    return times(network.down, [gate / (1 + math.exp(-gate)) * value for gate, value in zip(up[:half], up[half:], strict=True)])


def added(x: Sequence[float], y: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(x, y, strict=True)]


def drafted(model: Decoder, kind: str, text: Sequence[int], path: Sequence[int]) -> list[list[float]]:
    """The outputs of the network after the committed `text` and after every token of the drafted `path`.

    EAGLE-1: f'_{i+1} = block(fc [e_{i+1}; f_i]), a block without its first norm. EAGLE-3: the residual is g_i, fused from three
    layers; attention reads [norm(e_{i+1}); norm(g_i)]. Where features are not known, the network's own output stands for them.
    """
    heads: Any = model.heads[kind]
    tapped = model(torch.tensor([list(text)]), taps=heads.taps).hidden
    features = torch.cat([tapped[tap][0] for tap in heads.taps], -1)[: len(text) - 1].tolist()
    if kind == "eagle3":
        features = [times(heads.fc, feature) for feature in features]
    embeddings = model.embedding.weight.tolist()
    inputs: list[list[float]] = []
    outputs: list[list[float]] = []
    for i, token in enumerate([*text[1:], *path]):
        hidden = features[i] if i < len(features) else outputs[i - 1]
        embedded = embeddings[token]
        if kind == "eagle":
            residual = times(heads.fc, [*embedded, *hidden])
            inputs.append(residual)
        else:
            residual = hidden
            inputs.append([*rms(heads.embed_norm, embedded), *rms(heads.hidden_norm, hidden)])
        x = added(residual, attention(heads.block.mixer, inputs))
        outputs.append(added(x, mlp(heads.block.mlp, rms(heads.block.mlp_norm, x))))
    return outputs[len(features) - 1 :]


def law(model: Decoder, kind: str, output: Sequence[float]) -> list[float]:
    """The law over the whole vocabulary; EAGLE-3 has its own norm, unembedding and tokens."""
    heads: Any = model.heads[kind]
    if kind == "eagle":
        scores = dict(enumerate(times(model.head, output)))
    else:
        own = times(heads.head, rms(heads.norm, output))
        scores = {draft + offset: score for (draft, offset), score in zip(enumerate(heads.d2t.tolist()), own, strict=True)}
    total = sum(math.exp(score) for score in scores.values())
    return [math.exp(scores[token]) / total if token in scores else 0.0 for token in range(model.vocab)]


# --- drafting ----------------------------------------------------------------------------------------------------------------


class Recorder:
    """A drafter that keeps what another one proposed."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.init, self.observe = inner, inner.init, inner.observe
        self.taps, self.prompt_taps = inner.taps, inner.prompt_taps
        self.trees: list[Any] = []

    def propose(self, *arguments: Any) -> Any:
        tree, state = self.inner.propose(*arguments)
        self.trees.append(tree)
        return tree, state


def proposals(model: Decoder, config: Any, seed: int, tokens: int, budget: int = 16) -> list[tuple[list[int], Any]]:
    """What one request was proposed at temperature 1: the committed text, and the tree, whose node 0 is its last token."""
    recorder = Recorder(config.build(model, no_load))
    prompt = torch.randint(0, model.vocab, (4,)).tolist()
    sampling, settings = SamplingConfig(temperature=1.0), Settings(max_new_tokens=tokens, budget=budget)
    out = decode(model, recorder, [prompt], settings, sampling=sampling, seed=seed)[0]
    found, emitted = [], 1
    for tree, accepted in zip(recorder.trees, out.accepted, strict=True):
        found.append((prompt + out.tokens[:emitted], tree))
        emitted += accepted + 1
    return found


def path_to(tree: Any, node: int) -> list[int]:
    """The drafted tokens from the root's child down to `node`."""
    path: list[int] = []
    while node > 0:
        path.insert(0, int(tree.tokens[0, node]))
        node = int(tree.parent[0, node])
    return path


@pytest.mark.parametrize("branching", [(1, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_have_the_law_of_the_network_run_literally(kind: str, branching: tuple[int, ...], seed: int) -> None:
    """Node by node: q is the law at its parent, without the siblings drawn before it."""
    model = eagle_model(seed)
    config: Any = (EagleConfig if kind == "eagle" else Eagle3Config)(branching=branching)
    found = proposals(model, config, seed, 14)
    for text, tree in found[:2] + found[-2:]:  # the last follow drafts accepted and refused
        assert int(tree.tokens[0, 0]) == text[-1]
        for node in range(1, tree.size):
            if int(tree.parent[0, node]) < 0:
                continue
            q = torch.tensor(law(model, kind, drafted(model, kind, text, path_to(tree, node)[:-1])[-1]), dtype=torch.float64)
            earlier = [sibling for sibling in range(1, node) if tree.parent[0, sibling] == tree.parent[0, node]]
            q[tree.tokens[0, earlier]] = 0.0
            torch.testing.assert_close(tree.q[0, node], q / q.sum(), rtol=0, atol=EXACT)


def grown(model: Decoder, kind: str, text: list[int], topk: int, depth: int, nodes: int) -> set[tuple[int, ...]]:
    """EAGLE-2's growing and reranking over paths."""
    score: dict[tuple[int, ...], float] = {}
    level: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for _ in range(depth):
        children = {}
        for path, confidence in level:
            after = law(model, kind, drafted(model, kind, text, path)[-1])
            for token in sorted(range(model.vocab), key=lambda token: -after[token])[:topk]:
                if after[token] > 0:
                    children[(*path, token)] = confidence * after[token]
        score |= children
        level = sorted(children.items(), key=lambda child: -child[1])[:topk]
    return set(sorted(score, key=lambda path: -score[path])[:nodes])


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_trees_are_the_reranked_ones(kind: str, seed: int) -> None:
    model = eagle_model(seed)
    config: Any = (Eagle2Config if kind == "eagle" else Eagle3Config)(topk=3, depth=3, nodes=9)
    shapes = set()
    for text, tree in proposals(model, config, seed, 10, budget=12)[:3]:
        budget = min(12, 4 + 10 - len(text)) - 1
        paths = [tuple(path_to(tree, node)) for node in range(1, tree.size)]
        assert len(set(paths)) == len(paths)
        assert set(paths) == grown(model, kind, text, 3, min(3, budget), min(9, budget))
        assert tree.q is None and all(tree.parent[0, node] < node for node in range(tree.size))
        shapes.add(tuple(tree.parent[0].tolist()))
    assert shapes


def test_a_dynamic_tree_is_the_best_of_all_trees(seed: int) -> None:
    """With topk at least `nodes`, no other tree of as many nodes has a greater sum of confidences: every path is enumerated."""
    model = eagle_model(seed, vocab=4, draft_vocab=None)
    text, tree = proposals(model, Eagle2Config(topk=4, depth=3, nodes=4), seed, 8)[0]
    confidence: dict[tuple[int, ...], float] = {}
    for depth in range(3):
        for path in product(range(4), repeat=depth):
            after = law(model, "eagle", drafted(model, "eagle", text, path)[-1])
            confidence |= {(*path, token): confidence.get(path, 1.0) * p for token, p in enumerate(after)}
    best = sorted(confidence, key=lambda path: -confidence[path])[:4]
    assert {tuple(path_to(tree, node)) for node in range(1, tree.size)} == set(best)


# --- training ----------------------------------------------------------------------------------------------------------------


def target_law(model: Decoder, text: Sequence[int]) -> list[float]:
    """The trunk's logits after `text`."""
    logits: list[float] = model.unembed(model(torch.tensor([list(text)])).final)[0, -1].tolist()
    return logits


def test_the_training_time_test_is_drafting_along_the_text(seed: int) -> None:
    """Each term is what drafting from position i finds j levels down if the text is what was drafted."""
    model, steps, decay = eagle_model(seed), 3, 0.8
    heads: Any = model.heads["eagle3"]
    text = torch.randint(0, model.vocab, (7,)).tolist()
    loss = Eagle3Objective(steps=steps, decay=decay).build().loss(model, Batch(torch.tensor([text])), CounterRng.seeded([0]))
    known, total = heads.ids.tolist(), 0.0
    for i in range(len(text) - 1):
        for j, output in enumerate(drafted(model, "eagle3", text[: i + 2], text[i + 2 : i + 1 + steps])):
            logits = target_law(model, text[: i + 2 + j])
            if logits.index(max(logits)) not in known:
                continue
            mass = sum(math.exp(logits[token]) for token in known)
            q = law(model, "eagle3", output)
            total -= decay**j * sum(math.exp(logits[token]) / mass * math.log(q[token]) for token in known)
    assert loss.units == len(text) - 1
    assert loss.value.item() == pytest.approx(total / (len(text) - 1), abs=EXACT)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_loss_of_eagle_1_is_its_definition(noise: float, seed: int) -> None:
    model = eagle_model(seed)
    heads: Any = model.heads["eagle"]
    text = torch.randint(0, model.vocab, (6,)).tolist()
    heads.train()
    rng = CounterRng.seeded([seed])
    loss = EagleObjective(noise=noise).build().loss(model, Batch(torch.tensor([text])), rng)
    features = model(torch.tensor([text])).final[0]
    read = features + noise * (2 * rng.uniform(len(text), WIDTH)[0] - 1)
    embeddings, inputs, distance, surprise = model.embedding.weight.tolist(), [], 0.0, 0.0
    for i in range(len(text) - 1):
        inputs.append(times(heads.fc, [*embeddings[text[i + 1]], *read[i].tolist()]))
        x = added(inputs[-1], attention(heads.block.mixer, inputs))
        output = added(x, mlp(heads.block.mlp, rms(heads.block.mlp_norm, x)))
        gaps = [abs(a - b) for a, b in zip(output, features[i + 1].tolist(), strict=True)]
        distance += sum(gap - 0.5 if gap > 1 else 0.5 * gap * gap for gap in gaps) / WIDTH
        p, q = softmax(times(model.head, features[i + 1].tolist())), law(model, "eagle", output)
        surprise -= sum(a * math.log(b) for a, b in zip(p, q, strict=True))
    assert loss.value.item() == pytest.approx((distance + 0.1 * surprise) / (len(text) - 1), abs=EXACT)


def softmax(scores: Sequence[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def test_the_draft_vocabulary_is_the_likeliest_tokens(seed: int) -> None:
    heads: Any = eagle_model(seed).heads["eagle3"]
    counts = torch.tensor([3, 9, 0, 9, 1, 1, 5, 5, 2, 0, 1])
    unembedding: Tensor = torch.randn(11, WIDTH, dtype=torch.float64)
    heads.restrict(counts, unembedding)
    assert heads.ids.tolist() == [0, 1, 3, 4, 6, 7, 8]  # of the three tokens seen once, the first
    assert heads.d2t.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert heads.t2d.nonzero().squeeze(1).tolist() == heads.ids.tolist()
    assert torch.equal(heads.head.weight, unembedding[heads.ids])
