"""Hugging Face families as data: how each spells a decoder in config.json and its tensors in safetensors files.

A family is one entry of `FAMILIES`. `read_config` and `write_config` are inverse to each other for every decoder that the
family can say; whether it can is asked by doing both. This file reads no file and knows no weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, final

from fewstep.core.recipe import Config, parse
from fewstep.hub.rope import Rotary, read_rope, write_rope
from fewstep.hub.spelling import Key
from fewstep.models.decoder import DecoderConfig
from fewstep.nn.mixers.attention import AttentionConfig

Spelling = Key | bool | str | None  # a key of config.json, or what is always so in the family (None: what follows from others)

_WIDE, _MANY = 1 << 24, 1 << 16  # limits far above any model, so that no product of sizes in a hostile file overflows
_EPS = Key("rms_norm_eps", float, 1e-6)


def _kv_heads(default: int | None) -> Key:
    return Key("num_key_value_heads", int, default, nullable=True, most=_MANY)


_DECODER: Mapping[str, Spelling] = MappingProxyType(
    {
        "vocab": Key("vocab_size", int, most=_WIDE),
        "width": Key("hidden_size", int, most=_WIDE),
        "depth": Key("num_hidden_layers", int, most=_MANY),
        "query_heads": Key("num_attention_heads", int, most=_MANY),
        "hidden": Key("intermediate_size", int, most=_WIDE),
        "activation": Key("hidden_act", str, "silu", words={"silu": "swiglu", "swish": "swiglu"}),
        "eps": _EPS,
        "tied": Key("tie_word_embeddings", bool, False),
        "max_positions": Key("max_position_embeddings", int),
        "init_std": Key("initializer_range", float, 0.02),
        "norm": "rms",
        "mlp_bias": False,
    }
)
_MIXER: Mapping[str, Spelling] = MappingProxyType(
    {
        "kv_heads": _kv_heads(None),
        "head_width": Key("head_dim", int, None, most=_MANY),
        "eps": _EPS,
        "qk_norm": False,
        "bias": False,
        "out_bias": False,
    }
)
_TENSORS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "embedding": ("model.embed_tokens",),
        "norm": ("model.norm",),
        "head": ("lm_head",),
        "blocks.mixer_norm": ("model.layers.{layer}.input_layernorm",),
        "blocks.mixer.qkv": tuple(f"model.layers.{{layer}}.self_attn.{part}_proj" for part in "qkv"),
        "blocks.mixer.q_norm": ("model.layers.{layer}.self_attn.q_norm",),
        "blocks.mixer.k_norm": ("model.layers.{layer}.self_attn.k_norm",),
        "blocks.mixer.out": ("model.layers.{layer}.self_attn.o_proj",),
        "blocks.mlp_norm": ("model.layers.{layer}.post_attention_layernorm",),
        "blocks.mlp.up": ("model.layers.{layer}.mlp.gate_proj", "model.layers.{layer}.mlp.up_proj"),
        "blocks.mlp.down": ("model.layers.{layer}.mlp.down_proj",),
    }
)
_ATTENTION_BIAS = Key("attention_bias", bool, False)
_WINDOW, _WINDOWED = Key("sliding_window", int, 4096, nullable=True), Key("use_sliding_window", bool, False)
_FIRST_WINDOW = Key("max_window_layers", int, 28, least=0)
_SLIDING, _FULL = "sliding_attention", "full_attention"


_LLADA: Mapping[str, Spelling] = MappingProxyType(
    {
        "vocab": Key("embedding_size", int, most=_WIDE),
        "width": Key("d_model", int, most=_WIDE),
        "depth": Key("n_layers", int, most=_MANY),
        "query_heads": Key("n_heads", int, most=_MANY),
        "hidden": Key("mlp_hidden_size", int, most=_WIDE),
        "activation": Key("activation_type", str, words={"silu": "swiglu"}),
        "eps": Key("rms_norm_eps", float, 1e-5),
        "tied": Key("weight_tying", bool, True),
        "max_positions": Key("max_sequence_length", int),
        "init_std": Key("init_std", float, 0.02),
        "mask_token": Key("mask_token_id", int, 126336, least=0, most=_WIDE),
        "norm": "rms",
        "mlp_bias": False,
    }
)
_LLADA_MIXER: Mapping[str, Spelling] = MappingProxyType(
    {
        "kv_heads": Key("n_kv_heads", int, None, most=_MANY),
        "head_width": None,
        "eps": _LLADA["eps"],
        "qk_norm": False,
        "bias": Key("include_qkv_bias", bool, False),
        "out_bias": False,
    }
)
_LLADA_FIXED: Mapping[str, tuple[Any, Any]] = MappingProxyType(
    {
        "block_type": ("sequential", "llama"),
        "layer_norm_type": ("default", "rms"),
        "rope": (False, True),
        "alibi": (False, False),
        "attention_layer_norm": (False, False),
        "include_bias": (False, False),
        "input_emb_norm": (False, False),
        "scale_logits": (False, False),
        "block_group_size": (1, 1),
    }
)
_LLADA_TENSORS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "embedding": ("model.transformer.wte",),
        "norm": ("model.transformer.ln_f",),
        "head": ("model.transformer.ff_out",),
        "blocks.mixer_norm": ("model.transformer.blocks.{layer}.attn_norm",),
        "blocks.mixer.qkv": tuple(f"model.transformer.blocks.{{layer}}.{part}_proj" for part in "qkv"),
        "blocks.mixer.out": ("model.transformer.blocks.{layer}.attn_out",),
        "blocks.mlp_norm": ("model.transformer.blocks.{layer}.ff_norm",),
        "blocks.mlp.up": ("model.transformer.blocks.{layer}.ff_proj", "model.transformer.blocks.{layer}.up_proj"),
        "blocks.mlp.down": ("model.transformer.blocks.{layer}.ff_out",),
    }
)


@final
@dataclass(frozen=True)
class Family:
    """One family. `decoder` and `mixer` spell the fields of `DecoderConfig` and `AttentionConfig`.

    `windows`: no layer slides, "all" do, or some "layers" do, by `layer_types`. `tensors`: our module (layer number left out) ->
    their modules, whose rows follow one another in ours. `computed`: endings of tensors that some files hold though the config
    says them already. `fixed`: keys with what their absence means and the one value that fewstep has. `repeated`: keys that say
    again what another one does.
    """

    model_type: str
    architecture: str
    decoder: Mapping[str, Spelling] = field(default_factory=lambda: _DECODER)
    mixer: Mapping[str, Spelling] = field(default_factory=lambda: _MIXER)
    windows: Literal["none", "all", "layers"] = "none"
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _TENSORS)
    computed: tuple[str, ...] = ("rotary_emb.inv_freq",)
    fixed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    repeated: Mapping[str, str] = field(default_factory=dict)


# Keys left out of a config.json mean what they mean to `transformers`.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family(
                "llama",
                "LlamaForCausalLM",
                decoder={**_DECODER, "mlp_bias": Key("mlp_bias", bool, False)},
                mixer={**_MIXER, "bias": _ATTENTION_BIAS, "out_bias": _ATTENTION_BIAS},
            ),
            Family("mistral", "MistralForCausalLM", mixer={**_MIXER, "kv_heads": _kv_heads(8)}, windows="all"),
            Family("qwen2", "Qwen2ForCausalLM", mixer={**_MIXER, "kv_heads": _kv_heads(32), "bias": True}, windows="layers"),
            Family(
                "qwen3",
                "Qwen3ForCausalLM",
                mixer={
                    "kv_heads": _kv_heads(32),
                    "head_width": Key("head_dim", int, 128, most=_MANY),
                    "eps": _EPS,
                    "qk_norm": True,
                    "bias": _ATTENTION_BIAS,
                    "out_bias": _ATTENTION_BIAS,
                },
                windows="layers",
            ),
            Family(  # masked diffusion: its decoder attends both ways, which the mask of a call says and no config
                "llada",
                "LLaDAModelLM",
                decoder=_LLADA,
                mixer=_LLADA_MIXER,
                tensors=_LLADA_TENSORS,
                fixed=_LLADA_FIXED,
                repeated={"vocab_size": "embedding_size"},
            ),
        )
    }
)


def family_of(values: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises ValueError for one that is not known here, or none at all."""
    match values.get("architectures"):
        case [name, *_]:
            pass
        case _:
            name = values.get("model_type")
    for family in FAMILIES.values():
        if name in (family.architecture, family.model_type):
            return family
    known = ", ".join(family.architecture for family in FAMILIES.values())
    raise ValueError(f"architectures={name!r}: not one that fewstep reads; choose a checkpoint of {known}")


def read_config(family: Family, values: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json. Raises ValueError naming the key that is missing, wrong, or asks for what fewstep lacks."""
    if values.get("quantization_config") is not None:
        raise ValueError("quantization_config: quantised checkpoints are not supported; use the one it was made from")
    for name, (absent, ours) in family.fixed.items():
        if values.get(name, absent) != ours:
            raise ValueError(f"{name}={values.get(name, absent)!r}: not supported; fewstep has {ours!r}")
    decoder, mixer = _read(family.decoder, values), _read(family.mixer, values)
    mixer["kv_heads"] = mixer["kv_heads"] or decoder["query_heads"]
    mixer["head_width"] = mixer["head_width"] or decoder["width"] // decoder["query_heads"]
    windows = _read_windows(family, values, decoder["depth"])
    made = {window: parse(AttentionConfig, {**mixer, "window": window}, "mixer") for window in {*windows}}
    mixers = [made[window] for window in windows]
    position = read_rope(values, decoder["max_positions"])
    return parse(DecoderConfig, {**decoder, "mixers": _shortest(mixers), "position": position})


def write_config(family: Family, config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config` in the words of `family`. Raises ValueError if they do not say exactly this decoder."""
    config = explicit(config)
    mixers = config.mixers
    if not all(isinstance(mixer, AttentionConfig) for mixer in mixers) or not isinstance(config.position, Rotary):
        raise ValueError(f"{family.model_type} cannot say anything but attention with rotary positions")
    values: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    values |= _write(family.decoder, dict(config)) | _write(family.mixer, dict(mixers[0]))
    windows = [mixers[layer % len(mixers)].window for layer in range(config.depth)]
    values |= _write_windows(family, windows) | write_rope(config.position)
    values |= {name: ours for name, (_, ours) in family.fixed.items()}
    values |= {name: values[other] for name, other in family.repeated.items()}
    said = read_config(family, values)
    if said != config:
        unsaid = _differences(mixers[0], said.mixers[0]) or _differences(config, said)
        raise ValueError(f"{family.model_type} cannot say {', '.join(unsaid)}")
    return values


def explicit(config: DecoderConfig) -> DecoderConfig:
    """The trunk of `config` with nothing left open, so that equal decoders have equal configs.

    Its heads are left out, and how its embedding was first drawn, for which no family has a word.
    """
    given = config.mixers
    mixers = tuple(_explicit_mixer(given[layer % len(given)], config) for layer in range(config.depth))
    return config.model_copy(update={"mixers": _shortest(mixers), "heads": (), "embed_std": None})


def _explicit_mixer(mixer: Any, config: DecoderConfig) -> Any:
    if not isinstance(mixer, AttentionConfig):
        return mixer
    kv_heads, head_width = mixer.widths(config.width, config.query_heads)
    eps = mixer.eps if mixer.qk_norm else config.eps
    return mixer.model_copy(update={"kv_heads": kv_heads, "head_width": head_width, "eps": eps})


def _shortest(mixers: Sequence[Any]) -> tuple[Any, ...]:
    """One mixer where all layers have the same: a decoder repeats them."""
    return tuple(mixers[:1] if all(mixer == mixers[0] for mixer in mixers) else mixers)


def _differences(one: Config, other: Config) -> list[str]:
    """The fields of `one` that `other` has otherwise; of a decoder's mixers, only that they differ."""
    return [name if name == "mixers" else f"{name}={value}" for name, value in one if getattr(other, name) != value]


def _read(spellings: Mapping[str, Spelling], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: key.read(values) if isinstance(key, Key) else key for name, key in spellings.items()}


def _write(spellings: Mapping[str, Spelling], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key.name: key.write(fields[name]) for name, key in spellings.items() if isinstance(key, Key)}


def _read_windows(family: Family, values: Mapping[str, Any], depth: int) -> list[int | None]:
    """The window of each layer, None where it sees everything."""
    if family.windows == "none":
        return [None] * depth
    if family.windows == "all":
        return [_WINDOW.read(values)] * depth
    window = _WINDOW.read(values) if _WINDOWED.read(values) else None
    types = values.get("layer_types")
    if types is None:
        first = _FIRST_WINDOW.read(values)
        return [window if layer >= first else None for layer in range(depth)]
    if not isinstance(types, list) or len(types) != depth or not {*map(str, types)} <= {_SLIDING, _FULL}:
        raise ValueError(f"layer_types: expected {_FULL} or {_SLIDING} for each of the {depth} layers; fewstep has no others")
    if window is None and _SLIDING in types:
        raise ValueError("use_sliding_window: off or without sliding_window, though layer_types has sliding layers; correct it")
    return [window if kind == _SLIDING else None for kind in types]


def _write_windows(family: Family, windows: Sequence[int | None]) -> dict[str, Any]:
    sliding = [layer for layer, window in enumerate(windows) if window is not None]
    window = windows[sliding[0]] if sliding else None
    if family.windows == "none":
        return {}
    if family.windows == "all":
        return {"sliding_window": window}
    return {
        "use_sliding_window": bool(sliding),
        "sliding_window": window,
        "max_window_layers": sliding[0] if sliding else len(windows),
        "layer_types": [_FULL if window is None else _SLIDING for window in windows],
    }
