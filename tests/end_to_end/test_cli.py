"""The command line as a user meets it: end to end on a tiny model, and one line with exit code 2 for every bad input."""

import json
import shutil
import sys
from array import array
from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.models.model import Model

RECIPE = """
[model]
vocab = 300
width = 16
depth = 2
query_heads = 2
hidden = 24
max_positions = 96
heads = ["mtp_sequential"]
[tokenizer]
vocab = 300
[data]
kind = "text"
paths = ["{corpus}"]
pattern = "*.txt"
held_out = 0.3
[objective]
kind = "mtp"
[budget]
steps = 4
[run]
batch = 2
length = 24
validate_every = 2
checkpoint_steps = 2
log_every = 1
"""


def run(*arguments: str | Path) -> int:
    """The exit code of `fewstep ARGUMENTS`."""
    before, sys.argv = sys.argv, ["fewstep", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a recipe and the run it trained."""
    folder = tmp_path_factory.mktemp("home")
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(12):
        lines = [f"def function_{i}_{j}(value):\n    return value + {i * 7 + j}\n" for j in range(20)]
        (corpus / f"{i}.txt").write_text("\n".join(lines))
    (folder / "tiny.toml").write_text(RECIPE.format(corpus=corpus.as_posix()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert run("train", folder / "tiny.toml", "--out", folder / "run") == 0
    return folder


@pytest.fixture
def model(home: Path) -> Path:
    return max((home / "run" / "checkpoints").glob("step-*"))


def test_the_run_folder_holds_everything(home: Path, model: Path) -> None:
    assert {"recipe.json", "weights.safetensors", "tokenizer.json"} <= {path.name for path in model.iterdir()}
    steps = [json.loads(line)["step"] for line in (home / "run" / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 4
    assert Model.load(model).recipe["budget"]["steps"] == 4


def test_generate_prints_the_same_text_with_and_without_drafts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for drafter in ("silent", "mtp", "ngram", f"draft_model={model}"):
        assert run("generate", model, "def function_1", "--drafter", drafter, "--max-new-tokens", "20", "--stats") == 0
        printed = capsys.readouterr()
        texts.append(printed.out)
        assert "tokens per call" in printed.err
    assert len(set(texts)) == 1


def test_a_corpus_of_texts_is_drafted_from(home: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    corpus = home / "corpus"
    for out, files in ((tmp_path / "files", sorted(corpus.glob("*.txt"))), (tmp_path / "folder", [corpus])):
        assert run("corpus", model, *files, "--out", out) == 0
        assert capsys.readouterr().out.split() == [str(out)]
        texts.append((out / "tokens.bin").read_bytes())
    assert texts[0] == texts[1]
    tokenizer, written = Model.load(model).tokenizer, array("I", texts[0]).tolist()
    assert tokenizer is not None and written.count(tokenizer.eos) == 12
    assert tokenizer.decode(written[: written.index(tokenizer.eos)]) == (corpus / "0.txt").read_text()
    for drafter in ("silent", f"retrieval={tmp_path / 'files'}"):
        assert run("generate", model, "def function_1_2", "--drafter", drafter, "--max-new-tokens", "20", "--stats") == 0
        texts.append(capsys.readouterr().out)
    assert texts[2] == texts[3]


def test_a_lossy_verification_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("generate", model, "def function_1", "--drafter", "mtp", "--temperature", "1", "--max-new-tokens", "8")
    for arguments in ((), ("--verification", "block"), ("--verification", "typical", "--set", "verification.epsilon=0.2")):
        assert run(*asked, *arguments) == 0
        assert ("lossy" in capsys.readouterr().err) == ("typical" in arguments)


def test_systems_lists_every_drafter(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("systems", "--json") == 0
    names = {(row["room"], row["name"]) for row in json.loads(capsys.readouterr().out)}
    assert {("drafter", "silent"), ("drafter", "ngram"), ("drafter", "draft_model"), ("drafter", "mtp")} <= names


def test_bad_input_is_one_line_and_exit_code_2(
    home: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    truncated, other, foreign = tmp_path / "truncated", tmp_path / "other", tmp_path / "foreign"
    for copy in (truncated, other, foreign):
        shutil.copytree(model, copy)
    (truncated / "weights.safetensors").write_bytes((model / "weights.safetensors").read_bytes()[:-100])
    recipe = json.loads((other / "recipe.json").read_text())
    recipe["model"]["vocab"] = 280
    (other / "recipe.json").write_text(json.dumps(recipe))
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    first = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [{**first, "id": 300 + i, "content": f"<|extra {i}|>"} for i in range(60)]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    empty = tmp_path / "empty"
    empty.mkdir()
    tiny = home / "tiny.toml"
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        (("train", tiny, "--set", "optim.lrr=1"), "lrr"),
        (("train", tiny, "--set", "budget.steps=-1"), "budget.steps=-1"),
        (("train", tmp_path / "none.toml"), "none.toml"),
        (("train", "code-namo"), "code-nano"),
        (("train", tiny, "--out", tmp_path / "r1", "--set", f'data.paths=["{empty}"]'), "data"),
        (("train", tiny, "--out", tmp_path / "r2", "--set", 'data.paths=["nowhere"]'), "nowhere"),
        (("train", tiny, "--out", home / "run"), "run"),
        (("generate", tmp_path / "nothing", "x"), "nothing"),
        (("generate", truncated, "x"), "weights.safetensors"),
        (("generate", other, "x"), "vocab"),
        (("generate", foreign, "x"), "vocab"),
        (("generate", model, "x" * 500), "context"),
        (("generate", model, ""), "prompt"),
        (("generate", model, "x", "--drafter", "ngrams"), "ngram"),
        (("generate", model, "x", "--drafter", "draft_model"), "path"),
        (("generate", model, "x", "--set", "top_p=3"), "top_p=3"),
        (("generate", model, "x", "--set", "drafter.branching=[9,9,9,9]"), "branching"),
        (("generate", model, "x", "--verification", "blok"), "block"),
        (("generate", model, "x", "--verification", "typical", "--set", "verification.delta=2"), "delta=2"),
        (
            ("generate", model, "x", "--verification", "block", "--temperature", "1", "--set", "drafter.branching=[2]"),
            "verification='token'",
        ),
        (("corpus", model, "--out", tmp_path / "c"), "files"),
        (("corpus", model, tmp_path / "nothing", "--out", tmp_path / "c"), "nothing"),
        (("corpus", model, home / "corpus", "--out", tiny), "out="),
        (("corpus", model, model / "weights.safetensors", "--out", tmp_path / "c"), "UTF-8"),
        (("generate", model, "x", "--drafter", f"retrieval={tmp_path / 'c'}"), "corpus"),
        (("reproduce",), "--all"),
        (("reproduce", "mpt"), "mtp"),
        (("convert", model, "--to", "gguf", "--out", tmp_path / "o"), "gguf"),
    ]
    for arguments, needle in cases:
        capsys.readouterr()
        code = run(*arguments)
        printed = capsys.readouterr()
        message = printed.err.strip().splitlines()[-1:]
        assert code == 2, (arguments, code, printed.err)
        assert message and message[0].startswith("fewstep: ") and needle in message[0], (arguments, printed.err)
        assert "Traceback" not in printed.err, arguments
    assert not any((tmp_path / name / "checkpoints").exists() for name in ("r1", "r2"))
