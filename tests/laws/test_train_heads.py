"""Heads for a finished model: the run trains them alone, resumes bit for bit, reports their acceptance and writes what drafts."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from train_toy import assert_same_end

from fewstep.core.recipe import Recipe, parse
from fewstep.decode.drafters.tree import best_tree
from fewstep.decode.generate import decode
from fewstep.decode.stream import Settings
from fewstep.decode.text import GenerationConfig, generate, pick_drafter
from fewstep.hub.heads import RECORD, WEIGHTS, companion, read_heads
from fewstep.hub.load import load
from fewstep.hub.save import save_hf
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.models.model import Model
from fewstep.recipes import SECTIONS
from fewstep.recipes.acceptance import FILE, RANKS, expected_tokens, ranks_of
from fewstep.recipes.run import train
from fewstep.text.tokenizer import Tokenizer
from fewstep.training.data.bpe import BPEConfig

QUIET = Console(quiet=True)
WORDS = "def area(width, height):\n    return width * height\n\nfor name in names:\n    print(name, len(name))\n"
SHAPE = {"vocab": 300, "width": 32, "depth": 2, "query_heads": 2, "hidden": 48, "tied": False, "init_std": 0.2}


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory, beside it text to train on, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for i in range(12):
        lines = WORDS.replace("name", f"name{i}").splitlines(keepends=True)
        (tmp_path / "text" / f"{i}.txt").write_text("".join(lines[(i * j) % len(lines)] for j in range(150)))
    network = parse(DecoderConfig, SHAPE).build()
    tokenizer: Tokenizer = BPEConfig(vocab=300).build([WORDS])
    Model(network, tokenizer, {"name": "toy"}).save(tmp_path / "target")
    return tmp_path / "target"


@pytest.fixture
def taught(target: Path, seed: int) -> Path:
    """A model of that shape after lessons in that text, so that what it writes is what heads can learn there."""
    told = {
        "model": {"kind": "decoder", **SHAPE},
        "tokenizer": {"kind": "bpe", "vocab": 300},
        "data": {"kind": "text", "paths": [str(target.parent / "text")], "held_out": 0.3},
        "objective": {"kind": "next_token"},
        "optim": {"kind": "adamw", "lr": 1e-2},
        "budget": {"steps": 100},
        "run": {"batch": 2, "length": 48, "seed": seed, "checkpoint_seconds": 0, "validate_every": 0, "threads": 1},
    }
    trained = train(Recipe.from_values("taught", told, registries=SECTIONS), directory=target.parent / "lessons", console=QUIET)
    trained.model.save(target.parent / "taught")
    return target.parent / "taught"


def recipe(target: Path, kind: str = "medusa", steps: int = 6, **sections: Any) -> Recipe:
    values = {
        "model": {"kind": "drafter", "target": str(target), "heads": {"kind": kind, "depth": 3}, "prompts": 6, "new_tokens": 24},
        "tokenizer": {"kind": "target"},
        "data": {"kind": "text", "paths": [str(target.parent / "text")], "held_out": 0.3},
        "objective": {"kind": kind},
        "optim": {"kind": "adamw", "lr": 3e-3},
        "budget": {"steps": steps},
        "run": {"batch": 2, "length": 48, "checkpoint_steps": 3, "checkpoint_seconds": 0, "validate_every": 0, "threads": 1},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return Recipe.from_values(kind, values, registries=SECTIONS)


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_a_run_trains_the_heads_alone_and_writes_what_drafts(kind: str, taught: Path, tmp_path: Path) -> None:
    before = load_file(taught / "weights.safetensors")
    trained = train(recipe(taught, kind), directory=tmp_path / "run", console=QUIET)
    names = load_file(trained.summary.checkpoint / "weights.safetensors").keys()
    assert names and all(name.startswith(f"extra.{kind}.") for name in names)
    for name, weight in before.items():
        assert torch.equal(trained.model.network.state_dict()[name], weight), name
    written = load_file(tmp_path / "run" / WEIGHTS)
    for name, weight in trained.model.network.heads[kind].state_dict().items():
        assert torch.equal(written[name], weight), name
    model = load(taught, packed=False)
    drafter: Any = pick_drafter(model, f"{kind}={tmp_path / 'run'}", companion(model))
    accuracies = json.loads((tmp_path / "run" / FILE).read_text())["accuracies"]
    assert drafter.heads.config.accuracies == tuple(map(tuple, accuracies))
    assert drafter.tree.size == 1 + len(best_tree(accuracies, 16)) > 1
    prompts = [[1, 2, 3, 4], [5, 6]]
    plain = decode(model.network, pick_drafter(model, "silent", companion(model)), prompts, Settings(20))
    assert [row.tokens for row in decode(model.network, drafter, prompts, Settings(20))] == [row.tokens for row in plain]
    assert not model.network.heads


def test_a_resumed_run_ends_in_the_same_state(target: Path, tmp_path: Path) -> None:
    whole = train(recipe(target), directory=tmp_path / "whole", console=QUIET)
    train(recipe(target, steps=6, budget={"steps": 6}), directory=tmp_path / "cut", console=QUIET)
    latest = tmp_path / "cut" / "checkpoints" / "step-00000006"
    for file in latest.iterdir():
        file.unlink()
    latest.rmdir()
    cut = train(recipe(target), directory=tmp_path / "cut", resume=True, console=QUIET)
    assert_same_end(whole.summary, cut.summary)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "cut" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_ranks_foretell_what_decoding_accepts(kind: str, taught: Path, tmp_path: Path) -> None:
    """Walking a greedy text by the ranks of its tokens gives the acceptances of drafting it, call by call."""
    told = recipe(taught, kind, 20, optim={"kind": "adamw", "lr": 1e-2})
    trained = train(told, directory=tmp_path / "run", console=QUIET)
    report = json.loads((tmp_path / "run" / FILE).read_text())
    assert len(report["accuracies"]) == 3 and all(len(row) == RANKS for row in report["accuracies"])
    assert 1 < report["expected"]["2"] <= report["expected"]["8"] <= report["expected"]["64"] <= 4
    network, objective = trained.model.network.double(), cast(Any, told["objective"]).build()  # no near ties
    tree = best_tree(report["accuracies"], 32)
    drafter: Any = pick_drafter(trained.model, kind, companion(trained.model), {"tree": tree})
    total = 0
    for prompt in [[i, 7 * i, i + 1] for i in range(3, 39, 6)]:
        row = decode(network, drafter, [prompt], Settings(120, budget=32))[0]
        ranks = ranks_of(objective, network, torch.tensor([prompt + row.tokens]), len(prompt)).tolist()
        place, walked = 0, []
        while place < len(ranks) - len(tree):  # beyond, the tree is cut to the tokens still wanted
            walked.append(max((len(path) for path in tree if tuple(ranks[place][: len(path)]) == path), default=0))
            place += walked[-1] + 1
        assert row.accepted[: len(walked)] == walked
        total += sum(walked)
    assert total > 0


def test_a_hugging_face_directory_is_a_target_too(target: Path, tmp_path: Path) -> None:
    save_hf(load(target, packed=False), tmp_path / "hf")
    ours, theirs = (
        train(recipe(target, model={"target": str(source)}), directory=tmp_path / f"run-{source.name}", console=QUIET)
        for source in (target, tmp_path / "hf")
    )
    for name, weight in ours.model.network.heads["medusa"].state_dict().items():
        torch.testing.assert_close(theirs.model.network.heads["medusa"].state_dict()[name], weight)
    model = load(tmp_path / "hf", "cpu", "bfloat16")
    drafter: Any = pick_drafter(model, f"medusa={tmp_path / 'run-hf'}", companion(model))
    assert {tensor.dtype for tensor in drafter.heads.state_dict().values()} == {torch.bfloat16}
    assert len(decode(model.network, drafter, [[1, 2, 3]], Settings(12))[0].tokens) == 12


def test_expected_tokens_count_the_nodes_that_agree() -> None:
    ranks = torch.tensor([[0, 0, 5], [0, 1, 0], [2, 0, 0], [1, 1, 1]])
    assert expected_tokens(ranks, ()) == 1
    assert expected_tokens(ranks, ((0,),)) == 1.5
    assert expected_tokens(ranks, ((0,), (0, 1), (0, 1, 0), (1,), (1, 1))) == 1 + (2 + 1 + 1 + 1 + 1) / 4


def test_the_whole_model_can_be_written(target: Path, tmp_path: Path) -> None:
    """Medusa-2 trains the trunk too, so that heads alone would not do."""
    joint = {"objective": {"trunk": "joint", "warmup": 2}, "model": {"save": "model"}}
    trained = train(recipe(target, **joint), directory=tmp_path / "run", console=QUIET)
    model = load(tmp_path / "run" / "model", packed=False)
    assert model.network.config == trained.model.network.config and set(model.network.heads) == {"medusa"}
    for name, weight in trained.model.network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], weight)
    assert not torch.equal(model.network.embedding.weight, load(target, packed=False).network.embedding.weight)


def test_heads_learn_from_the_targets_own_texts(target: Path, tmp_path: Path) -> None:
    data = {"kind": "self_distilled", "prompts": {"kind": "text", "paths": [str(target.parent / "text")]}, "held_out": 0.3}
    data |= {"count": 12, "prompt_tokens": 16, "new_tokens": 60}
    # no report: what a random target writes may be too alike to be split
    values = recipe(target, model={"prompts": 0}).model_dump()["sections"]
    told = Recipe.from_values(
        "own", {**values, "data": data, "objective": {"kind": "medusa", "distil": True}}, registries=SECTIONS
    )
    train(told, directory=tmp_path / "run", console=QUIET)
    (file,) = (tmp_path / "cache" / "fewstep" / "distilled").iterdir()
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    model = load(target, packed=False)
    assert model.tokenizer is not None and len(texts) == 12
    corpus = [model.tokenizer.encode(path.read_text()) for path in (target.parent / "text").iterdir()]
    pieces = [ids[i : i + 16] for ids in corpus for i in range(0, len(ids) - 15, 16)]
    begun = {model.tokenizer.decode(piece): piece for piece in pieces}
    prompts = [begun[max(filter(text.startswith, begun), key=len)] for text in texts]
    own = generate(model, prompts, pick_drafter(model, "silent", companion(model)), GenerationConfig(max_new_tokens=60, budget=1))
    assert [model.tokenizer.decode([*piece, *row.tokens]) for piece, row in zip(prompts, own, strict=True)] == texts
    written = file.stat().st_mtime_ns
    train(told, directory=tmp_path / "again", console=QUIET)
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"kind": "hydra"}}, "objective='hydra': does not train the heads of 'medusa'"),
        ({"objective": {"kind": "next_token"}}, "objective='next_token': does not train"),
        ({"tokenizer": {"kind": "bpe"}}, "tokenizer='bpe': a drafter speaks its target's tokens"),
        ({"objective": {"trunk": "joint"}}, "model.save='heads': with objective.trunk='joint'"),
        ({"model": {"target": "no-such-model"}}, "model='no-such-model': no such directory"),
    ],
)
def test_sections_that_do_not_go_together(sections: Any, message: str, target: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        train(recipe(target, **sections), directory=tmp_path / "run", console=QUIET)
    assert "\n" not in str(refusal.value) and "; " in str(refusal.value)
    assert not (tmp_path / "run").exists()


def written(target: Path, tmp_path: Path) -> tuple[Path, Decoder]:
    train(recipe(target, steps=1, model={"prompts": 0}), directory=tmp_path / "run", console=QUIET)
    return tmp_path / "run", load(target, packed=False).network


def test_damaged_or_foreign_heads_are_refused(target: Path, tmp_path: Path) -> None:
    run, network = written(target, tmp_path)
    assert set(read_heads(run, network).heads) == {"medusa"}
    with pytest.raises(ValueError, match=r"^model=[^\n]*: heads for a model, not a model; [^\n]*$"):
        load(run)
    for field, value in (("vocab", 299), ("width", 16), ("depth", 3)):
        other = parse(DecoderConfig, {**SHAPE, field: value}).build()
        with pytest.raises(ValueError, match=rf"heads.json: heads for a model of {field} [^\n]*; [^\n]*$"):
            read_heads(run, other)
    whole, record = (run / WEIGHTS).read_bytes(), (run / RECORD).read_text()
    (run / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"heads.safetensors: not a whole safetensors file"):
        read_heads(run, network)
    (run / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"heads.safetensors: not a whole safetensors file"):
        read_heads(run, network)
    tensors = {name: torch.zeros(3, 3) for name in ("first.weight", "first.bias")}
    save_file(tensors, run / WEIGHTS)
    with pytest.raises(ValueError, match=r"heads.safetensors: [^\n]*; the weights belong to another config"):
        read_heads(run, network)
    (run / WEIGHTS).write_bytes(whole)
    for change, message in (
        ({"format": "else"}, "format='else'"),
        ({"heads": {"kind": "medusa", "depth": 0}}, "heads.depth=0"),
        ({"heads": {"kind": "medusaa"}}, "did you mean 'medusa'"),
        ({"heads": {"kind": "medusa", "depth": 4}}, "belong to another config"),
    ):
        (run / RECORD).write_text(json.dumps({**json.loads(record), **change}))
        with pytest.raises(ValueError, match=message) as refusal:
            read_heads(run, network)
        assert "\n" not in str(refusal.value)
    (run / RECORD).write_text(record[:-9])
    with pytest.raises(ValueError, match=r"heads.json: not valid JSON"):
        read_heads(run, network)
