"""One network for two modes: trained for both, or taken from a finished autoregressive model and given a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from sequences import TIGHT, VOCAB, decoder
from test_train_heads import SHAPE, WORDS, target

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import Recipe, parse
from fewstep.decode.drafters.block_diffusion import BlockDiffusionConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import decode
from fewstep.decode.stream import Settings
from fewstep.hub.load import load
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.recipes import SECTIONS, load_recipe
from fewstep.recipes.converting import ConvertedConfig, masked
from fewstep.recipes.run import train
from fewstep.training.objectives.block import BlockConfig
from fewstep.training.objectives.next_token import NextTokenConfig
from fewstep.training.objectives.self_speculation import SelfSpeculationConfig

__all__ = ["target"]  # a fixture

QUIET, MASK = Console(quiet=True), VOCAB - 1


def rows(seed: int, count: int) -> CounterRng:
    return CounterRng.seeded(range(seed, seed + count))


def test_the_loss_of_both_modes_is_the_sum_of_theirs(seed: int) -> None:
    model, batch = decoder(mask_token=MASK), Batch(torch.randint(MASK, (3, 8)))
    config = SelfSpeculationConfig(size=2, weight=0.5, estimator="iid-count")
    found = config.build().loss(model, batch, rows(seed, 3))
    ahead = NextTokenConfig().build().loss(model, batch, rows(seed, 3))
    block = BlockConfig(size=2, estimator="iid-count").build().loss(model, batch, rows(seed, 3))
    torch.testing.assert_close(found.value, ahead.value + 0.5 * block.value, **TIGHT)
    assert found.units == ahead.units and {"next_token", "accuracy", "bound"} == set(found.metrics)
    with pytest.raises(ValueError, match=r"^objective=[^\n]*mask[^\n]*; set model.mask_token[^\n]*$"):
        config.build().loss(decoder(), batch, rows(seed, 3))


def test_a_network_trained_for_both_drafts_for_itself(seed: int) -> None:
    """Of a text that counts upwards, what the masked mode learns is what the causal one says: drafts are accepted."""
    torch.manual_seed(seed)
    values = {"vocab": 9, "width": 24, "depth": 2, "query_heads": 2, "hidden": 32, "mask_token": 8}
    model = parse(DecoderConfig, values).build()
    objective, optimizer = (
        SelfSpeculationConfig(estimator="stratified-count").build(),
        torch.optim.Adam(model.parameters(), lr=0.01),
    )
    for step in range(60):
        tokens = (torch.randint(8, (8, 1)) + torch.arange(12)) % 8
        loss = objective.loss(model, Batch(tokens), rows(seed + 8 * step, 8))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    prompts = [[1, 2, 3, 4, 5], [6, 7, 0, 1]]
    plain = decode(model, SilentConfig().build(model, no_load), prompts, Settings(max_new_tokens=16))
    drafted = decode(model, BlockDiffusionConfig().build(model, no_load), prompts, Settings(max_new_tokens=16))
    assert [row.tokens for row in drafted] == [row.tokens for row in plain]
    assert sum(row.cost.tokens for row in drafted) > 1.2 * sum(row.cost.calls for row in drafted)


def no_load(path: str) -> Any:
    raise AssertionError("a network that drafts for itself needs no other")


@pytest.mark.parametrize("tied", [False, True])
def test_a_mask_token_is_added_and_nothing_else_changes(tied: bool, seed: int) -> None:
    model = decoder(tied=tied, heads=({"kind": "mtp_sequential", "depth": 2},))
    made = masked(model)
    assert (made.vocab, made.mask_token, made.config.heads) == (VOCAB + 1, VOCAB, ())
    tokens = torch.randint(VOCAB, (2, 7))
    with torch.no_grad():
        before, after = (network.unembed(network(tokens).final) for network in (model, made))
    torch.testing.assert_close(after[..., :VOCAB], before, **TIGHT)
    torch.testing.assert_close(made.embedding.weight[VOCAB], model.embedding.weight.mean(0), **TIGHT)
    assert (made.head.weight is made.embedding.weight) == tied
    again = masked(made)
    assert again.config == made.config and torch.equal(again.embedding.weight, made.embedding.weight)
    assert made.shifted and not masked(masked(model, shifted=False)).shifted  # what was trained one way stays so


def recipe(start: Path, **sections: Any) -> Recipe:
    values = {
        "model": {"kind": "converted", "start": str(start)},
        "tokenizer": {"kind": "target"},
        "data": {"kind": "text", "paths": [str(start.parent / "text")], "held_out": 0.3},
        "objective": {"kind": "block", "size": 4},
        "optim": {"kind": "adamw", "lr": 3e-3},
        "budget": {"steps": 4},
        "run": {"batch": 2, "length": 48, "checkpoint_steps": 2, "checkpoint_seconds": 0, "validate_every": 0, "threads": 1},
    }
    return Recipe.from_values("converted", {**values, **sections}, registries=SECTIONS)


def test_a_finished_model_is_trained_on_and_drafts_for_what_it_was(target: Path, tmp_path: Path) -> None:
    trained = train(recipe(target), directory=tmp_path / "run", console=QUIET)
    model: Any = trained.model
    own, start = model.network, load(target, packed=False).network
    assert isinstance(own, Decoder) and own.mask_token == SHAPE["vocab"] and own.config.kind == "decoder"
    moved = (own.embedding.weight[: start.vocab] - start.embedding.weight).norm() / start.embedding.weight.norm()
    assert 0 < moved < 0.2  # four steps from where it began, not a model drawn anew
    found = load(tmp_path / "run")
    assert found.tokenizer is not None and found.network.config == own.config
    texts = [found.tokenizer.encode(WORDS[:40]), found.tokenizer.encode(WORDS[:13])]
    drafter = BlockDiffusionConfig(path="run").build(start, lambda path: found.network)
    plain = decode(start, SilentConfig().build(start, no_load), texts, Settings(max_new_tokens=12))
    assert [r.tokens for r in decode(start, drafter, texts, Settings(max_new_tokens=12))] == [r.tokens for r in plain]
    again: Any = train(recipe(target), directory=tmp_path / "run", resume=True, console=QUIET).model
    assert torch.equal(again.network.head.weight, own.head.weight)


def test_it_learns_from_what_another_wrote(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of the finished model, not of the one being made, which has a token that no text has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = {"kind": "self_distilled", "prompts": {"kind": "text", "paths": [str(target.parent / "text")]}, "held_out": 0.3}
    data |= {"count": 12, "prompt_tokens": 16, "new_tokens": 60, "temperature": 1.0}
    with pytest.raises(ValueError, match=r"^data.writer: none, [^\n]*; name the one that writes$"):
        train(recipe(target, data=data), directory=tmp_path / "run", console=QUIET)
    train(recipe(target, data={**data, "writer": str(target)}), directory=tmp_path / "run", console=QUIET)
    (file,) = (tmp_path / "cache" / "fewstep" / "distilled").iterdir()
    assert len(file.read_text().splitlines()) == 12


def test_recipes_and_refusals(target: Path, tmp_path: Path) -> None:
    assert isinstance(load_recipe("code-block-from-nano")["model"], ConvertedConfig)
    assert isinstance(load_recipe("code-selfspec")["objective"], SelfSpeculationConfig)
    with pytest.raises(ValueError, match=r"^tokenizer='bpe': [^\n]*; set tokenizer='target'$"):
        train(recipe(target, tokenizer={"kind": "bpe"}), directory=tmp_path / "run", console=QUIET)
    (target / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"^model.start=[^\n]*: has no tokenizer [^\n]*; [^\n]*$"):
        train(recipe(target), directory=tmp_path / "run", console=QUIET)
