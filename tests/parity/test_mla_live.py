"""Latent attention and `transformers`' DeepSeek-V2 and V3 agree with the same weights, in parallel and token by token."""

import importlib
from typing import Any

import pytest
import torch

from fewstep.core.mixer import Context
from fewstep.nn.mixers.mla import MLA, MLAConfig
from fewstep.nn.position import RopeConfig

pytestmark = pytest.mark.claims
HEADS, WIDTH, LENGTH = 4, 48, 21
SIZES = {"kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8}


def theirs(version: str, query_latent: int | None, bias: bool) -> tuple[Any, Any]:
    """Their layer and its rotary module, weights drawn anew."""
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.deepseek_{version.lower()}.modeling_deepseek_{version.lower()}")
    config = getattr(module, f"Deepseek{version}Config")(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=query_latent,
        attention_bias=bias,
        head_dim=SIZES["qk_rope_head_dim"],
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        attn_implementation="eager",
        **SIZES,
    )
    config._attn_implementation = "eager"
    layer = getattr(module, f"Deepseek{version}Attention")(config, 0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return layer, getattr(module, f"Deepseek{version}RotaryEmbedding")(config)


def ours(layer: Any, query_latent: int | None, bias: bool) -> MLA:
    """The same weights; their rotary pairs are adjacent, ours half a width apart."""
    n, r, e = SIZES["qk_nope_head_dim"], SIZES["qk_rope_head_dim"], SIZES["v_head_dim"]
    config = MLAConfig(
        latent=SIZES["kv_lora_rank"], query_latent=query_latent, content_width=n, rotary_width=r, value_width=e, bias=bias
    )
    mixer = config.build(width=WIDTH, heads=HEADS, position=RopeConfig(base=100.0).build(head_width=r))
    apart = torch.cat([torch.arange(0, r, 2), torch.arange(1, r, 2)])
    rows = (torch.arange(HEADS)[:, None] * (n + r) + torch.cat([torch.arange(n), n + apart])).flatten()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    weights = {
        "q.weight": state["q_proj.weight" if query_latent is None else "q_b_proj.weight"][rows],
        "kv_up": state["kv_b_proj.weight"],
        "kv_norm.weight": state["kv_a_layernorm.weight"],
    }
    down = torch.cat([torch.arange(config.latent or 0), (config.latent or 0) + apart])
    for end in ("weight", "bias") if bias else ("weight",):
        weights[f"kv_down.{end}"] = state[f"kv_a_proj_with_mqa.{end}"][down]
        weights[f"out.{end}"] = state[f"o_proj.{end}"]
        if query_latent is not None:
            weights[f"q_down.{end}"] = state[f"q_a_proj.{end}"]
    if query_latent is not None:
        weights["q_norm.weight"] = state["q_a_layernorm.weight"]
    mixer.load_state_dict(weights)
    return mixer


@pytest.mark.parametrize(("query_latent", "bias"), [(None, False), (9, True)])
@pytest.mark.parametrize("version", ["V2", "V3"])
def test_deepseek(version: str, query_latent: int | None, bias: bool) -> None:
    layer, rotary = theirs(version, query_latent, bias)
    mixer = ours(layer, query_latent, bias)
    x, positions = torch.randn(2, LENGTH, WIDTH), torch.arange(LENGTH).expand(2, -1)
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1).expand(2, 1, -1, -1)
    with torch.no_grad():
        wanted, _ = layer(x, attention_mask=mask, position_embeddings=rotary(x, positions))
        parallel, _ = mixer(x, Context(positions))
        state, steps = mixer.init_state(2, LENGTH, device="cpu", dtype=torch.float32), []
        for i in range(LENGTH):
            y, state = mixer.extend(x[:, i : i + 1], Context(), state)
            state = state.commit(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
            steps.append(y)
    differences = [float((got - wanted).abs().max()) for got in (parallel, torch.cat(steps, 1))]
    print(
        f"{version}, query latent {query_latent}: parallel {differences[0]:.1e}, steps {differences[1]:.1e}, "
        f"largest output {float(wanted.abs().max()):.2f}"
    )
    assert wanted.abs().max() > 0.1 and max(differences) < 1e-4
