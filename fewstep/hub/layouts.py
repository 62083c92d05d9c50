"""Layouts of heads as data: what other projects call their tensors, in the manner of `families`.

Sources, read in the projects' code: FasterDecoding/Medusa and text-generation-inference (medusa), vLLM (medusa-vllm, and its
loaders of all the others), SafeAILab/EAGLE cnets1.py (eagle) and cnets.py (eagle3), vllm-project/speculators (speculators),
DeepSeek-V3 as vLLM and transformers load it (mtp), the names of Qwen3-Next and Mellum (mtp-qwen). This file reads no file; what
config.json says of heads stands in `head_configs`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, final

from fewstep.hub import head_configs as words
from fewstep.models.decoder import DecoderConfig

End = Literal["embedding", "head"]
Parts = Mapping[str, tuple[str, ...]]


@final
@dataclass(frozen=True)
class Layout:
    """One layout. `drafter`: what the heads serve. `file`: where the weights are written. `read`, `write`: see `head_configs`.

    `mark`: a name, without a prefix, that is in every file of this layout; `unless`: one that is in none.
    `modules`: our module -> their modules, whose rows follow one another in ours. `{k}` counts heads, `{deep}` their blocks after
    the first; `{block}` is the number of that block among all `{blocks}`, `{layer}` is k past the target's layers.
    `shared`: their tensors that are copies of the target's; those in `copied` are written, for some readers need them.
    `prefixes`: what may stand before every name; `beside`: names of a trunk that may be in the same files then.
    `bias`: whether there always is one where we have one; else those of a file without any are zero.
    """

    name: str
    drafter: str
    file: str
    mark: str
    modules: Parts
    read: Callable[[words.Values, words.Names, DecoderConfig], DecoderConfig]
    write: Callable[[DecoderConfig, DecoderConfig, str], dict[str, Any]]
    unless: str = "$"
    shared: Mapping[str, End] = field(default_factory=lambda: MappingProxyType({}))
    copied: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    beside: str = "$"
    bias: bool = True


def _layer(prefix: str, ours: str = "block") -> dict[str, tuple[str, ...]]:
    """The parts of a Llama layer called `prefix`, but for the norm before its mixer."""
    return {
        f"{ours}.mixer.qkv": tuple(f"{prefix}.self_attn.{part}_proj" for part in "qkv"),
        f"{ours}.mixer.q_norm": (f"{prefix}.self_attn.q_norm",),
        f"{ours}.mixer.k_norm": (f"{prefix}.self_attn.k_norm",),
        f"{ours}.mixer.out": (f"{prefix}.self_attn.o_proj",),
        f"{ours}.mlp_norm": (f"{prefix}.post_attention_layernorm",),
        f"{ours}.mlp.up": (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"),
        f"{ours}.mlp.down": (f"{prefix}.mlp.down_proj",),
    }


def _eagle3(prefix: str) -> dict[str, tuple[str, ...]]:
    """EAGLE-3's network, its layer called `prefix`."""
    norms = {"embed_norm": (f"{prefix}.input_layernorm",), "hidden_norm": (f"{prefix}.hidden_norm",)}
    return {"fc": ("fc",), "norm": ("norm",), "head": ("lm_head",), **norms, **_layer(prefix)}


def _module(prefix: str, embed_norm: str, hidden_norm: str, proj: str, norm: str) -> dict[str, tuple[str, ...]]:
    """Module k of multi-token prediction, its layer called `prefix`; `proj` reads [embedding; hidden]."""
    parts = {"embed_norm": embed_norm, "hidden_norm": hidden_norm, "proj": proj, "norm": norm}
    parts |= {"block.mixer_norm": f"{prefix}.input_layernorm"}
    return {**{f"stages.{{k}}.{ours}": (theirs,) for ours, theirs in parts.items()}, **_layer(prefix, "stages.{k}.block")}


def _medusa(block: str, unembedding: str) -> dict[str, tuple[str, ...]]:
    first, deeper = block.replace("{block}", "0"), (block,)
    return {"first": (first,), "deeper.{k}.{deep}": deeper, "unembeddings.{k}": (unembedding,)}


_WEIGHTS, _TRUNK = "model.safetensors", r"(model|lm_head)\..*"
_LAYER = "model.layers.{layer}"

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        layout.name: layout
        for layout in (
            Layout(
                "medusa",
                "medusa",
                "medusa_lm_head.safetensors",
                r"0\.0\.linear\.weight",
                _medusa("{k}.{block}.linear", "{k}.{blocks}"),
                words.read_medusa,
                words.write_medusa,
                prefixes=("medusa_head.",),
                beside=_TRUNK,
            ),
            Layout(
                "medusa-vllm",
                "medusa",
                _WEIGHTS,
                r"blocks\.0\.layers\.0\.weight",
                _medusa("blocks.{k}.layers.{block}", "lm_heads.{k}"),
                words.read_medusa_vllm,
                words.write_medusa_vllm,
                shared={"lm_heads.0.weight": "head", "lm_head.weight": "head"},
                copied=("lm_head.weight",),
                prefixes=("medusa_heads.",),
                bias=False,
            ),
            Layout(
                "eagle",
                "eagle",
                _WEIGHTS,
                r"layers\.0\.self_attn\.q_proj\.weight",
                {"fc": ("fc",), **_layer("layers.0")},
                words.read_eagle,
                words.write_eagle,
                unless=r"layers\.0\.hidden_norm\.weight",
                shared={"embed_tokens.weight": "embedding", "lm_head.weight": "head"},
                copied=("embed_tokens.weight",),
            ),
            Layout(
                "eagle3",
                "eagle3",
                _WEIGHTS,
                r"midlayer\.self_attn\.q_proj\.weight",
                _eagle3("midlayer"),
                words.read_eagle3,
                words.write_eagle3,
                shared={"embed_tokens.weight": "embedding"},
            ),
            Layout(
                "speculators",
                "eagle3",
                _WEIGHTS,
                r"layers\.0\.hidden_norm\.weight",
                _eagle3("layers.0"),
                words.read_speculators,
                words.write_speculators,
                shared={"embed_tokens.weight": "embedding"},
            ),
            Layout(
                "mtp",
                "mtp",
                _WEIGHTS,
                r"model\.layers\.\d+\.eh_proj\.weight",
                _module(_LAYER, *(f"{_LAYER}.{part}" for part in ("enorm", "hnorm", "eh_proj", "shared_head.norm"))),
                words.read_mtp,
                words.write_mtp,
                shared={f"{_LAYER}.embed_tokens.weight": "embedding", f"{_LAYER}.shared_head.head.weight": "head"},
                copied=(f"{_LAYER}.embed_tokens.weight", f"{_LAYER}.shared_head.head.weight"),
                beside=_TRUNK,
            ),
            Layout(
                "mtp-qwen",
                "mtp",
                _WEIGHTS,
                r"mtp\.fc\.weight",
                _module("mtp.layers.{k}", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm"),
                words.read_mtp_qwen,
                words.write_mtp,
                beside=_TRUNK,
            ),
        )
    }
)
