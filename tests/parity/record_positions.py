"""Records the tables that `transformers` makes of positions, for `test_positions_recorded.py`: run it to write them anew.

It uses the live library; the test does not.
"""

import json
from pathlib import Path
from typing import Any

import torch

DISTANCES = (*range(-40, 41), 63, 64, 90, 127, 128, 129, 500, -63, -64, -90, -127, -128, -129, -500)
BUCKETS = ((32, 128, False), (32, 128, True), (16, 20, False), (8, 12, True))
HEADS = (1, 2, 6, 8, 12, 16, 20)
YARNS = (
    {"factor": 4.0, "original_max_position_embeddings": 64},
    {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_slow": 0.5, "beta_fast": 20.0},
    {"factor": 8.0, "original_max_position_embeddings": 2048, "rope_theta": 500000.0},
)
LENGTHS = (10, 64, 65, 300)


def frequencies(kind: str, fields: dict[str, Any], length: int | None = None) -> tuple[list[float], float]:
    """Of heads of 32, and the factor of cos and sin."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": kind, "rope_theta": 10000.0, **fields}
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=64, rope_parameters=rope)
    made, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    return made.tolist(), float(factor)


def record() -> dict[str, Any]:
    """Everything the test compares."""
    import transformers
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.tensor(DISTANCES)
    ones = torch.ones(1, 2, dtype=torch.int64)
    return {
        "transformers": transformers.__version__,
        "distances": DISTANCES,
        "buckets": [
            {
                "buckets": buckets,
                "farthest": farthest,
                "bidirectional": both,
                "found": T5Attention._relative_position_bucket(-distances, both, buckets, farthest).tolist(),
            }
            for buckets, farthest, both in BUCKETS
        ],
        "slopes": {str(heads): build_alibi_tensor(ones, heads, torch.float32)[:, 0, 1].tolist() for heads in HEADS},
        "yarn": [{"fields": fields, "found": frequencies("yarn", fields)} for fields in YARNS],
        "linear": frequencies("linear", {"factor": 3.0})[0],
        "dynamic": {str(length): frequencies("dynamic", {"factor": 2.0}, length)[0] for length in LENGTHS},
    }


if __name__ == "__main__":
    text = json.dumps(record(), indent=None, separators=(",", ":"))
    Path(__file__).with_name("positions_recorded.json").write_text(text + "\n", encoding="utf-8")
