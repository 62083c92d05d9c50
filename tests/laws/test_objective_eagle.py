"""The laws of the objectives of EAGLE's networks; what their losses are is in the paper's tests."""

from typing import Any

import pytest
import torch
from eagles import WIDTH, eagle_model
from sequences import TIGHT
from test_objective import taught
from torch import Tensor

from fewstep.core.mixer import Context
from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.decode.drafters.eagle import Eagle3Config as Eagle3Drafter
from fewstep.decode.drafters.eagle import EagleConfig as EagleDrafter
from fewstep.decode.generate import decode
from fewstep.decode.stream import Settings
from fewstep.training.objectives.ahead import Foresees
from fewstep.training.objectives.eagle import Eagle3Config, EagleConfig
from fewstep.training.objectives.next_token import NextTokenConfig

OBJECTIVES: dict[str, Any] = {"eagle": EagleConfig(), "eagle3": Eagle3Config(steps=3)}
LENGTHS = ((6, 1, 4), (2, 2, 3, 3), (9,))


def ragged_batch(width: int = 13) -> Batch:
    """Packed sequences, some shorter than the unrolling, and padding."""
    rows = [[i for i, length in enumerate(row) for _ in range(length)] for row in LENGTHS]
    segments = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    return Batch(torch.randint(11, segments.shape), segments)


def loss_of(name: str, network: Any, batch: Batch, rows: Tensor | None = None) -> Any:
    rng = CounterRng.seeded(range(len(batch.tokens))) if rows is None else CounterRng.seeded(rows)
    return OBJECTIVES[name].build().loss(network, batch, rng)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_sequences_add_up(name: str, seed: int) -> None:
    """A batch is its sequences one by one, weighted by their units."""
    network, batch = eagle_model(seed), ragged_batch()
    assert batch.segments is not None
    whole, total, units = loss_of(name, network, batch), 0.0, 0
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        for segment in range(int(segments.max()) + 1):
            part = loss_of(name, network, Batch(tokens[segments == segment].unsqueeze(0)))
            total, units = total + part.value.item() * part.units, units + part.units
    assert units == whole.units == sum(length - 1 for row in LENGTHS for length in row)
    assert whole.value.item() == pytest.approx(total / units, rel=1e-10)
    assert all(not metric.requires_grad and metric.dim() == 0 for metric in whole.metrics.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_does_not_count(name: str, seed: int) -> None:
    network, batch = eagle_model(seed), ragged_batch()
    assert batch.segments is not None
    other = Batch(torch.where(batch.segments < 0, (batch.tokens + 1) % 11, batch.tokens), batch.segments)
    torch.testing.assert_close(loss_of(name, network, other).value, loss_of(name, network, batch).value, rtol=0, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_to_score(name: str, seed: int) -> None:
    """A loss of zero that can be differentiated, not a NaN."""
    for segments in (torch.full((2, 6), -1), torch.arange(6).expand(2, -1)):
        network = eagle_model(seed)
        loss = loss_of(name, network, Batch(torch.randint(11, (2, 6)), segments))
        assert loss.units == 0 and loss.value == 0
        loss.value.backward()
        assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)
    loss = loss_of(name, eagle_model(seed), Batch(torch.randint(11, (2, 1))))
    assert loss.units == 0 and loss.value == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_right_and_reach_the_network_alone(name: str, seed: int) -> None:
    network, batch = eagle_model(seed, draft_vocab=None), ragged_batch()
    loss_of(name, network, batch).value.backward()
    trained = []
    for parameter_name, parameter in network.named_parameters():
        own = parameter_name.startswith(f"extra.{name}.")
        used = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert used == own, parameter_name
        trained += [parameter] if own else []
    assert torch.autograd.gradcheck(lambda *_: loss_of(name, network, batch).value, tuple(trained), fast_mode=True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_falls(name: str, seed: int) -> None:
    """On a text that counts upwards and a target that knows it, in thirty steps, and with it what the heads get wrong."""
    network = eagle_model(seed).float().train()
    tokens = (torch.randint(11, (16, 1)) + torch.arange(8)) % 11
    taught(network, NextTokenConfig().build(), [p for n, p in network.named_parameters() if "extra" not in n], tokens, seed)
    history = taught(network, OBJECTIVES[name].build(), list(network.heads[name].parameters()), tokens, seed)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1][f"{name}_1"] < history[0][f"{name}_1"]
    assert history[-1][f"{name}_1_accuracy"] > history[0][f"{name}_1_accuracy"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_noise_is_for_training_and_belongs_to_the_row(name: str, seed: int) -> None:
    network, batch = eagle_model(seed), Batch(torch.randint(11, (2, 7)))
    quiet = loss_of(name, network, batch)
    torch.testing.assert_close(quiet.value, loss_of(name, network, batch, torch.tensor([8, 9])).value, rtol=0, atol=0)
    network.train()
    noisy = [loss_of(name, network, batch, torch.tensor(rows)).value for rows in ([0, 1], [0, 1], [0, 2])]
    assert noisy[0] == noisy[1]
    assert (noisy[0] != noisy[2]) == (name == "eagle")
    assert ((noisy[0] - quiet.value).abs() > 1e-9) == (name == "eagle")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_foreseen_is_what_is_drafted(name: str, seed: int) -> None:
    """Level by level, wherever the text is what was drafted before it."""
    network = eagle_model(seed)
    objective, depth = OBJECTIVES[name].build(), 3
    assert isinstance(objective, Foresees)
    drafter = {"eagle": EagleDrafter, "eagle3": Eagle3Drafter}[name](branching=(1,) * depth).build(network, lambda path: network)
    drafts: list[list[int]] = []
    inner = drafter.propose

    def propose(*arguments: Any) -> Any:
        tree, state = inner(*arguments)
        drafts.append(tree.tokens[0].tolist())
        return tree, state

    drafter.propose = propose  # type: ignore[method-assign]
    prompt = torch.randint(11, (6,)).tolist()
    decode(network, drafter, [prompt], Settings(max_new_tokens=5))
    first = drafts[0]  # the root is the token that came with the prompt
    with torch.no_grad():
        foreseen = list(objective.foresee(network, Batch(torch.tensor([[*prompt, *first]]))))
    assert [int(logits[0, len(prompt) - 1].argmax()) for logits in foreseen[:depth]] == first[1:]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_states_and_models_of_another_kind_are_refused(name: str, seed: int) -> None:
    objective = OBJECTIVES[name].build()
    objective.load_state_dict(objective.state_dict())
    with pytest.raises(ValueError, match=rf"^objective state [^\n]*{name} keeps none; [^\n]*$"):
        objective.load_state_dict({"average": torch.ones(1)})
    with pytest.raises(ValueError, match=rf"^objective={name}: [^\n]*set model.heads=\['{name}'\]$"):
        loss_of(name, eagle_model_without(name, seed), Batch(torch.randint(11, (1, 4))))


def eagle_model_without(name: str, seed: int) -> Any:
    network = eagle_model(seed)
    del network.extra[name]
    return network


def test_bad_heads_are_refused(seed: int) -> None:
    for layers in ([0, 1, 3], [-1, 0, 1]):
        with pytest.raises(ValueError, match=r"^layers=[^\n]*the trunk has the layers 0 .. 2; name three of those$"):
            eagle_model(seed, heads=[{"kind": "eagle3", "layers": layers}])
    with pytest.raises(ValueError, match=r"layers=\(2, 1, 0\): not in rising order; name the lowest first$"):
        eagle_model(seed, heads=[{"kind": "eagle3", "layers": [2, 1, 0]}])
    with pytest.raises(ValueError, match=r"^layers=\(2, 1, -1\)"):  # too shallow for the paper's choice
        eagle_model(seed, heads=[{"kind": "eagle3"}])
    heads: Any = eagle_model(seed).heads["eagle3"]
    with pytest.raises(ValueError, match=r"^counts: \(12,\) numbers for 11 tokens"):
        heads.restrict(torch.ones(12), torch.zeros(11, WIDTH))
    windowed = eagle_model(seed, mixers=[{"kind": "attention", "kv_heads": 1, "window": 2}])
    with pytest.raises(ValueError, match=r"^steps=3: beyond the attention window of 2; lower it$"):
        loss_of("eagle3", windowed, Batch(torch.randint(11, (1, 6))))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
@torch.no_grad()
def test_the_unrolling_is_what_the_cache_gives(name: str, window: int | None, seed: int) -> None:
    """From every position, level by level, also where the keys at its start have left the window."""
    network = eagle_model(seed, mixers=[{"kind": "attention", "kv_heads": 1, "window": window}])
    heads: Any = network.heads[name]
    tokens = torch.randint(11, (1, 9))
    features = torch.randn(1, 9, heads.fc.in_features if name == "eagle3" else WIDTH, dtype=torch.float64)
    unrolled = heads.unroll(features, tokens, network.embed, network(tokens).context, 3)
    embedded = network.embed(tokens)
    for first in range(1, 7):  # positions whose features are known
        state = heads.init_state(1, 16, device="cpu", dtype=torch.float64)
        h, state = heads.extend(heads.fuse(features[:, :first]), embedded[:, 1 : first + 1], Context(), state)
        for step in range(3):
            torch.testing.assert_close(h[:, -1], unrolled[step][:, first - 1], **TIGHT)
            place = first + step
            parent = torch.tensor([[place - 1]])
            if place + 1 < tokens.shape[1]:
                h, state = heads.extend(h[:, -1:], embedded[:, place + 1, None], Context(parent=parent), state)
