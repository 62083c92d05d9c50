"""Rotary tables of config.json mean the frequencies that `transformers` makes of them (`record_rope.py`), and go back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.hub.families import FAMILIES, explicit, read_config, write_config
from fewstep.hub.rope import read_rope, write_rope
from fewstep.nn.position import POSITIONS, RopeConfig, YarnConfig

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "rope_recorded.json").read_text())
SIZES, TABLES = RECORDED["sizes"], RECORDED["tables"]
LENGTH, WIDTH = SIZES["max_position_embeddings"], SIZES["hidden_size"] // SIZES["num_attention_heads"]
YARN = TABLES["yarn"]["table"]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", TABLES)
def test_frequencies_are_those_recorded_and_the_table_goes_back(name: str, spelling: str) -> None:
    table = TABLES[name]["table"]
    values = {spelling: table} if spelling == "rope_parameters" else {"rope_theta": table["rope_theta"], spelling: table}
    config = read_rope(values, LENGTH)
    wanted = torch.tensor(TABLES[name]["frequencies"])
    torch.testing.assert_close(config.frequencies(WIDTH, torch.device("cpu"), torch.float32), wanted, rtol=1e-6, atol=0)
    assert config.amplitude == pytest.approx(TABLES[name]["amplitude"], rel=1e-12)
    assert read_rope(write_rope(config), LENGTH) == config


@pytest.mark.parametrize(
    ("table", "said"),
    (
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, ("factor", "original_max_position_embeddings")),
        ({"type": "dynamic", "factor": 2.0}, ("factor",)),
        ({"type": "linear", "factor": 2.0}, ("factor",)),
        (YARN, ("factor", "original_max_position_embeddings")),
    ),
)
def test_a_decoder_says_the_scaling_it_was_read_with(table: dict[str, Any], said: tuple[str, ...]) -> None:
    family = FAMILIES["llama"]
    config = read_config(family, {**LLAMA, "rope_theta": 500.0, "rope_scaling": table})
    written = write_config(family, config)
    assert written["rope_theta"] == table.get("rope_theta", 500.0)
    assert written["rope_scaling"]["rope_type"] == table.get("type", table.get("rope_type"))
    assert {key: written["rope_scaling"][key] for key in said} == {key: table[key] for key in said}
    assert read_config(family, written) == explicit(config)


def test_what_no_family_says_is_refused_by_name() -> None:
    family = FAMILIES["llama"]
    config = read_config(family, LLAMA)
    stretched = config.model_copy(update={"position": RopeConfig(scaling="dynamic", factor=2.0, trained_length=33)})
    with pytest.raises(ValueError, match=r"^llama cannot say position=[^\n]*trained_length=33[^\n]*$"):
        write_config(family, stretched)
    for kind in ("dynamic_ntk", "ntk", "rope_partial"):
        with pytest.raises(ValueError, match=r"^llama cannot say anything but attention with rotary positions[^\n]*$"):
            write_config(family, config.model_copy(update={"position": POSITIONS[kind]()}))


@pytest.mark.parametrize(
    ("table", "mention"),
    (
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "not supported; fewstep has default, linear"),
        ({"rope_type": "proportional", "factor": 2.0}, "not supported; fewstep has default, linear"),
        ({**YARN, "truncate": False}, "truncate=False: not supported"),
        ({**YARN, "factor": None}, "factor=None: expected a number"),
        ({**YARN, "beta_fast": 0.5}, "slow=1.0: must be below fast=0.5"),
        ({**YARN, "rope_theta": 0.5}, "base=0.5: must be above 1"),
        ({**YARN, "mscale": "1", "mscale_all_dim": 1.0}, "mscale='1': expected a number"),
        ({"rope_type": "yarn"}, "factor: missing"),
        ({"rope_type": "dynamic"}, "factor: missing"),
        ({"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor: not supported"),
    ),
)
def test_what_fewstep_lacks_is_refused_in_one_line(table: dict[str, Any], mention: str) -> None:
    with pytest.raises(ValueError, match=r"^(rope_parameters|partial_rotary_factor)[^\n]*$") as refused:
        read_rope({"rope_parameters": table}, LENGTH)
    assert mention in str(refused.value)


def test_a_text_ends_where_dynamic_scaling_would_set_in() -> None:
    config = read_rope({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 32)
    assert config == RopeConfig(scaling="dynamic", factor=2.0, trained_length=32) and not isinstance(config, YarnConfig)
    decoder = read_config(FAMILIES["llama"], {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    network = decoder.build()
    assert network(torch.zeros(1, 32, dtype=torch.int64)).final.shape == (1, 32, 16)
    with pytest.raises(ValueError, match=r"^positions: 32 is beyond trained_length=32, [^\n]*dynamic_ntk$"):
        network(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^max_positions=33: rope positions end at length=32; [^\n]*$"):
        decoder.model_copy(update={"max_positions": 33}).build()
