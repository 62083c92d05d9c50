"""`fewstep exactness` and `fewstep tune` on the shipped model, at reduced size: what they print, write and return."""

import json
from pathlib import Path

import pytest
from test_cli import run

from fewstep.decode.drafters.silent import Silent
from fewstep.decode.guard import Guarded
from fewstep.decode.text import GenerationConfig
from fewstep.hub.heads import companion
from fewstep.hub.load import load
from fewstep.report.tuned import cache, choose

SMALL = ("--count", "2", "--max-new-tokens", "8", "--dtype", "float32", "--set", "test.draws=4000", "--set", "test.contexts=1")


def test_a_drafter_is_certified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folder" / "exactness.json"
    assert run("exactness", "code-nano", "--drafter", "mtp", *SMALL, "--set", "test.alarm=1e-6", "--out", out) == 0
    record = json.loads(out.read_text())
    assert record["passed"]
    assert set(record["laws"]) == {"first level", "whole"}
    assert record["laws"]["first level"]["first"]["draws"] >= 4000
    assert record["greedy"][0]["tokens"] == record["greedy"][0]["prompts"] == 2
    assert "Not seen" in capsys.readouterr().out


def test_a_lossy_verification_is_not(tmp_path: Path) -> None:
    out = tmp_path / "exactness.json"
    lossy = ("--verification", "typical", "--drafter", "mtp", "--set", "drafter.mode=chosen")
    assert run("exactness", "code-nano", *lossy, *SMALL, "--set", "test.draws=40000", "--out", out) == 1
    assert not json.loads(out.read_text())["passed"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("exactness", "code-nano", "--temperature", "0"), "temperature"),
        (("exactness", "code-nano", "--set", "test.power=2"), "power"),
        (("tune", "code-nano", "--nodes", "1"), "nodes"),
        (("tune", "code-nano", "--drafter", "nothing"), "drafter"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert names in capsys.readouterr().err


def test_what_is_tuned_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    quick = ("--set", "prompts=2", "--set", "new_tokens=8", "--set", "rounds=1", "--set", "finalists=1", "--set", "gain=1")
    assert run("tune", "code-nano", "--drafter", "ngram", *quick) == 0
    (path,) = cache().iterdir()
    record = json.loads(path.read_text())
    assert record["facts"]["batch"] == 1
    model = load("code-nano")
    drafter = choose(model, "auto", 1, GenerationConfig(), companion(model)).drafter
    assert isinstance(drafter, Guarded if record["drafter"]["kind"] == "ngram" else Silent)
