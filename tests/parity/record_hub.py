"""Writes the tiny checkpoints of `data/hub` with `transformers`, beside what it computes from them: run it to make them anew.

It uses the live library; of the tests only those marked `claims` do.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

DATA = Path(__file__).parent / "data" / "hub"
VOCAB, TOKENS, PROMPT = 61, 24, 8
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}
CHAT = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"


@dataclass(frozen=True)
class Case:
    """A checkpoint to write: `transformers`' classes by their prefix, config values, and how it is stored."""

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shard_bytes: int | None = None


RECORDED = {
    "llama": Case("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "mistral": Case("Mistral", {"sliding_window": 7, "head_dim": 8, "num_key_value_heads": 1}, dtype=torch.bfloat16),
    "qwen2": Case(
        "Qwen2",
        {
            "tie_word_embeddings": True,
            "rope_parameters": LINEAR,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
        dtype=torch.bfloat16,
    ),
    "qwen3": Case("Qwen3", {"head_dim": 10}, dtype=torch.bfloat16, shard_bytes=8000),
}


def checkpoint(case: Case, directory: Path, seed: int) -> Any:
    """Write the checkpoint of `case`, every weight random, and return what `transformers` reads from it, in float32."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{case.family}Config")(**{**SIZES, **case.config})
    model_class = getattr(transformers, f"{case.family}ForCausalLM")
    model = model_class(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
    limit = {} if case.shard_bytes is None else {"max_shard_size": case.shard_bytes}
    model.to(case.dtype).save_pretrained(directory, **limit)
    return model_class.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def answers(model: Any, seed: int) -> dict[str, Tensor]:
    """Random `ids` [2,T], their `logits` and the `greedy` continuation of their first tokens, by `transformers`."""
    ids = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    greedy = model.generate(
        ids[:, :PROMPT], attention_mask=torch.ones(2, PROMPT, dtype=torch.int64), max_new_tokens=TOKENS, do_sample=False
    )
    return {"ids": ids, "logits": model(ids).logits.contiguous(), "greedy": greedy[:, PROMPT:].contiguous()}


def tokenizer_files(directory: Path) -> None:
    """A tokenizer of single characters with a chat template and two tokens that end a text."""
    words = ["<s>", "</s>", "<turn>", "?", *map(chr, range(ord("a"), ord("z") + 1)), " ", "."]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.add_special_tokens(words[:3])
    core.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]}))


def main() -> None:
    shutil.rmtree(DATA, ignore_errors=True)
    for seed, (name, case) in enumerate(RECORDED.items()):
        model = checkpoint(case, DATA / name, seed)
        save_file(answers(model, seed), DATA / name / "answers.safetensors")
    tokenizer_files(DATA / "llama")
    versions = {
        package: importlib.metadata.version(package) for package in ("transformers", "torch", "safetensors", "tokenizers")
    }
    (DATA / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
