"""Selective copying's claim: the texts, who can tell them, and training by it."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fewstep.nn.mixers import MIXERS
from fewstep.nn.mixers.mamba import MambaConfig
from fewstep.report.claims import CLAIMS
from fewstep.report.claims.claim import Effort
from fewstep.report.claims.selective_copying import Texts, copied, trained


def test_texts_hold_letters_at_random_places_and_ask_for_them_in_order() -> None:
    texts = Texts(1, rows=200, length=20, letters=5)
    batch = texts.batch(3)
    labels = batch.extra["labels"]
    assert batch.tokens.shape == labels.shape == (200, 25)
    assert (labels[:, :20] == -100).all() and (batch.tokens[:, 20:] == batch.tokens.max()).all()
    blank = int(batch.tokens.max()) - 1
    for row, told in zip(batch.tokens[:, :20].tolist(), labels[:, 20:].tolist(), strict=True):
        assert [token for token in row if token != blank] == told
    places = (batch.tokens[:, :20] != blank).float().mean(0)
    assert places.min() > 0.05 and places.max() < 0.45  # a quarter of 200 each, seven deviations at the least
    assert torch.equal(texts.batch(3).tokens, batch.tokens)
    assert not torch.equal(texts.batch(4).tokens, batch.tokens) and not torch.equal(
        Texts(2, 200, 20, 5).batch(3).tokens, batch.tokens
    )


class Knowing(nn.Module):
    """It finds the letters, and tells them in their order; or, forgetful, the first one every time."""

    def __init__(self, forgetful: bool) -> None:
        super().__init__()
        self.forgetful = forgetful

    def forward(self, tokens: Tensor) -> Any:
        asking = tokens.max()
        letters = (tokens < asking - 1).sum(1)[0]
        order = (tokens >= asking - 1).long().argsort(dim=1, stable=True)[:, :letters]
        told = tokens.gather(1, order)
        if self.forgetful:
            told = told[:, :1].expand_as(told)
        return SimpleNamespace(final=torch.cat([tokens[:, : -int(letters)], told], 1))

    def unembed(self, h: Tensor) -> Tensor:
        return nn.functional.one_hot(h, int(h.max()) + 3).float() * 9


def test_who_knows_the_letters_tells_them_all() -> None:
    knowing: Any = Knowing(forgetful=False)
    forgetful: Any = Knowing(forgetful=True)
    assert copied(knowing, 64, 0) == copied(knowing, 200, 0) == 1.0
    assert 0.1 < copied(forgetful, 64, 0) < 0.3


def test_a_decoder_is_trained_by_the_claim(tmp_path: Path) -> None:
    bench: Any = SimpleNamespace(effort=Effort(seconds=1.0), scratch=tmp_path, console=Console(file=io.StringIO()))
    network = trained(bench, MambaConfig(expand=1, state=2))
    assert [type(block.mixer).__name__ for block in network.blocks] == ["Mamba", "Mamba"]
    assert 0 <= copied(network, 12, 0) <= 1


def test_the_claim_is_named_by_its_mixers() -> None:
    claim = CLAIMS["selective-copying"]
    assert {kind for kind, config in MIXERS.items() if claim.name in config.claims} == {"mamba", "s4"}
    assert [criterion.name for criterion in claim.criteria] == ["mamba-copies", "mamba-copies-longer", "s4-does-not"]
