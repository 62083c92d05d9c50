"""Selective copying and induction heads: the texts, who can answer them, and training by them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fewstep.nn.mixers import MIXERS
from fewstep.nn.mixers.mamba import MambaConfig
from fewstep.report.claims import CLAIMS
from fewstep.report.claims.claim import Effort
from fewstep.report.claims.induction_heads import Marked
from fewstep.report.claims.selective_copying import Texts, decoder
from fewstep.report.claims.tasks import answered, learned, trained
from fewstep.training.objectives.next_token import IGNORED


def test_texts_hold_letters_at_random_places_and_ask_for_them_in_order() -> None:
    texts = Texts(1, rows=200, length=20, letters=5)
    batch = texts.batch(3)
    labels = batch.extra["labels"]
    assert batch.tokens.shape == labels.shape == (200, 25)
    assert (labels[:, :20] == IGNORED).all() and (batch.tokens[:, 20:] == batch.tokens.max()).all()
    blank = int(batch.tokens.max()) - 1
    for row, told in zip(batch.tokens[:, :20].tolist(), labels[:, 20:].tolist(), strict=True):
        assert [token for token in row if token != blank] == told
    places = (batch.tokens[:, :20] != blank).float().mean(0)
    assert places.min() > 0.05 and places.max() < 0.45  # the seed is fixed; a quarter of 200 each is expected
    assert torch.equal(texts.batch(3).tokens, batch.tokens)
    for other in (texts.batch(4), Texts(2, rows=200, length=20, letters=5).batch(3)):
        assert not torch.equal(other.tokens, batch.tokens)


def test_marked_texts_have_one_sign_and_ask_for_what_follows_it(seed: int) -> None:
    batch = Marked(seed, rows=50, length=12).batch(0)
    labels = batch.extra["labels"]
    assert batch.tokens.shape == (50, 12) and (labels[:, :-1] == IGNORED).all()
    sign = batch.tokens[0, -1]
    assert (batch.tokens[:, -1] == sign).all() and (batch.tokens[:, :-1] == sign).sum(1).eq(1).all()
    for row, told in zip(batch.tokens.tolist(), labels[:, -1].tolist(), strict=True):
        assert row[row.index(sign) + 1] == told != sign


class Knowing(nn.Module):
    """It finds the letters and tells them in their order; or, forgetful, the first one every time."""

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
    assert answered(Knowing(forgetful=False), Texts(0)) == answered(Knowing(forgetful=False), Texts(0, length=200)) == 1.0
    assert 0.1 < answered(Knowing(forgetful=True), Texts(0)) < 0.3


def test_a_decoder_is_trained_for_the_steps_asked(tmp_path: Path) -> None:
    bench: Any = SimpleNamespace(effort=Effort(steps=2), scratch=tmp_path, console=Console(quiet=True))
    network = trained(bench, decoder(MambaConfig(expand=1, state=2), 18), Texts(0, rows=4, length=10), "mamba")
    assert [type(block.mixer).__name__ for block in network.blocks] == ["Mamba", "Mamba"]
    assert not network.training and 0 <= answered(network, Texts(0, length=12)) <= 1
    assert len((tmp_path / "mamba" / "log.jsonl").read_text().splitlines()) == 2


def test_a_training_that_was_stopped_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stopped = SimpleNamespace(run=lambda: SimpleNamespace(interrupted=True, used=SimpleNamespace(steps=7)))
    monkeypatch.setattr("fewstep.report.claims.tasks.Trainer", lambda *parts, **named: stopped)
    with pytest.raises(ValueError, match=r"^training: stopped after 7 steps, [^\n]*; [^\n]*$"):
        learned(decoder(MambaConfig(), 18), Texts(0), 9, 0, tmp_path, Console(quiet=True))


@pytest.mark.parametrize("name", ["selective-copying", "induction-heads"])
def test_the_whole_claim(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("selective_copying", "induction_heads"):
        monkeypatch.setattr(f"fewstep.report.claims.{module}._LENGTH", 8)
    monkeypatch.setattr("fewstep.report.claims.induction_heads._LONGEST", 16)
    monkeypatch.setattr("fewstep.report.claims.tasks._HELD_OUT", 1)
    claim = CLAIMS[name]
    bench: Any = SimpleNamespace(effort=Effort(steps=1), scratch=tmp_path, console=Console(quiet=True))
    found = list(claim.measure(bench))
    assert tuple(finding.criterion for finding in found) == claim.criteria
    assert all(finding.value is not None and 0 <= finding.value <= 1 for finding in found)
    assert {kind for kind, config in MIXERS.items() if name in config.claims} == {"mamba", "s4"}
