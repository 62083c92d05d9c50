"""`load` finds a model wherever it is, and what is written can be loaded again with nothing lost."""

import json
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from fewstep.hub import load as load_module
from fewstep.hub.save import save_hf
from fewstep.models import weights
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model
from fewstep.nn.heads import ParallelHeadsConfig, SequentialHeadsConfig
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.position import NoPositionConfig
from fewstep.training.checkpoint import Checkpoint, Checkpoints

load = partial(load_module.load, packed=False)  # weights as they are, to compare and to save bit for bit


DATA = Path(__file__).parents[1] / "parity" / "data" / "hub"
SMALL = {"vocab": 40, "width": 24, "hidden": 16, "depth": 3, "query_heads": 2, "max_positions": 50}
IDS = torch.arange(30).view(2, 15)


def toy(**fields: Any) -> Model:
    return Model(DecoderConfig(**{**SMALL, **fields}).build(), None, {"name": "toy"})


def tensors(model: Model) -> dict[str, torch.Tensor]:
    return model.network.state_dict()


def assert_same(one: Model, other: Model) -> None:
    assert tensors(one).keys() == tensors(other).keys()
    for name, tensor in tensors(one).items():
        assert torch.equal(tensor, tensors(other)[name]), name
    assert torch.equal(one.logits(IDS), other.logits(IDS))


def write_run(root: Path, models: Iterable[Model]) -> None:
    for step, model in enumerate(models, 1):
        recipe = {"recipe.json": json.dumps(model.recipe)}
        named = weights.distinct(model.network.state_dict(keep_vars=True))
        Checkpoints(root / "checkpoints", keep=5).write(Checkpoint(step, named, {"moment": torch.ones(3)}, {}), recipe)


def test_a_shipped_name_a_directory_of_that_name_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, local = toy(), toy()
    shipped.save(tmp_path / "shipped" / "nano")
    local.save(tmp_path / "here" / "nano")
    monkeypatch.setattr(load_module, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path / "here")
    assert_same(load("nano"), shipped)
    for source in ("./nano", Path("nano"), str(tmp_path / "here" / "nano")):
        assert_same(load(source), local)
    (tmp_path / "here" / "owner").mkdir()
    shutil.move("nano", "owner/nano")
    assert_same(load("owner/nano"), local)  # a directory that is there comes before a hub id
    with pytest.raises(ValueError, match=r"no such directory, shipped model or hub id.*did you mean 'nano'"):
        load("nan")


def test_a_run_gives_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    models = [toy(), toy(), toy()]
    write_run(tmp_path, models)
    assert_same(load(tmp_path), models[2])
    assert_same(load(tmp_path / "checkpoints" / "step-00000001"), models[0])
    file = tmp_path / "checkpoints" / "step-00000003" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.warns(RuntimeWarning, match="step-00000003.*passed over"):
        assert_same(load(tmp_path), models[1])


def test_places_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model in this directory; expected recipe.json"):
        load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="without a checkpoint yet"):
        load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="a file; give the directory"):
        load(tmp_path / "file")
    for missing in (tmp_path / "gone", str(tmp_path / "gone"), "a/b/c", "/gone"):
        with pytest.raises(ValueError, match="no such directory"):
            load(missing)
    toy().save(tmp_path / "both")
    shutil.copy(DATA / "llama" / "config.json", tmp_path / "both")
    with pytest.raises(ValueError, match="both recipe"):
        load(tmp_path / "both")


def test_only_what_cannot_run_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "original/consolidated.pth", "README.md", "a.pkl")
    asked = []

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        files = [*(path.name for path in (DATA / "qwen3").iterdir()), *extra]
        for file in files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                assert file not in extra
                shutil.copy(DATA / "qwen3" / file, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert_same(load("owner/some-model_1.5"), load(DATA / "qwen3"))
    assert asked == ["owner/some-model_1.5"]


def test_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"^model='owner/absent': no such directory here, and the hub cannot.*connect") as caught:
        load("owner/absent")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "match"),
    (
        (GatedRepoError.__new__(GatedRepoError), "its owner asks for consent; accept"),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "no such model on the hub; check the spelling"),
        (LocalEntryNotFoundError("first\nsecond"), "the hub cannot give it .first.; connect"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ),
)
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, error: Exception, match: str) -> None:
    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match=match):
        load("owner/name")


@pytest.mark.parametrize("heads", ((SequentialHeadsConfig(depth=2),), (ParallelHeadsConfig(depth=1),)))
@pytest.mark.parametrize("shard_bytes", (2000, 10**9))
def test_heads_go_out_in_a_file_of_their_own_and_come_back(heads: Any, shard_bytes: int, tmp_path: Path) -> None:
    model = toy(heads=heads)
    save_hf(model, tmp_path / "out", shard_bytes=shard_bytes)
    back = load(tmp_path / "out")
    assert_same(model, back)
    assert back.network.config.heads == heads
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert not any(name.startswith("extra") for name in weights.headers(files))
    back.save(tmp_path / "own")
    save_hf(load(tmp_path / "own"), tmp_path / "again", shard_bytes=shard_bytes)
    assert_same(model, load(tmp_path / "again"))
    (tmp_path / "out" / "fewstep" / "heads.safetensors").unlink()
    with pytest.raises(ValueError, match=r"heads\.safetensors"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "family"),
    (
        ({}, "llama"),
        ({"mixers": (AttentionConfig(bias=True, out_bias=True),), "mlp_bias": True, "tied": False}, "llama"),
        ({"mixers": (AttentionConfig(window=4),)}, "mistral"),
        ({"mixers": (AttentionConfig(bias=True), AttentionConfig(bias=True, window=4))}, "qwen2"),
        ({"mixers": (AttentionConfig(qk_norm=True, kv_heads=1, head_width=6),)}, "qwen3"),
        ({"mixers": (AttentionConfig(qk_norm=True, bias=True, out_bias=True, window=3),)}, "qwen3"),
    ),
)
def test_the_first_family_that_can_say_a_decoder_is_used(fields: Any, family: str, tmp_path: Path) -> None:
    model = toy(**fields)
    save_hf(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family
    assert_same(model, load(tmp_path / "out"))


@pytest.mark.parametrize(
    ("fields", "mention"),
    (
        ({"mixers": (AttentionConfig(out_bias=True),)}, "llama cannot say bias=False; mistral cannot say out_bias=True; "),
        (
            {"mixers": (AttentionConfig(window=4), AttentionConfig(window=5))},
            "llama cannot say window=4; mistral cannot say mixers",
        ),
        ({"mixers": (AttentionConfig(window=4), AttentionConfig())}, "mistral cannot say mixers"),
        ({"norm": "layer"}, "llama cannot say norm=layer"),
        ({"activation": "gelu"}, "hidden_act='gelu'"),
        ({"max_positions": None}, "max_position_embeddings"),
        ({"position": NoPositionConfig()}, "llama cannot say anything but attention with rotary positions"),
    ),
)
def test_a_decoder_that_no_family_can_say(fields: Any, mention: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model: not a decoder that a Hugging Face family can say") as caught:
        save_hf(toy(**fields), tmp_path / "out")
    assert mention in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_that_was_changed_is_no_longer_described_by_where_it_came_from(tmp_path: Path) -> None:
    model = load(DATA / "llama")
    changed = Model(toy(mixers=(AttentionConfig(qk_norm=True),)).network, None, model.recipe)
    save_hf(changed, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3"
    assert_same(changed, load(tmp_path / "out"))


def test_an_export_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy(heads=(SequentialHeadsConfig(depth=1),))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="in use; choose a new or empty one"):
        save_hf(model, tmp_path / "used")
    (tmp_path / "empty").mkdir()
    save_hf(model, tmp_path / "empty")
    assert_same(model, load(tmp_path / "empty"))
    saves = []

    def full(named: Any, path: Path, metadata: Any) -> None:
        saves.append(path)
        if len(saves) == 3:
            raise OSError(28, "No space left on device")
        path.write_bytes(b"x")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(ValueError, match=r"could not be written.*No space left"):
        save_hf(model, tmp_path / "out", shard_bytes=2000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "used"]


@pytest.mark.parametrize(("family", "stored"), (("llama", torch.float32), ("qwen2", torch.bfloat16)))
def test_dtypes(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    assert load(DATA / family).dtype == torch.float32
    assert load(DATA / family, dtype="auto").dtype == stored
    assert load(DATA / family, dtype="float64").dtype == load(DATA / family, dtype=torch.float64).dtype == torch.float64
    save_hf(load(DATA / family), tmp_path / "half", dtype="float16")
    assert load(tmp_path / "half", dtype="auto").dtype == torch.float16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


def test_weights_of_two_kinds_load_as_one_that_holds_both(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(DATA / "qwen2", tmp_path / "mixed")
    named = load_file(DATA / "qwen2" / "model.safetensors")
    named["model.norm.weight"] = named["model.norm.weight"].to(torch.float16)
    save_file(named, tmp_path / "mixed" / "model.safetensors")
    model = load(tmp_path / "mixed", dtype="auto")
    assert model.dtype == torch.float32 and torch.equal(model.network.norm.weight, named["model.norm.weight"].float())


def test_ends_of_a_text(tmp_path: Path) -> None:
    assert load(DATA / "llama").eos_ids == (1, 2)
    shutil.copytree(DATA / "llama", tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").unlink()
    assert load(tmp_path / "other").eos_ids == (1,)  # the tokenizer's
    config = json.loads((DATA / "llama" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    other = load(tmp_path / "other")
    assert other.eos_ids == (7,)
    save_hf(other, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 7}
    other.save(tmp_path / "own")
    assert load(tmp_path / "own").eos_ids == (7,)
    with pytest.raises(ValueError, match="eos_ids"):
        Model(other.network, other.tokenizer, {"generation": {"eos_ids": "</s>"}})
