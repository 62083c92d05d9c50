"""LayerSkip's dropout, loss weights and curricula against its formulas (arXiv 2404.16710, section 4), written out."""

import math
from typing import Any

import pytest
import torch
from sequences import TIGHT, VOCAB, decoder
from torch import Tensor

from fewstep.core.mixer import Context
from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.training.objectives.early_exit import LayerSkip, LayerSkipConfig

L = 6


def at_step(step: int, **fields: Any) -> LayerSkip:
    objective = LayerSkipConfig(**fields).build()
    objective.load_state_dict({"step": step})
    return objective


@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0])
def test_the_weights_of_all_exits(scale: float) -> None:
    e = [scale * sum(range(layer + 1)) for layer in range(L - 1)] + [L - 1 + scale * sum(range(L - 1))]
    assert at_step(3, scale=scale, curriculum="all").weights(L) == pytest.approx([weight / sum(e) for weight in e])


def test_the_rotational_curriculum_takes_turns() -> None:
    for step in range(9):
        counted = [layer for layer, weight in enumerate(at_step(step, every=3).weights(L)) if weight]
        assert counted == [layer for layer in range(1, L) if layer % 3 == step % 3 or layer == L - 1]  # exit 0 weighs nothing
        assert sum(at_step(step, every=3).weights(L)) == pytest.approx(1)


def test_the_gradual_curriculum_adds_exits_from_the_last_downwards() -> None:
    counted = [
        [layer for layer, weight in enumerate(at_step(step, curriculum="gradual", steps=120).weights(L)) if weight]
        for step in range(0, 120, 10)  # T / 2L
    ]
    assert counted == [list(range(max(1, L - 1 - turn), L)) for turn in range(12)]


def test_dropout_grows_with_depth_and_time() -> None:
    for step in (0, 7, 99, 500):
        time = min(step, 99)
        s = math.exp(time * math.log(2) / 99) - 1
        d = [math.exp(layer * math.log(2) / (L - 1)) - 1 for layer in range(L)]
        assert at_step(step, dropout=0.3, steps=100).rates(L) == pytest.approx([0.3 * s * x for x in d])
    assert at_step(0, dropout=0.3).rates(L)[-1] == pytest.approx(0.3)


def literal_loss(network: Any, tokens: Tensor, weights: list[float], kept: Tensor) -> Tensor:
    """Sum over exits of weight times the mean surprise of each next token, each sample through the blocks it keeps."""
    total = torch.zeros((), dtype=torch.float64)
    count = tokens.numel() - len(tokens)
    for row, sample in enumerate(tokens):
        x = network.embedding.weight[sample][None]
        for layer, block in enumerate(network.blocks):
            x = block(x, Context(torch.arange(len(sample))[None]))[0] if kept[row, layer] else x
            scores = network.norm(x[0]) @ network.head.weight.T
            for i in range(len(sample) - 1):
                total = total + weights[layer] * (scores[i].exp().sum().log() - scores[i, sample[i + 1]]) / count
    return total


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_loss_is_its_formula(step: int, seed: int) -> None:
    network, tokens = decoder(depth=L).train(), torch.randint(VOCAB, (5, 6))
    objective, rng = at_step(step, dropout=0.7, every=3), CounterRng.seeded(range(seed, seed + 5))
    kept = rng.split("layers").uniform(L) >= torch.tensor(objective.rates(L)).double()
    assert bool(kept[:, 0].all()) and not bool(kept.all())
    loss = objective.loss(network, Batch(tokens), rng)
    torch.testing.assert_close(loss.value, literal_loss(network, tokens, objective.weights(L), kept), **TIGHT)
    everything = literal_loss(network, tokens, objective.weights(L), torch.ones_like(kept))
    torch.testing.assert_close(objective.loss(network.eval(), Batch(tokens), rng).value, everything, **TIGHT)
    assert not any(block._forward_hooks for block in network.blocks)


def test_blocks_are_dropped_as_often_as_said(seed: int) -> None:
    network, count = decoder(depth=L).train(), 4000
    objective = at_step(0, dropout=0.5)
    kept = objective._kept(network, CounterRng.seeded(range(seed, seed + count)))
    assert kept is not None
    rates = torch.tensor(objective.rates(L)).double()
    error = (1 - kept.double().mean(0) - rates).abs()
    assert bool((error <= 5.5 * (rates * (1 - rates) / count).sqrt()).all())


def test_training_teaches_the_early_exits(seed: int) -> None:
    network, objective = decoder(depth=3).float().train(), LayerSkipConfig(every=1).build()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    tokens = (torch.randint(VOCAB, (16, 1)) + torch.arange(8)) % VOCAB
    history = []
    for step in range(40):
        loss = objective.loss(network, Batch(tokens), CounterRng.seeded(range(16)).at(step))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        objective.after_step(network)
        history.append(loss.metrics)
    assert history[-1]["early_exit"] < 0.7 * history[0]["early_exit"]
    assert history[-1]["next_token"] < 0.7 * history[0]["next_token"]
    assert objective.state_dict() == {"step": 40}


def test_refusals(seed: int) -> None:
    batch, rng = Batch(torch.randint(VOCAB, (2, 5))), CounterRng.seeded([seed, seed])
    with pytest.raises(ValueError, match=r"^model.depth=1: [^\n]*; [^\n]*$"):
        LayerSkipConfig().build().loss(decoder(depth=1), batch, rng)
    network = decoder().train()
    network.recompute = True
    with pytest.raises(ValueError, match=r"^objective.dropout: [^\n]*; [^\n]*$"):
        LayerSkipConfig().build().loss(network, batch, rng)
    with pytest.raises(ValueError, match=r"^steps=0: [^\n]*; [^\n]*$"):
        parse(LayerSkipConfig, {"curriculum": "gradual"})
