"""Checkpoints written by `transformers` load with its logits and its greedy tokens, and go back bit for bit (`record_hub.py`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.decode.drafters.silent import Silent
from fewstep.decode.generate import decode
from fewstep.decode.stream import Settings
from fewstep.hub.load import load
from fewstep.hub.save import save_hf
from fewstep.models.model import Model

DATA = Path(__file__).parent / "data" / "hub"
PROMPT = 8
FAMILIES = sorted(path.parent.name for path in DATA.glob("*/answers.safetensors"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def greedy(model: Model, prompts: torch.Tensor, count: int) -> list[list[int]]:
    completions = decode(model.network, Silent(), prompts.tolist(), Settings(max_new_tokens=count))
    return [completion.tokens for completion in completions]


def assert_same_weights(one: Path, other: Path) -> None:
    before, after = weights(one), weights(other)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_those_recorded(family: str) -> None:
    answers = load_file(DATA / family / "answers.safetensors")
    model = load(DATA / family)
    torch.testing.assert_close(model.logits(answers["ids"]), answers["logits"], atol=3e-5, rtol=0)
    assert greedy(model, answers["ids"][:, :PROMPT], answers["greedy"].shape[1]) == answers["greedy"].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_is_bit_equal(family: str, tmp_path: Path) -> None:
    save_hf(load(DATA / family, dtype="auto"), tmp_path / "back")
    assert_same_weights(DATA / family, tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((DATA / family / name).read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_through_a_fewstep_directory_and_float32_is_bit_equal(family: str, tmp_path: Path) -> None:
    load(DATA / family).save(tmp_path / "own")
    stored = next(iter(weights(DATA / family).values())).dtype
    save_hf(load(tmp_path / "own"), tmp_path / "back", dtype=stored, shard_bytes=9000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert_same_weights(DATA / family, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((DATA / family / "config.json").read_text())


@pytest.mark.claims
def test_loading_does_not_import_the_compiler_of_torch() -> None:
    code = f"import sys; from fewstep.hub.load import load; load({str(DATA / 'qwen2')!r}); print([*sys.modules])"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'fewstep.hub.load'" in modules and "'torch._dynamo'" not in modules and "'sympy'" not in modules


def test_tokenizer_chat_and_ends_come_along_and_go_back(tmp_path: Path) -> None:
    model = load(DATA / "llama")
    save_hf(model, tmp_path / "back")
    for known in (model, load(tmp_path / "back")):
        assert known.eos_ids == (1, 2)
        assert known.tokenizer is not None and known.tokenizer.encode("ab z?") == [4, 5, 30, 29, 3]
        assert known.tokenizer.bos == 0 and known.tokenizer.hash == model.tokenizer.hash
        assert known.chat is not None and known.chat.render([{"role": "user", "content": "hi"}]) == "<s>hi"
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_text() == (DATA / "llama" / name).read_text()
