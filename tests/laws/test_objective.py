"""The laws of an objective, for every registered one, and the losses against slow references written out token by token."""

from typing import Any

import pytest
import torch
from sequences import TIGHT, VOCAB, decoder
from torch import Tensor

from fewstep.core.mixer import Context
from fewstep.core.objective import Batch, Loss
from fewstep.core.random import CounterRng
from fewstep.models.decoder import Decoder
from fewstep.nn.heads import ParallelHeadsConfig, SequentialHeads, SequentialHeadsConfig
from fewstep.nn.medusa import FreeHeads, HydraHeadsConfig, MedusaHeads, MedusaHeadsConfig
from fewstep.training.objectives import OBJECTIVES
from fewstep.training.objectives.early_exit import LayerSkipConfig
from fewstep.training.objectives.multi_token import HydraConfig, MedusaConfig, MultiTokenConfig
from fewstep.training.objectives.next_token import NextTokenConfig

SEQUENTIAL = {"heads": (SequentialHeadsConfig(depth=3),)}
PARALLEL = {"heads": (ParallelHeadsConfig(depth=3),), "tied": False}
MEDUSA = {"heads": (MedusaHeadsConfig(depth=3, layers=2),), "tied": False}
HYDRA = {"heads": (HydraHeadsConfig(depth=3, unembedding="shared"),)}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "next_token": (NextTokenConfig(), SEQUENTIAL),
    "mtp": (MultiTokenConfig(), SEQUENTIAL),
    "medusa": (MedusaConfig(trunk="joint", warmup=0), MEDUSA),
    "hydra": (HydraConfig(trunk="joint", warmup=0, decay=0.5), HYDRA),
    "medusa-frozen": (MedusaConfig(), MEDUSA),
    "medusa-distilled-frozen": (MedusaConfig(distil=True), MEDUSA),
    "hydra-frozen": (HydraConfig(), HYDRA),
    "layerskip": (LayerSkipConfig(scale=0.6, every=2), {"depth": 4}),
    "next_token-untied": (NextTokenConfig(), {"tied": False}),
    "mtp-parallel": (MultiTokenConfig(weight=3.0), PARALLEL),
    "mtp-frozen": (MultiTokenConfig(trunk="frozen"), SEQUENTIAL),
    "mtp-parallel-frozen": (MultiTokenConfig(trunk="frozen"), PARALLEL),
}
LENGTHS = ((6, 1, 4), (2, 2, 3, 3), (9,))


def ragged_batch(width: int = 13) -> Batch:
    """Packed sequences, some shorter than the heads reach, and padding."""
    rows = [[i for i, length in enumerate(row) for _ in range(length)] for row in LENGTHS]
    segments = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    return Batch(torch.randint(VOCAB, segments.shape), segments)


def rng(batch: Batch, seed: int) -> CounterRng:
    return CounterRng.seeded(range(seed, seed + len(batch.tokens)))


def sequences(batch: Batch) -> list[Tensor]:
    """The separate sequences of a packed batch, [t] each."""
    if batch.segments is None:
        return list(batch.tokens)
    found = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        found += [tokens[segments == segment] for segment in range(int(segments.max()) + 1)]
    return found


def surprise(network: Decoder, h: Tensor, token: Tensor) -> Tensor:
    """-log p(token) after the normed activation h [D], in nats."""
    scores = network.head.weight @ h
    return scores.exp().sum().log() - scores[token]


def reference(network: Decoder, batch: Batch, config: Any) -> Tensor:
    """L = (sum of next-token surprises + weight / D sum over heads) / next tokens, sequence by sequence and token by token."""
    if isinstance(config, LayerSkipConfig):
        return exits(network, batch, config)
    count, first, ahead = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    heads: Any = next(iter(network.heads.values()), None)
    for tokens in sequences(batch):
        encoded = network(tokens[None], taps=("layer.0",))
        for i in range(len(tokens) - 1):
            first, count = first + surprise(network, encoded.final[0, i], tokens[i + 1]), count + 1
        if isinstance(config, NextTokenConfig):
            continue
        h = encoded.final
        for k in range(1, min(heads.depth, len(tokens) - 1) + 1):
            if isinstance(heads, SequentialHeads):
                module: Any = heads.stages[k - 1]
                later = network.embedding.weight[tokens[k:]]
                joined = torch.cat([module.embed_norm(later), module.hidden_norm(h[0, : len(tokens) - k])], -1)
                h = network_block(module.block, joined @ module.proj.weight.T)
                normed = module.norm(h)
            elif isinstance(heads, FreeHeads):
                for i in range(len(tokens) - k - 1):
                    found = free_surprise(network, heads, config, encoded.final[0], tokens, i, k)
                    ahead = ahead + weight(config, k, heads.depth) * found
                continue
            else:
                normed = heads.norms[k - 1](network_block(heads.blocks[k - 1], encoded.hidden["layer.0"][0]))
            for i in range(len(tokens) - k - 1):
                ahead = ahead + weight(config, k, heads.depth) * surprise(network, normed[0, i], tokens[i + k + 1])
    if isinstance(config, NextTokenConfig):
        return first / count
    return (ahead if config.trunk == "frozen" else first + ahead) / count


def exits(network: Decoder, batch: Batch, config: LayerSkipConfig) -> Tensor:
    """Every exit's summed surprise times its weight, over the next tokens."""
    count, total = 0, torch.zeros((), dtype=torch.float64)
    for tokens in sequences(batch):
        encoded = network(tokens[None], taps=tuple(f"layer.{layer}" for layer in range(network.depth)))
        for layer, share in enumerate(config.build().weights(network.depth)):
            for i in range(len(tokens) - 1):
                h = network.norm(encoded.hidden[f"layer.{layer}"][0, i])
                total = total + share * surprise(network, h, tokens[i + 1])
        count += len(tokens) - 1
    return total / count


def weight(config: Any, k: int, depth: int) -> float:
    if isinstance(config, MultiTokenConfig):
        return config.weight / depth
    return config.decay**k * (config.weight if config.trunk == "joint" else 1.0)


def free_surprise(network: Decoder, heads: Any, config: Any, final: Tensor, tokens: Tensor, i: int, k: int) -> Tensor:
    """-log p of token i+k+1 under head k of Medusa or Hydra, or its mean under the trunk's law, with everything written out."""
    if isinstance(heads, MedusaHeads):
        rows = slice((k - 1) * network.width, k * network.width)
        bent = heads.first.weight[rows] @ final[i] + heads.first.bias[rows]
        h = final[i] + bent * bent.sigmoid()
    else:
        layer: Any = heads.first[k - 1]
        z = torch.cat([final[i], *network.embedding.weight[tokens[i + 1 : i + k + 1]]])
        straight, bent = (layer.weight @ z + layer.bias).view(2, -1)
        h = straight + bent * bent.sigmoid()
    for block in heads.deeper[k - 1]:
        bent = block.weight @ h + block.bias
        h = h + bent * bent.sigmoid()
    scores = (heads.unembeddings[k - 1].weight if len(heads.unembeddings) else network.head.weight) @ h
    log_law = scores - scores.exp().sum().log()
    if config.distil:
        return -((network.head.weight @ final[i + k]).softmax(0).detach() * log_law).sum()
    return -log_law[tokens[i + k + 1]]


def network_block(block: Any, x: Tensor) -> Tensor:
    """A block over one sequence [t,D] -> [1,t,D]."""
    y: Tensor = block(x[None], Context(torch.arange(len(x))[None]))[0]
    return y


def loss_of(name: str, batch: Batch, seed: int) -> tuple[Decoder, Loss]:
    config, fields = CASES[name]
    network = decoder(**fields)
    return network, config.build().loss(network, batch, rng(batch, seed))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_its_definition(name: str, packed: bool, seed: int) -> None:
    batch = ragged_batch() if packed else Batch(torch.randint(VOCAB, (2, 7)))
    network, loss = loss_of(name, batch, seed)
    assert loss.units == sum(len(tokens) - 1 for tokens in sequences(batch))
    torch.testing.assert_close(loss.value, reference(network, batch, CASES[name][0]), **TIGHT)
    assert all(not metric.requires_grad and metric.dim() == 0 for metric in loss.metrics.values())


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_add_up(name: str, seed: int) -> None:
    """Weighted by their units: what accumulation and every data-parallel average rely on."""
    batch = ragged_batch()
    assert batch.segments is not None
    config, fields = CASES[name]
    network, objective = decoder(**fields), config.build()
    whole = objective.loss(network, batch, rng(batch, seed))
    total, units = torch.zeros((), dtype=torch.float64), 0
    for row in range(3):
        part = Batch(batch.tokens[row : row + 1], batch.segments[row : row + 1])
        loss = objective.loss(network, part, rng(batch, seed).fork(torch.tensor([row])))
        total, units = total + loss.value * loss.units, units + loss.units
    assert units == whole.units
    torch.testing.assert_close(total / units, whole.value, **TIGHT)


@pytest.mark.parametrize("name", CASES)
def test_padding_and_other_sequences_do_not_count(name: str, seed: int) -> None:
    batch = ragged_batch()
    assert batch.segments is not None
    config, fields = CASES[name]
    network, objective = decoder(**fields), config.build()
    before = objective.loss(network, batch, rng(batch, seed))
    noise = torch.where(batch.segments < 0, (batch.tokens + 1) % VOCAB, batch.tokens)
    after = objective.loss(network, Batch(noise, batch.segments), rng(batch, seed))
    torch.testing.assert_close(after.value, before.value, rtol=0, atol=0)
    first = torch.where(batch.segments == 0, (batch.tokens + 1) % VOCAB, batch.tokens)
    moved = objective.loss(network, Batch(first, batch.segments), rng(batch, seed))
    rest = Batch(batch.tokens, torch.where(batch.segments == 0, -1, batch.segments))
    gap = objective.loss(network, rest, rng(batch, seed))
    other = objective.loss(network, Batch(first, rest.segments), rng(batch, seed))
    torch.testing.assert_close(other.value, gap.value, rtol=0, atol=0)
    assert (moved.value - before.value).abs() > 1e-6


@pytest.mark.parametrize("name", CASES)
def test_nothing_to_score(name: str, seed: int) -> None:
    """Padding alone, or sequences of one token: a loss of zero that can be differentiated, not a NaN."""
    for segments in (torch.full((2, 6), -1), torch.arange(6).expand(2, -1)):
        network, loss = loss_of(name, Batch(torch.randint(VOCAB, (2, 6)), segments), seed)
        assert loss.units == 0 and loss.value == 0
        loss.value.backward()
        assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)
    network, loss = loss_of(name, Batch(torch.randint(VOCAB, (2, 1))), seed)
    assert loss.units == 0 and loss.value == 0


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str, seed: int) -> None:
    config, fields = CASES[name]
    network, objective, batch = decoder(**fields), config.build(), ragged_batch()
    trained = [
        p for n, p in network.named_parameters() if "frozen" not in name or n.startswith("extra.")
    ]  # a frozen trunk's weights move the loss, yet get no gradient

    def loss(*_: Tensor) -> Tensor:
        value: Tensor = objective.loss(network, batch, rng(batch, seed)).value
        return value

    assert torch.autograd.gradcheck(loss, tuple(trained), fast_mode=True)


@pytest.mark.parametrize("name", [name for name in CASES if "frozen" in name])
def test_a_frozen_trunk_gives_gradients_to_the_heads_alone(name: str, seed: int) -> None:
    network, loss = loss_of(name, ragged_batch(), seed)
    loss.value.backward()
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.startswith("extra."):
            assert parameter.grad is not None and bool((parameter.grad != 0).any()), parameter_name
        else:
            assert parameter.grad is None, parameter_name
    with torch.no_grad():
        config, _ = CASES[name]
        assert not config.build().loss(network, ragged_batch(), rng(ragged_batch(), seed)).value.requires_grad


@pytest.mark.parametrize("name", [name for name in CASES if "frozen" not in name])
def test_training_together_reaches_every_weight(name: str, seed: int) -> None:
    network, loss = loss_of(name, ragged_batch(), seed)
    loss.value.backward()
    for parameter_name, parameter in network.named_parameters():
        used = not parameter_name.startswith("extra.") or not name.startswith("next_token")
        assert (parameter.grad is not None and bool((parameter.grad != 0).any())) == used, parameter_name


def taught(network: Decoder, objective: Any, weights: list[Tensor], tokens: Tensor, seed: int) -> list[dict[str, Tensor]]:
    """Thirty steps on one batch: what each of them found."""
    optimizer = torch.optim.Adam(weights, lr=0.01)
    history = []
    for _ in range(30):
        loss = objective.loss(network, Batch(tokens), rng(Batch(tokens), seed))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        history.append({"loss": loss.value, **loss.metrics})
    return history


@pytest.mark.parametrize("name", CASES)
def test_the_loss_falls(name: str, seed: int) -> None:
    """On a text that counts upwards, from any start, in thirty steps."""
    config, fields = CASES[name]
    network, objective = decoder(**{**fields, "depth": 2}).float().train(), config.build()
    tokens = (torch.randint(VOCAB, (16, 1)) + torch.arange(8)) % VOCAB
    if "distilled" in name:  # from a target that knows the text
        taught(network, NextTokenConfig().build(), [p for n, p in network.named_parameters() if "extra" not in n], tokens, seed)
    trained = [p for n, p in network.named_parameters() if "frozen" not in name or n.startswith("extra.")]
    history = taught(network, objective, trained, tokens, seed)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    for metric in history[0]:
        if metric.startswith(("mtp", "medusa", "hydra")) and not metric.endswith("accuracy"):
            assert history[-1][metric] < history[0][metric]


def test_the_trunk_joins_after_the_warmup(seed: int) -> None:
    """Medusa-2: the heads learn alone for the first steps, which the state counts."""
    network, batch = decoder(**MEDUSA), ragged_batch()
    config = MedusaConfig(trunk="joint", warmup=2)
    objective, resumed = config.build(), config.build()
    for step in range(3):
        network.zero_grad()
        objective.loss(network, batch, rng(batch, seed)).value.backward()
        assert (network.embedding.weight.grad is None) == (step < 2)
        objective.after_step(network)
    resumed.load_state_dict(objective.state_dict())
    assert resumed.loss(network, batch, rng(batch, seed)).value == objective.loss(network, batch, rng(batch, seed)).value


@pytest.mark.parametrize("kind", [kind for kind in OBJECTIVES if kind in CASES])
def test_the_state_survives_and_a_foreign_one_is_refused(kind: str) -> None:
    objective: Any = CASES[kind][0].build()
    objective.load_state_dict(objective.state_dict())
    with pytest.raises(ValueError, match=r"^objective state [^\n]*; [^\n]*$"):
        objective.load_state_dict({"average": torch.ones(1)})


def test_low_precision_logits_are_scored_in_float32(seed: int) -> None:
    network, batch = decoder(), ragged_batch()
    exact = NextTokenConfig().build().loss(network, batch, rng(batch, seed))
    low = NextTokenConfig().build().loss(network.bfloat16(), batch, rng(batch, seed))
    assert exact.value.dtype == torch.float64 and low.value.dtype == torch.float32
    assert low.value.item() == pytest.approx(exact.value.item(), rel=0.05)


def test_a_model_without_heads_is_refused() -> None:
    batch = ragged_batch()
    with pytest.raises(ValueError, match=r"^objective=mtp: [^\n]*mtp_sequential[^\n]*$"):
        MultiTokenConfig().build().loss(decoder(), batch, rng(batch, 0))
