"""Heads in other projects' layouts: names, shapes and formulas, written down here once more from those projects' code.

Sources: FasterDecoding/Medusa medusa_model.py, vLLM medusa.py, SafeAILab/EAGLE cnets1.py and cnets.py, vllm-project/speculators
eagle3/core.py and model_definitions.py, vLLM deepseek_mtp.py and qwen3_next_mtp.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu, softmax

from fewstep.core.mixer import Context
from fewstep.core.recipe import parse
from fewstep.hub.layouts import LAYOUTS
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.nn.eagle import EagleNetwork
from fewstep.nn.medusa import MedusaHeads

V, D, DEPTH, DRAFTED = 23, 16, 4, 9
INNER, HEADS, GROUPS, EDGE = 40, 4, 2, 4  # of the heads' own layer, which is not like the target's
BASE, EPS = 5000.0, 1e-5
TRUNK = {"vocab": V, "width": D, "depth": DEPTH, "query_heads": 2, "hidden": 24, "tied": False, "init_std": 0.3}
LAYER = {
    "hidden_size": D,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": EPS,
    "rope_theta": BASE,
    "max_position_embeddings": 512,
    "vocab_size": V,
}
TRUNK_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **LAYER,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
Weights = dict[str, Tensor]


def target(**fields: Any) -> Decoder:
    torch.manual_seed(5)
    return parse(DecoderConfig, {**TRUNK, "mixers": [{"kind": "attention"}], **fields}).build().eval()


class Draw:
    """Weights of stated shapes, none of them neutral."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return 0.4 * torch.randn(*shape, generator=self.generator) + (1.0 if len(shape) == 1 else 0.0)


def layer(draw: Draw, prefix: str, inputs: int = D, inner: int = INNER, heads: int = HEADS, groups: int = GROUPS) -> Weights:
    edge = D // heads
    return {
        f"{prefix}.self_attn.q_proj.weight": draw(heads * edge, inputs),
        f"{prefix}.self_attn.k_proj.weight": draw(groups * edge, inputs),
        f"{prefix}.self_attn.v_proj.weight": draw(groups * edge, inputs),
        f"{prefix}.self_attn.o_proj.weight": draw(D, heads * edge),
        f"{prefix}.post_attention_layernorm.weight": draw(D),
        f"{prefix}.mlp.gate_proj.weight": draw(inner, D),
        f"{prefix}.mlp.up_proj.weight": draw(inner, D),
        f"{prefix}.mlp.down_proj.weight": draw(D, inner),
    }


def tables() -> Weights:
    ids = torch.tensor([0, 2, 3, 7, 8, 13, 14, 20, 22])
    return {"d2t": ids - torch.arange(DRAFTED), "t2d": torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)}


# the layouts, literally


def medusa(draw: Draw) -> tuple[Weights, dict[str, Any]]:
    weights = {}
    for k in range(3):
        for block in range(2):
            weights |= {f"{k}.{block}.linear.weight": draw(D, D), f"{k}.{block}.linear.bias": draw(D)}
        weights[f"{k}.2.weight"] = draw(V, D)
    return weights, {"medusa_num_heads": 3, "medusa_num_layers": 2, "base_model_name_or_path": "toy"}


def medusa_shared(draw: Draw) -> tuple[Weights, dict[str, Any]]:
    weights = {f"{k}.0.linear.{leaf}": draw(*shape) for k in range(2) for leaf, shape in (("weight", (D, D)), ("bias", (D,)))}
    return weights, {"medusa_num_heads": 2, "medusa_num_layers": 1, "version": "2", "base_model_name_or_path": "toy"}


def medusa_vllm(draw: Draw) -> tuple[Weights, dict[str, Any]]:
    weights = {f"blocks.{k}.layers.{block}.weight": draw(D, D) for k in range(3) for block in range(2)}
    weights |= {f"blocks.{k}.layers.{block}.bias": draw(D) for k in range(3) for block in range(2)}
    weights |= {f"lm_heads.{k}.weight": draw(V, D) for k in range(3)}
    sizes = {"hidden_size": D, "vocab_size": V, "truncated_vocab_size": V, "num_heads": 3, "num_hidden_layers": 2}
    return weights, {"architectures": ["MedusaModel"], "model_type": "medusa", "medusa_fc_bias": True, **sizes}


def eagle(draw: Draw) -> tuple[Weights, dict[str, Any]]:
    weights = {"fc.weight": draw(D, 2 * D), "fc.bias": draw(D), **layer(draw, "layers.0")}
    weights["embed_tokens.weight"] = target().embedding.weight.detach().clone()
    return weights, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bias": True, **LAYER}


def fused(draw: Draw, prefix: str) -> Weights:
    norms = {f"{prefix}.{name}.weight": draw(D) for name in ("input_layernorm", "hidden_norm")}
    ends = {"fc.weight": draw(D, 3 * D), "norm.weight": draw(D), "lm_head.weight": draw(DRAFTED, D), **tables()}
    return {**ends, **norms, **layer(draw, prefix, 2 * D)}


def eagle3(draw: Draw) -> tuple[Weights, dict[str, Any]]:
    values = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "draft_vocab_size": DRAFTED, **LAYER}
    values["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}  # their outputs: the inputs of 1, 2 and 3
    return fused(draw, "midlayer"), values


def speculators(draw: Draw) -> tuple[Weights, dict[str, Any]]:
    inner = {"model_type": "llama", **LAYER}
    del inner["hidden_act"]  # as its library leaves out what is usual
    return fused(draw, "layers.0"), {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": DRAFTED,
        "norm_before_residual": True,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "transformer_layer_config": inner,
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "toy"}},
    }


def mtp(draw: Draw) -> tuple[Weights, dict[str, Any]]:
    weights, own = {}, target()
    for k in range(2):
        prefix = f"model.layers.{DEPTH + k}"
        weights |= {f"{prefix}.{name}.weight": draw(D) for name in ("enorm", "hnorm", "shared_head.norm", "input_layernorm")}
        weights |= {f"{prefix}.eh_proj.weight": draw(D, 2 * D), **layer(draw, prefix, inner=24, heads=2, groups=2)}
        weights[f"{prefix}.embed_tokens.weight"] = own.embedding.weight.detach().clone()
        weights[f"{prefix}.shared_head.head.weight"] = own.head.weight.detach().clone()
    return weights, {**TRUNK_CONFIG, "num_nextn_predict_layers": 2}


def mtp_qwen(draw: Draw) -> tuple[Weights, dict[str, Any]]:
    names = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm", "mtp.layers.0.input_layernorm")
    weights = {f"{name}.weight": draw(D) for name in names}
    weights |= {"mtp.fc.weight": draw(D, 2 * D), **layer(draw, "mtp.layers.0", inner=24, heads=2, groups=2)}
    return weights, {**TRUNK_CONFIG, "num_nextn_predict_layers": 1}


# what they compute, literally


def rms(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def turned(x: Tensor, base: float) -> Tensor:
    count, edge = x.shape[-2:]
    angles = torch.arange(count)[:, None] / base ** (torch.arange(0, edge, 2) / edge)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., edge // 2 :], x[..., : edge // 2]], -1) * sin


def after_attention(w: Weights, prefix: str, read: Tensor, residual: Tensor, base: float, eps: float, heads: int) -> Tensor:
    """The rest of a Llama layer whose attention reads `read` [T,..] and adds to `residual` [T,D]."""
    count = len(read)
    q, k, v = (
        (read @ w[f"{prefix}.self_attn.{part}_proj.weight"].T).view(count, -1, D // heads).transpose(0, 1) for part in "qkv"
    )
    k, v = (part.repeat_interleave(heads // part.shape[0], 0) for part in (k, v))
    scores = turned(q, base) @ turned(k, base).mT / (D // heads) ** 0.5
    scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), float("-inf"))
    mixed = (softmax(scores, -1) @ v).transpose(0, 1).reshape(count, -1)
    x = residual + mixed @ w[f"{prefix}.self_attn.o_proj.weight"].T
    inner = rms(x, w[f"{prefix}.post_attention_layernorm.weight"], eps)
    gate, up = (inner @ w[f"{prefix}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
    return x + (silu(gate) * up) @ w[f"{prefix}.mlp.down_proj.weight"].T


def expected(name: str, w: Weights, own: Decoder, tokens: Tensor) -> list[Tensor]:
    """The logits of each head at every position of `tokens` [T] that it has inputs for; of EAGLE's, all V, first step alone."""
    with torch.no_grad():
        encoded = own(tokens[None], taps=("embed", "layer.0", "layer.1", "layer.2", "final"))
        final, e, h = encoded.hidden["final"][0], own.embed(tokens), own.head.weight
    if name.startswith("medusa"):
        return [medusa_logits(name, w, k, final, h) for k in range(3 if name != "medusa_shared" else 2)]
    if name == "eagle":
        x = torch.cat([e[1:], final[:-1]], -1) @ w["fc.weight"].T + w["fc.bias"]
        return [after_attention(w, "layers.0", x, x, BASE, EPS, HEADS) @ h.T]
    if name in ("eagle3", "speculators"):
        prefix = "midlayer" if name == "eagle3" else "layers.0"
        taps = torch.cat([encoded.hidden[f"layer.{i}"][0] for i in range(3)], -1)[:-1]
        fed = taps @ w["fc.weight"].T
        normed = rms(fed, w[f"{prefix}.hidden_norm.weight"])
        read = torch.cat([rms(e[1:], w[f"{prefix}.input_layernorm.weight"]), normed], -1)
        x = after_attention(w, prefix, read, normed if name == "speculators" else fed, BASE, EPS, HEADS)
        logits = torch.full((len(x), V), float("-inf"))
        logits[:, torch.arange(DRAFTED) + w["d2t"]] = rms(x, w["norm.weight"]) @ w["lm_head.weight"].T
        return [logits]
    return mtp_logits(name, w, final, e, h)


def medusa_logits(name: str, w: Weights, k: int, x: Tensor, head: Tensor) -> Tensor:
    for block in range(1 if name == "medusa_shared" else 2):
        prefix = f"blocks.{k}.layers.{block}" if name == "medusa_vllm" else f"{k}.{block}.linear"
        x = x + silu(x @ w[f"{prefix}.weight"].T + w[f"{prefix}.bias"])
    own = {"medusa": f"{k}.2.weight", "medusa_vllm": f"lm_heads.{k}.weight"}
    return x @ (w[own[name]] if name in own else head).T


def mtp_logits(name: str, w: Weights, hidden: Tensor, e: Tensor, head: Tensor) -> list[Tensor]:
    out, eps = [], 1e-6
    for k in range(2 if name == "mtp" else 1):
        prefix = f"model.layers.{DEPTH + k}" if name == "mtp" else "mtp.layers.0"
        own = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
        names = [f"{prefix}.{part}.weight" for part in own]
        if name == "mtp_qwen":
            names = [f"mtp.{part}.weight" for part in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")]
        enorm, hnorm, proj, norm = (w[part] for part in names)
        x = torch.cat([rms(e[k + 1 :], enorm, eps), rms(hidden[:-1], hnorm, eps)], -1) @ proj.T
        hidden = after_attention(w, prefix, rms(x, w[f"{prefix}.input_layernorm.weight"], eps), x, 10000.0, eps, 2)
        out.append(rms(hidden, norm, eps) @ head.T)
    return out


def drafted(heads: Any, own: Decoder, tokens: Tensor) -> list[Tensor]:
    """What `heads` compute of the same."""
    ctx = Context(torch.arange(len(tokens))[None])
    taps = heads.taps if isinstance(heads, EagleNetwork) else (heads.tap,)
    hidden = own(tokens[None], taps=taps).hidden
    features = torch.cat([hidden[tap] for tap in taps], -1)
    if isinstance(heads, EagleNetwork):
        (out,) = heads.unroll(features, tokens[None], own.embed, ctx, 1)
        logits = heads.logits(out, own.unembed)[0]
        if heads.ids is None:
            return [logits]
        return [torch.full((len(logits), V), float("-inf")).index_copy(1, heads.ids, logits)]
    if isinstance(heads, MedusaHeads):
        logits = torch.stack([heads.logits(h[None], heads.depth, own.unembed)[0] for h in features[0]])
        return list(logits.unbind(1))
    return [own.unembed(h)[0] for h in heads(features, tokens[None], own.embed, ctx)]


MADE: dict[str, tuple[Callable[[Draw], tuple[Weights, dict[str, Any]]], str]] = {
    "medusa": (medusa, "medusa"),
    "medusa_shared": (medusa_shared, "medusa"),
    "medusa_vllm": (medusa_vllm, "medusa-vllm"),
    "eagle": (eagle, "eagle"),
    "eagle3": (eagle3, "eagle3"),
    "speculators": (speculators, "speculators"),
    "mtp": (mtp, "mtp"),
    "mtp_qwen": (mtp_qwen, "mtp-qwen"),
}


def put(directory: Path, weights: Weights, values: dict[str, Any], file: str) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(weights, directory / file)
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def made(name: str, directory: Path, seed: int = 0) -> tuple[Path, Weights]:
    make, layout = MADE[name]
    weights, values = make(Draw(seed))
    return put(directory, weights, values, LAYOUTS[layout].file), weights
