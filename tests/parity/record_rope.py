"""Writes `rope_recorded.json`: rotary tables of config.json files and the frequencies that `transformers` makes of them."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "rope_recorded.json"
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 4096}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
TABLES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
    "yarn": YARN,
    "yarn, older spelling": {("type" if key == "rope_type" else key): value for key, value in YARN.items()},
    "yarn, trained on all positions": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
    "yarn, another ramp": {**YARN, "beta_fast": 16.0, "beta_slow": 2, "attention_factor": 1.25},
    "yarn, ends of the ramp left open": {**YARN, "beta_fast": None, "beta_slow": None, "attention_factor": None},
    "yarn, scales of DeepSeek": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn, one scale": {**YARN, "mscale": 0.7},
}


def main() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    found = {}
    for name, table in TABLES.items():
        rotary = LlamaRotaryEmbedding(LlamaConfig(**SIZES, rope_parameters=dict(table)))
        found[name] = {"table": table, "frequencies": rotary.inv_freq.tolist(), "amplitude": rotary.attention_scaling}
    recorded = {"transformers": importlib.metadata.version("transformers"), "sizes": SIZES, "tables": found}
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
