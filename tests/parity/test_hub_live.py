"""The live `transformers` and fewstep compute the same from the same directory, whichever of the two wrote it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from record_hub import LINEAR, LLAMA3, PROMPT, RECORDED, SIZES, VOCAB, Case, answers, checkpoint
from test_hub_recorded import assert_same_weights, greedy

from fewstep.hub.load import load
from fewstep.hub.save import save_hf
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.models.model import Model
from fewstep.nn.heads import SequentialHeadsConfig
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.position import RopeConfig, YarnConfig

pytestmark = pytest.mark.claims
ALTERNATING = {
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 2.0}
CASES = {
    **RECORDED,
    "llama, many heads, tied": Case("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, one key head, wide heads, linear": Case(
        "Llama", {"num_key_value_heads": 1, "head_dim": 12, "rope_parameters": LINEAR}
    ),
    "llama, float16, sharded": Case("Llama", {}, dtype=torch.float16, shard_bytes=10_000),
    "mistral, no window, tied": Case("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "mistral, window of two": Case("Mistral", {"sliding_window": 2}),  # of one: their cache then keeps everything
    "mistral, llama3": Case("Mistral", {"rope_parameters": LLAMA3}, shard_bytes=10_000),
    "qwen2, untied, full": Case("Qwen2", {}),
    "qwen2, alternating windows, llama3": Case("Qwen2", {**ALTERNATING, "rope_parameters": LLAMA3}),
    "qwen3, biases, tied": Case("Qwen3", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 8}),
    "qwen3, alternating windows, linear": Case("Qwen3", {**ALTERNATING, "head_dim": 6, "rope_parameters": LINEAR}),
    "llama, yarn": Case("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 4.0, "beta_slow": 0.5}}),
    "llama, dynamic": Case("Llama", {"rope_parameters": DYNAMIC}),
    "mistral, dynamic": Case("Mistral", {"rope_parameters": DYNAMIC}),
    "qwen2, yarn, alternating windows": Case("Qwen2", {**ALTERNATING, "rope_parameters": YARN}),
    "qwen3, yarn of two scales": Case(
        "Qwen3", {"head_dim": 10, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 2.0}}
    ),
}
OWN = {
    "plain": (DecoderConfig(), "llama"),
    "one window": (DecoderConfig(mixers=(AttentionConfig(window=6),)), "mistral"),
    "biases": (DecoderConfig(mixers=(AttentionConfig(bias=True), AttentionConfig(bias=True, window=5)), tied=False), "qwen2"),
    "normed": (DecoderConfig(mixers=(AttentionConfig(qk_norm=True, head_width=10, kv_heads=2),), mlp_bias=False), "qwen3"),
    "stretched": (DecoderConfig(position=RopeConfig(scaling="llama3", factor=3.0, trained_length=16), mlp_bias=True), "llama"),
    "yarn": (DecoderConfig(position=YarnConfig(base=300.0, factor=4.0, trained_length=16, fast=4.0, slow=0.5)), "llama"),
    "dynamic": (DecoderConfig(position=RopeConfig(scaling="dynamic", factor=2.0, trained_length=64)), "llama"),
    "heads": (DecoderConfig(heads=(SequentialHeadsConfig(depth=2),)), "llama"),
}


def peer(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def assert_agree(model: Model, theirs: Any, seed: int, label: str) -> None:
    expected = answers(theirs, seed)
    difference = (model.logits(expected["ids"]) - expected["logits"]).abs().max().item()
    print(f"{label}: largest difference of logits {difference:.1e}, largest logit {expected['logits'].abs().max():.1f}")
    assert difference < 1e-4
    count = expected["greedy"].shape[1]
    assert greedy(model, expected["ids"][:, :PROMPT], count) == expected["greedy"].tolist()


@pytest.mark.parametrize("name", CASES)
def test_what_transformers_writes(name: str, tmp_path: Path, seed: int) -> None:
    theirs = checkpoint(CASES[name], tmp_path / "in", seed)
    assert_agree(load(tmp_path / "in"), theirs, seed, name)
    save_hf(load(tmp_path / "in", dtype="auto"), tmp_path / "out")
    assert_same_weights(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "in" / "config.json").read_text()) == json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    "scaling",
    (
        {"type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 3.0},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {key: LLAMA3[key] for key in LLAMA3 if key != "rope_theta"},
        None,
    ),
)
def test_the_older_spelling_of_positions(scaling: dict | None, tmp_path: Path, seed: int) -> None:
    checkpoint(Case("Llama"), tmp_path, seed)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 300.0, "rope_scaling": scaling}))
    assert_agree(load(tmp_path), peer(tmp_path), seed, f"llama, older spelling, {scaling}")


@pytest.mark.parametrize("name", OWN)
def test_what_fewstep_writes(name: str, tmp_path: Path, seed: int) -> None:
    config, family = OWN[name]
    sizes = {"vocab": VOCAB, "width": SIZES["hidden_size"], "hidden": 20, "depth": 2, "max_positions": 64}
    network: Decoder = config.model_copy(update=sizes).build()
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.3)
    model = Model(network, None, {"name": "toy"})
    save_hf(model, tmp_path / "out", shard_bytes=8000)
    theirs = peer(tmp_path / "out")
    assert theirs.config.model_type == family
    assert_agree(model, theirs, seed, f"fewstep {name} as {family}")
    assert_agree(load(tmp_path / "out"), theirs, seed, f"fewstep {name} as {family}, read again")
