"""How other projects describe heads in config.json, in both directions: a reader and a writer for each layout of `layouts`.

A reader makes the config of a decoder like the target that has the heads, and whose last block is like theirs; a writer is given
such a config, the target's own and the target's name. This file reads no file and knows no tensors but by the names it is given.
"""

import re
import warnings
from collections.abc import Mapping, Set
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from fewstep.core.recipe import Config, parse
from fewstep.hub.families import FAMILIES, Family, explicit, family_of, read_config, write_config
from fewstep.hub.spelling import Key
from fewstep.models.decoder import DecoderConfig
from fewstep.nn.eagle import Eagle3HeadsConfig, EagleHeadsConfig
from fewstep.nn.heads import SequentialHeadsConfig
from fewstep.nn.medusa import MedusaHeadsConfig

Values = Mapping[str, Any]
Names = Set[str]

MEASURED = "fewstep_accuracies"  # a key of ours that others pass over


def _counted(names: Names, pattern: str) -> int:
    """How many numbers stand at the group of `pattern` in the names it is in: one more than the highest."""
    return 1 + max((int(found[1]) for name in names if (found := re.search(pattern, name))), default=-1)


def _carrying(target: DecoderConfig, head: Config, block: DecoderConfig | None = None) -> DecoderConfig:
    """`target` with `head` alone, and where `block` is given with layers like its one."""
    values = dict(target if block is None else block)
    return parse(DecoderConfig, {**values, "depth": target.depth, "tied": target.tied, "heads": (head,)})


def _fitting(values: Mapping[str, object], target: DecoderConfig) -> None:
    """Raises ValueError for heads that a hidden size or a vocabulary of another model was written into."""
    for key, own in (("hidden_size", target.width), ("target_hidden_size", target.width), ("vocab_size", target.vocab)):
        if values.get(key) not in (None, own):
            raise ValueError(f"{key}={values[key]}: heads for another model, this one has {own}; give heads trained for it")


def one_layer(config: DecoderConfig) -> DecoderConfig:
    """A decoder of one layer, like the last of `config`."""
    last = config.mixers[(config.depth - 1) % len(config.mixers)]
    return explicit(config.model_copy(update={"depth": 1, "mixers": (last,), "heads": (), "tied": False}))


def _head(config: DecoderConfig, kind: type[Config]) -> Any:
    return next(head for head in config.heads if isinstance(head, kind))


def _measured(head: Any) -> dict[str, Any]:
    return {MEASURED: head.accuracies} if head.accuracies else {}


# Medusa: what config.json says of sizes is little, so most is read off the names


def read_medusa(values: Values, names: Names, target: DecoderConfig) -> DecoderConfig:
    """Counts and sizes are in the names and shapes of the weights; of several heads fewer may be said, as first released."""
    heads, blocks = _counted(names, r"(?:^|\.)(\d+)\.0\.linear\.weight$"), _counted(names, r"(?:^|\.)0\.(\d+)\.linear\.weight$")
    said, layers = Key("medusa_num_heads", int).read(values), Key("medusa_num_layers", int, 1).read(values)
    if said > heads or layers != blocks:
        raise ValueError(
            f"medusa_num_heads={said}, medusa_num_layers={layers}: the weights hold {heads} heads of {blocks} blocks; correct it"
        )
    if said < heads:
        warnings.warn(f"medusa_num_heads={said}: the weights hold {heads} heads, all are taken", RuntimeWarning, stacklevel=5)
    own = any(re.search(rf"(^|\.)0\.{blocks}\.weight$", name) for name in names)
    return _medusa(values, target, heads, blocks, own)


def write_medusa(config: DecoderConfig, target: DecoderConfig, name: str) -> dict[str, Any]:
    """The original key names; version "2" is text-generation-inference's, whose heads share the unembedding of the model."""
    head = _head(config, MedusaHeadsConfig)
    counts = {"medusa_num_heads": head.depth, "medusa_num_layers": head.layers}
    return {**counts, "base_model_name_or_path": name, "version": "1" if head.unembedding == "own" else "2", **_measured(head)}


def read_medusa_vllm(values: Values, names: Names, target: DecoderConfig) -> DecoderConfig:
    """All sizes are said, so all are compared."""
    if any(name.endswith("token_map") for name in names):
        raise ValueError(
            "truncated_vocab_size: Medusa heads of a reduced vocabulary are not supported; export them without token_map"
        )
    _fitting(values, target)
    heads = _counted(names, r"(?:^|\.)blocks\.(\d+)\.layers\.0\.weight$")
    blocks = _counted(names, r"(?:^|\.)blocks\.0\.layers\.(\d+)\.weight$")
    said, layers = Key("num_heads", int).read(values), Key("num_hidden_layers", int, 1).read(values)
    if (said, layers) != (heads, blocks):
        raise ValueError(
            f"num_heads={said}, num_hidden_layers={layers}: the weights hold {heads} heads of {blocks} blocks; correct it"
        )
    biased = any(name.endswith(".bias") for name in names)
    if Key("medusa_fc_bias", bool, False).read(values) != biased:
        raise ValueError(f"medusa_fc_bias={not biased}: the weights hold {'biases' if biased else 'no bias'}; correct it")
    return _medusa(values, target, heads, blocks, not Key("original_lm_head", bool, False).read(values))


def write_medusa_vllm(config: DecoderConfig, target: DecoderConfig, name: str) -> dict[str, Any]:
    """With a bias always: vLLM has one where `medusa_fc_bias` says so."""
    head = _head(config, MedusaHeadsConfig)
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": target.width,
        "vocab_size": target.vocab,
        "truncated_vocab_size": target.vocab,
        "num_heads": head.depth,
        "num_hidden_layers": head.layers,
        "original_lm_head": head.unembedding == "shared",
        "medusa_fc_bias": True,
        **_measured(head),
    }


def _medusa(values: Values, target: DecoderConfig, heads: int, blocks: int, own: bool) -> DecoderConfig:
    fields = {"depth": heads, "layers": blocks, "unembedding": "own" if own else "shared"}
    return _carrying(target, parse(MedusaHeadsConfig, {**fields, "accuracies": values.get(MEASURED, ())}, "heads"))


# EAGLE: config.json describes the one layer in Llama's words

_LLAMA = FAMILIES["llama"]
_EAGLE = replace(
    _LLAMA,
    decoder={**_LLAMA.decoder, "mlp_bias": False},
    mixer={**_LLAMA.mixer, "bias": Key("qkv_bias", bool, False), "out_bias": False},
)
_BIAS, _NORMED = Key("bias", bool, True), Key("norm_before_residual", bool, False)
_DRAFTED = Key("draft_vocab_size", int, None)
_TAPS, _SGLANG = "eagle_aux_hidden_state_layer_ids", "eagle_config"


def _read_layer(family: Family, values: Values, target: DecoderConfig) -> DecoderConfig:
    """The decoder of one layer that `values` describe. Raises ValueError for heads of another model, or of several layers."""
    _fitting(values, target)
    config = read_config(family, values)
    if config.depth != 1:
        raise ValueError(f"num_hidden_layers={config.depth}: fewstep drafts with heads of one layer; give heads that have one")
    return config


def read_eagle(values: Values, names: Names, target: DecoderConfig) -> DecoderConfig:
    """EAGLE-1's and 2's: a Llama config of one layer, and whether the fusing layer has a bias (where nothing is said it has)."""
    fields = {"bias": _BIAS.read(values), "accuracies": values.get(MEASURED, ())}
    return _carrying(target, parse(EagleHeadsConfig, fields, "heads"), _read_layer(_EAGLE, values, target))


def write_eagle(config: DecoderConfig, target: DecoderConfig, name: str) -> dict[str, Any]:
    """The words of `read_eagle`."""
    head = _head(config, EagleHeadsConfig)
    return {**write_config(_EAGLE, one_layer(config)), "bias": head.bias, **_measured(head)}


def _eagle3(values: Values, target: DecoderConfig, layers: Any, block: DecoderConfig) -> DecoderConfig:
    drafted = _DRAFTED.read(values)
    fields = {
        "layers": layers,
        "draft_vocab": None if drafted == target.vocab else drafted,
        "norm_before_residual": _NORMED.read(values),
        "accuracies": values.get(MEASURED, ()),
    }
    if drafted is not None and drafted > target.vocab:
        raise ValueError(f"draft_vocab_size={drafted}: the model has {target.vocab} tokens; give heads trained for it")
    return _carrying(target, parse(Eagle3HeadsConfig, fields, "heads"), block)


def _layers(head: Eagle3HeadsConfig, target: DecoderConfig) -> list[int]:
    return list(head.layers or (2, target.depth // 2, target.depth - 3))


def read_eagle3(values: Values, names: Names, target: DecoderConfig) -> DecoderConfig:
    """A Llama config of one layer; which layers feed it is not said where they are the usual ones."""
    layers, engine = values.get(_TAPS), values.get(_SGLANG)
    nested = engine.get(_TAPS) if isinstance(engine, dict) else None
    if nested is not None:
        # SGLang, whose key this is, counts the layers whose output is read; vLLM's, above, those whose input is
        if not isinstance(nested, list) or not all(isinstance(layer, int) for layer in nested):
            raise ValueError(f"{_SGLANG}.{_TAPS}={nested!r}: expected a list of three layers")
        inputs = [layer + 1 for layer in nested]
        if layers not in (None, inputs):
            raise ValueError(
                f"{_SGLANG}.{_TAPS}={nested}: reads the inputs of the layers {inputs}, {_TAPS} says {layers}; correct it"
            )
        layers = inputs
    return _eagle3(values, target, layers, _read_layer(_EAGLE, values, target))


def write_eagle3(config: DecoderConfig, target: DecoderConfig, name: str) -> dict[str, Any]:
    """The words of `read_eagle3`, with the layers counted in both ways."""
    head = _head(config, Eagle3HeadsConfig)
    values = {**write_config(_EAGLE, one_layer(config)), "architectures": ["LlamaForCausalLMEagle3"]}
    values["draft_vocab_size"] = head.draft_vocab or target.vocab
    if head.norm_before_residual:
        values["norm_before_residual"] = True
    if head.layers is not None:
        values[_TAPS] = _layers(head, target)
        if head.layers[0] > 0:  # SGLang has no word for the embedding
            values[_SGLANG] = {_TAPS: [layer - 1 for layer in head.layers], "use_aux_hidden_state": True}
    return values | _measured(head)


# the layer's config is written without what transformers takes for granted
GRANTED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
        "qwen3": {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 32768,
        },
    }
)


def read_speculators(values: Values, names: Names, target: DecoderConfig) -> DecoderConfig:
    """The layer has a table of its own, in the words of Llama or Qwen3."""
    if values.get("speculators_model_type") != "eagle3":
        raise ValueError(
            f"speculators_model_type={values.get('speculators_model_type')!r}: expected 'eagle3'; fewstep has no others"
        )
    if values.get("norm_before_fc"):
        raise ValueError("norm_before_fc=True: not supported; give heads trained without it")
    given = values.get("transformer_layer_config")
    kind = str(given.get("model_type", "llama")) if isinstance(given, dict) else ""
    if not isinstance(given, dict) or kind not in GRANTED:
        raise ValueError(f"transformer_layer_config: a layer of {kind!r}, expected one of {', '.join(GRANTED)}; give other heads")
    _fitting(values, target)
    return _eagle3(values, target, values.get(_TAPS), _read_layer(FAMILIES[kind], {**GRANTED[kind], **given}, target))


def write_speculators(config: DecoderConfig, target: DecoderConfig, name: str) -> dict[str, Any]:
    """The words of `read_speculators`, with the greedy proposals that its library asks for."""
    head, layer = _head(config, Eagle3HeadsConfig), one_layer(config)
    verifier = next((family.architecture for family in FAMILIES.values() if _says(family, explicit(target))), None)
    family = next((FAMILIES[kind] for kind in GRANTED if _says(FAMILIES[kind], layer)), _LLAMA)
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": head.draft_vocab or target.vocab,
        "norm_before_residual": head.norm_before_residual,
        "target_hidden_size": None,
        _TAPS: None if head.layers is None else _layers(head, target),
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": write_config(family, layer),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": name, "architectures": [] if verifier is None else [verifier]},
        },
        **_measured(head),
    }


def _says(family: Family, config: DecoderConfig) -> bool:
    try:
        write_config(family, config)
    except ValueError:
        return False
    return True


# Multi-token prediction: config.json is the whole model's

_MODULES = "num_nextn_predict_layers"


def read_mtp(values: Values, names: Names, target: DecoderConfig) -> DecoderConfig:
    """DeepSeek's: the whole model's config, and how many modules follow its layers."""
    said = Key(_MODULES, int, 1).read(values)
    found = _counted(names, r"^model\.layers\.(\d+)\.eh_proj\.weight$")
    config = _read_trunk(values, target)
    if found != config.depth + said:
        raise ValueError(
            f"{_MODULES}={said}: the weights hold modules up to layer {found - 1} of {config.depth} + {said}; correct it"
        )
    return _carrying(target, SequentialHeadsConfig(depth=said), config)


def read_mtp_qwen(values: Values, names: Names, target: DecoderConfig) -> DecoderConfig:
    """The same of a model whose one module has a prefix of its own."""
    if (said := Key(_MODULES, int, 1).read(values)) != 1:
        raise ValueError(f"{_MODULES}={said}: this layout holds one module; correct it")
    return _carrying(target, SequentialHeadsConfig(depth=1), _read_trunk(values, target))


def _read_trunk(values: Values, target: DecoderConfig) -> DecoderConfig:
    _fitting(values, target)
    config = read_config(family_of(values), values)
    if config.depth != target.depth:
        raise ValueError(
            f"num_hidden_layers={config.depth}: heads for another model, this one has {target.depth}; give its own heads"
        )
    return config


def write_mtp(config: DecoderConfig, target: DecoderConfig, name: str) -> dict[str, Any]:
    """The whole model's config in the words of the first family that has them."""
    trunk = explicit(config)
    family = next((family for family in FAMILIES.values() if _says(family, trunk)), _LLAMA)
    return {**write_config(family, trunk), _MODULES: _head(config, SequentialHeadsConfig).depth}
