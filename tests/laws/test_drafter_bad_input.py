"""Whatever is wrong with heads of strangers is one line that names it, and nothing is half loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_heads import MADE, D, Draw, V, Weights, eagle3, made, put, target

from fewstep.hub.drafters import read_drafter
from fewstep.hub.layouts import LAYOUTS


def drop(*names: str) -> Callable[[Weights, dict[str, Any]], Any]:
    return lambda weights, values: [weights.pop(name) for name in names]


def give(**fields: Any) -> Callable[[Weights, dict[str, Any]], Any]:
    return lambda weights, values: values.update(fields)


def shape(name: str, *sizes: int) -> Callable[[Weights, dict[str, Any]], Any]:
    return lambda weights, values: weights.update({name: torch.ones(sizes)})


def offset(place: int, value: int) -> Callable[[Weights, dict[str, Any]], Any]:
    return lambda weights, values: weights["d2t"].__setitem__(place, value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("medusa", drop("1.0.linear.bias"), "1.0.linear.bias is missing"),
        ("medusa", drop("2.2.weight"), "2.2.weight is missing"),
        ("medusa", shape("2.2.weight", V + 1, D), r"2.2.weight has shape \(24, 16\), expected \(23, 16\)"),
        ("medusa", shape("0.0.linear.weight", D + 1, D + 1), "0.0.linear.weight has shape"),
        ("medusa", shape("3.0.extra", 2), "3.0.extra is not part of this model"),
        ("medusa", give(medusa_num_heads=4), "medusa_num_heads=4, medusa_num_layers=2: the weights hold 3 heads of 2 blocks"),
        ("medusa", give(medusa_num_layers=1), "medusa_num_heads=3, medusa_num_layers=1: the weights hold 3 heads"),
        ("medusa", give(medusa_num_heads="3"), "medusa_num_heads='3': expected a whole number"),
        ("medusa_vllm", give(hidden_size=32), "hidden_size=32: heads for another model, this one has 16"),
        ("medusa_vllm", give(vocab_size=99), "vocab_size=99: heads for another model, this one has 23"),
        ("medusa_vllm", give(num_heads=2), "num_heads=2, num_hidden_layers=2: the weights hold 3 heads"),
        ("medusa_vllm", give(medusa_fc_bias=False), "medusa_fc_bias=False: the weights hold biases"),
        ("medusa_vllm", lambda w, v: w.update(token_map=torch.arange(5)), "token_map"),
        ("eagle", give(hidden_size=32), "hidden_size=32: heads for another model"),
        ("eagle", give(vocab_size=99), "vocab_size=99: heads for another model"),
        ("eagle", give(num_hidden_layers=2), "num_hidden_layers=2: fewstep drafts with heads of one layer"),
        ("eagle", give(bias=False), "fc.bias is not part of this model"),
        ("eagle", drop("fc.bias"), "fc.bias is missing"),
        ("eagle", drop("layers.0.mlp.up_proj.weight"), "layers.0.mlp.up_proj.weight is missing"),
        ("eagle", shape("layers.0.input_layernorm.weight", D), "layers.0.input_layernorm.weight is not part"),
        (
            "eagle",
            lambda w, v: w.update({"embed_tokens.weight": torch.ones(V, D)}),
            "embed_tokens.weight differs from the model's own",
        ),
        ("eagle", give(rope_scaling={"type": "longrope", "factor": 2.0}), "rope_scaling"),
        ("eagle3", give(target_hidden_size=32), "target_hidden_size=32: heads for another model"),
        ("eagle3", give(draft_vocab_size=99), "draft_vocab_size=99: the model has 23 tokens"),
        ("eagle3", give(draft_vocab_size=8), "lm_head.weight has shape|d2t has shape"),
        ("eagle3", drop("d2t"), "d2t is missing"),
        ("eagle3", offset(8, 15), r"d2t\[8\]: names token 23, expected 0 .. 22"),
        ("eagle3", offset(0, -1), r"d2t\[0\]: names token -1, expected 0 .. 22"),
        ("eagle3", offset(1, 2), "d2t: names a token twice"),
        ("eagle3", offset(1, 0), "t2d: marks other tokens"),
        ("eagle3", lambda w, v: w.update(d2t=w["d2t"].float()), "d2t is stored as torch.float32"),
        ("eagle3", give(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 9]}), "the trunk has the layers 0 .. 4"),
        ("eagle3", give(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1]}), "layers"),
        ("eagle3", give(eagle_config={"eagle_aux_hidden_state_layer_ids": 7}), "eagle_aux_hidden_state_layer_ids=7: expected"),
        ("eagle3", give(eagle_aux_hidden_state_layer_ids=[0, 1, 2]), "reads the inputs of the layers"),
        ("speculators", give(eagle_aux_hidden_state_layer_ids=[1, 2, 9]), "the trunk has the layers 0 .. 4"),
        ("speculators", give(norm_before_fc=True), "norm_before_fc=True: not supported"),
        ("speculators", give(speculators_model_type="dflash"), "speculators_model_type='dflash': expected 'eagle3'"),
        ("speculators", give(transformer_layer_config={"model_type": "mamba"}), "a layer of 'mamba'"),
        ("speculators", give(transformer_layer_config=7), "transformer_layer_config"),
        ("mtp", give(num_hidden_layers=5), "num_hidden_layers=5: heads for another model, this one has 4"),
        ("mtp", give(num_nextn_predict_layers=1), "num_nextn_predict_layers=1: the weights hold modules up to layer 5"),
        ("mtp", drop("model.layers.5.hnorm.weight"), "model.layers.5.hnorm.weight is missing"),
        ("mtp", shape("model.layers.5.mlp.experts.0.up_proj.weight", 2, 2), "experts.0.up_proj.weight is not part"),
        (
            "mtp",
            lambda w, v: w.update({"model.layers.4.eh_proj.weight_scale_inv": torch.ones(1)}),
            "weight_scale_inv is not part",
        ),
        ("mtp", give(architectures=["DeepseekV3ForCausalLM"]), "not one that fewstep reads"),
        ("mtp_qwen", give(architectures=["Qwen3NextForCausalLM"]), "not one that fewstep reads"),
        ("mtp_qwen", drop("mtp.norm.weight"), "mtp.norm.weight is missing"),
        ("mtp_qwen", lambda w, v: w.update({"midlayer.self_attn.q_proj.weight": torch.ones(2)}), "heads in several layouts"),
    ],
)
def test_bad_heads_are_refused_in_one_line(name: str, change: Any, message: str, tmp_path: Path) -> None:
    make, layout = MADE[name]
    weights, values = make(Draw(0))
    change(weights, values)
    own = target()
    before = {key: tensor.clone() for key, tensor in own.state_dict().items()}
    with pytest.raises(ValueError, match=message) as refusal:
        read_drafter(put(tmp_path / "bad", weights, values, LAYOUTS[layout].file), own)
    text = str(refusal.value)
    assert "\n" not in text and ("; " in text or "expected" in text) and str(tmp_path / "bad") in text
    assert not own.heads and all(torch.equal(own.state_dict()[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", MADE)
def test_heads_for_another_width_or_vocabulary_are_refused(name: str, tmp_path: Path) -> None:
    source, _ = made(name, tmp_path / "heads")
    for fields in ({"width": 32}, {"vocab": 24}):
        if name == "medusa_shared" and "vocab" in fields:
            continue  # nothing in it depends on the vocabulary
        with pytest.raises(ValueError, match=r"^[^\n]*; [^\n]*$"):
            read_drafter(source, target(**fields))


def test_a_target_without_the_tapped_layers_is_refused(tmp_path: Path) -> None:
    weights, values = eagle3(Draw(0))
    source = put(tmp_path / "heads", weights, {**values, "eagle_config": None}, "model.safetensors")  # 2, depth // 2, depth - 3
    with pytest.raises(
        ValueError, match=r"^[^\n]*layers=\(2, 1, 0\): not|^[^\n]*layers=\(2, 1, -1\): the trunk has the layers 0 .. 2; [^\n]*$"
    ):
        read_drafter(source, target(depth=2))


@pytest.mark.parametrize("name", MADE)
def test_a_truncated_file_or_config_is_refused(name: str, tmp_path: Path) -> None:
    source, _ = made(name, tmp_path / "heads")
    file = source / LAYOUTS[MADE[name][1]].file
    whole = file.read_bytes()
    for size in (0, 7, 60, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^[^\n]*not a whole safetensors file[^\n]*$"):
            read_drafter(source, target())
    file.write_bytes(whole)
    (source / "config.json").write_text((source / "config.json").read_text()[:-5])
    with pytest.raises(ValueError, match=r"^[^\n]*config.json: not valid JSON[^\n]*$"):
        read_drafter(source, target())
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=r"^[^\n]*config.json: cannot be read[^\n]*$"):
        read_drafter(source, target())
