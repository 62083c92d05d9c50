"""Whatever is wrong with a checkpoint of strangers is one line that names it; nothing of it runs and nothing is half loaded."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from fewstep.hub.load import load

DATA = Path(__file__).parents[1] / "parity" / "data" / "hub"
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@contextmanager
def refused(*mentions: str) -> Iterator[None]:
    """The body raises a ValueError of one line that mentions all of `mentions`."""
    with pytest.raises(ValueError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and type(caught.value) is ValueError
    for mention in mentions:
        assert mention in message, message


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Path]:
    def copy(family: str = "llama", **config: Any) -> Path:
        shutil.copytree(DATA / family, tmp_path / family)
        file = tmp_path / family / "config.json"
        values = {**json.loads(file.read_text()), **config}
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
        return tmp_path / family

    return copy


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    named = load_file(directory / "model.safetensors")
    change(named)
    save_file(named, directory / "model.safetensors")


def test_the_untouched_copy_loads(damaged: Callable[..., Path]) -> None:
    assert load(damaged()).network.vocab == 61


@pytest.mark.parametrize("size", (0, 5, 8, 200, 20_000, -1))
def test_a_truncated_file(damaged: Callable[..., Path], size: int) -> None:
    directory = damaged()
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with refused(str(file), "not a whole safetensors file", "download it again"):
        load(directory)


def test_a_file_that_is_something_else(damaged: Callable[..., Path], seed: int) -> None:
    directory = damaged()
    noise = torch.randint(256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    (directory / "model.safetensors").write_bytes(bytes(noise.tolist()))
    with refused("model.safetensors", "not a whole safetensors file"):
        load(directory)


def test_a_missing_and_a_truncated_shard(damaged: Callable[..., Path]) -> None:
    directory = damaged("qwen3")
    shard = directory / "model-00002-of-00005.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    with refused(shard.name, "is missing", "download it"):
        load(directory)
    shard.write_bytes(content[:-1])
    with refused(shard.name, "not a whole safetensors file"):
        load(directory)


@pytest.mark.parametrize("name", ("../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", "model.bin", 7, None))
def test_an_index_that_points_elsewhere(damaged: Callable[..., Path], tmp_path: Path, name: Any) -> None:
    directory = damaged("qwen3")
    shutil.copy(directory / "model-00001-of-00005.safetensors", tmp_path / "x.safetensors")
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(values))
    with refused(str(index), "not the name of a safetensors file beside it"):
        load(directory)


@pytest.mark.parametrize("text", ("{", "[]", "{}", '{"weight_map": []}', "[" * 100_000))
def test_an_index_that_is_none(damaged: Callable[..., Path], text: str) -> None:
    directory = damaged("qwen3")
    (directory / "model.safetensors.index.json").write_text(text)
    with refused("model.safetensors.index.json"):
        load(directory)


def test_pickles_alone(damaged: Callable[..., Path]) -> None:
    directory = damaged()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with refused("only pickle files (pytorch_model.bin)", "convert"):
        load(directory)


def test_tensors_that_do_not_fit(damaged: Callable[..., Path]) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    directory = damaged()
    change_tensors(directory, lambda named: named.update({name: named[name][:-1].clone()}))
    with refused(name, "shape (11, 24), expected (12, 24)"):
        load(directory)
    change_tensors(directory, lambda named: named.pop(name))
    with refused(name, "is missing"):
        load(directory)


def test_tensors_that_do_not_belong(damaged: Callable[..., Path]) -> None:
    directory = damaged()
    inverse = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(directory, lambda named: named.update({inverse: torch.ones(3)}))
    assert load(directory).network.depth == 3  # older files hold what the config says already
    change_tensors(directory, lambda named: named.update({"model.layers.7.mlp.up_proj.weight": torch.ones(3)}))
    with refused("model.layers.7.mlp.up_proj.weight", "not part of this model"):
        load(directory)


def test_quantised_tensors(damaged: Callable[..., Path]) -> None:
    directory = damaged()
    change_tensors(directory, lambda named: named.update({"lm_head.weight": torch.ones(61, 24, dtype=torch.int8)}))
    with refused("lm_head.weight", "I8", "quantised"):
        load(directory)


def test_a_tied_head_stored_twice(damaged: Callable[..., Path]) -> None:
    directory = damaged("qwen2")
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(directory, lambda named: named.update({"lm_head.weight": embedding.clone()}))
    network = load(directory, packed=False).network
    assert network.head.weight is network.embedding.weight
    change_tensors(directory, lambda named: named.update({"lm_head.weight": embedding + 1}))
    with refused("lm_head.weight", "ties"):
        load(directory)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key(damaged: Callable[..., Path], key: str) -> None:
    with refused("config.json", f"{key}: missing", "download it again"):
        load(damaged(**{key: ...}))


@pytest.mark.parametrize(
    ("key", "value"),
    (
        ("hidden_size", "24"),
        ("hidden_size", -24),
        ("hidden_size", 24.0),
        ("hidden_size", None),
        ("hidden_size", [24]),
        ("hidden_size", 10**30),
        ("vocab_size", 0),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 10**12),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "1e-5"),
        ("tie_word_embeddings", 1),
        ("hidden_act", "gelu"),
        ("hidden_act", ["silu"]),
        ("head_dim", -2),
        ("quantization_config", {"quant_method": "gptq"}),
        ("eos_token_id", "</s>"),
    ),
)
def test_a_key_of_another_kind(damaged: Callable[..., Path], key: str, value: Any) -> None:
    directory = damaged(**{key: value})
    (directory / "generation_config.json").unlink()
    with refused("config.json", key):
        load(directory)


@pytest.mark.parametrize(
    ("values", "mention"),
    (
        ({"num_key_value_heads": 3}, "kv_heads=3"),
        ({"head_dim": 5}, "head_width=5"),
        ({"num_hidden_layers": 60_000}, "60000 layers"),
        (
            {"hidden_size": 1 << 24, "intermediate_size": 1 << 24, "num_attention_heads": 1 << 16, "head_dim": 1 << 16},
            "model.embed",
        ),
    ),
)
def test_sizes_that_do_not_fit(damaged: Callable[..., Path], values: dict[str, Any], mention: str) -> None:
    with refused("llama", mention):
        load(damaged(**values))


@pytest.mark.parametrize("family", ("qwen2", "qwen3"))
@pytest.mark.parametrize(
    ("values", "mention"),
    (
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}, "use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0"),
    ),
)
def test_windows_that_make_no_sense(damaged: Callable[..., Path], family: str, values: dict[str, Any], mention: str) -> None:
    with refused("config.json", mention):
        load(damaged(family, **values))


LLAMA3 = json.loads((DATA / "llama" / "config.json").read_text())["rope_parameters"]


@pytest.mark.parametrize(
    ("rope", "mention"),
    (
        ({"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}, "default, linear, llama3"),
        ({"rope_type": "proportional", "factor": 2.0}, "default, linear, llama3"),
        ({"full_attention": {"rope_type": "default"}}, "in all layers"),
        ({"rope_type": ["linear"]}, "default, linear, llama3"),
        ({"rope_type": "linear"}, "factor: missing"),
        ({"rope_type": "linear", "factor": 0.5}, "factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "low_freq_factor"),
        ({**LLAMA3, "original_max_position_embeddings": "16"}, "original_max_position_embeddings"),
        ([1, 2], "expected a table"),
    ),
)
def test_positions_that_fewstep_lacks(damaged: Callable[..., Path], rope: Any, mention: str) -> None:
    with refused("config.json", "rope_parameters" if mention != "partial_rotary_factor" else mention, mention):
        load(damaged(rope_parameters=rope))


@pytest.mark.parametrize(
    "values",
    (
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": None, "model_type": "mamba"},
        {"architectures": [], "model_type": ...},
        {"architectures": "LlamaForCausalLM", "model_type": None},
    ),
)
def test_an_unknown_architecture(damaged: Callable[..., Path], values: dict[str, Any]) -> None:
    known = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    with refused("config.json", "architectures=", *known):
        load(damaged(**values))


def test_a_tokenizer_of_a_larger_vocabulary(damaged: Callable[..., Path]) -> None:
    directory = damaged("mistral")
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(62)}, unk_token="w0")).save(str(directory / "tokenizer.json"))
    with refused("tokenizer vocab=62", "vocab=61", "use the tokenizer it was trained with"):
        load(directory)


@pytest.mark.parametrize("name", ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"))
def test_files_that_are_not_json(damaged: Callable[..., Path], name: str) -> None:
    directory = damaged()
    (directory / name).write_text('{"a": ')
    with refused(name):
        load(directory)


def test_code_that_came_along_is_not_run(damaged: Callable[..., Path], tmp_path: Path) -> None:
    directory = damaged(auto_map={"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"})
    for name in ("configuration_evil.py", "evil.py", "__init__.py"):
        (directory / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    assert load(directory).network.vocab == 61
    assert not (tmp_path / "ran").exists()


def test_a_dtype_that_weights_cannot_have(damaged: Callable[..., Path]) -> None:
    with refused("dtype='int8'", re.escape("auto")):
        load(damaged(), dtype="int8")
