"""The tables of position encodings are those of `transformers`: recorded by `record_positions.py`, and live in the claims."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.nn.position import POSITIONS

RECORDED = json.loads(Path(__file__).with_name("positions_recorded.json").read_text(encoding="utf-8"))
CPU, CLOSE = torch.device("cpu"), {"rtol": 1e-5, "atol": 1e-8}


def built(kind: str, heads: int = 1, **fields: Any) -> Any:
    config: Any = POSITIONS[kind](**fields)
    return config.build(head_width=32, heads=heads)


@pytest.mark.parametrize("case", RECORDED["buckets"], ids=str)
def test_t5_buckets(case: dict[str, Any]) -> None:
    encoding = built("t5", **{name: case[name] for name in ("buckets", "farthest", "bidirectional")})
    assert encoding.bucket(torch.tensor(RECORDED["distances"])).tolist() == case["found"]


@pytest.mark.parametrize("heads", RECORDED["slopes"])
def test_bloom_slopes(heads: str) -> None:
    assert built("alibi", int(heads)).slopes == pytest.approx(RECORDED["slopes"][heads])


@pytest.mark.parametrize("case", RECORDED["yarn"], ids=lambda case: f"x{case['fields']['factor']:g}")
def test_yarn(case: dict[str, Any]) -> None:
    names = {"original_max_position_embeddings": "trained_length", "beta_slow": "slow", "beta_fast": "fast", "rope_theta": "base"}
    encoding = built("yarn", **{names.get(name, name): value for name, value in case["fields"].items()})
    frequencies, factor = case["found"]
    torch.testing.assert_close(encoding.frequencies(CPU, torch.float32), torch.tensor(frequencies), **CLOSE)
    assert encoding.config.amplitude == pytest.approx(factor)


def test_position_interpolation() -> None:
    encoding = built("rope", scaling="linear", factor=3.0)
    torch.testing.assert_close(encoding.frequencies(CPU, torch.float32), torch.tensor(RECORDED["linear"]), **CLOSE)


@pytest.mark.parametrize("length", RECORDED["dynamic"])
def test_dynamic_ntk(length: str) -> None:
    encoding = built("dynamic_ntk", factor=2.0, trained_length=64)
    wanted = torch.tensor(RECORDED["dynamic"][length])
    torch.testing.assert_close(encoding.frequencies(int(length), CPU, torch.float32), wanted, **CLOSE)


@pytest.mark.claims
def test_the_record_is_what_transformers_makes_now() -> None:
    from record_positions import record

    now = json.loads(json.dumps(record()))
    assert {**now, "transformers": ""} == {**RECORDED, "transformers": ""}
