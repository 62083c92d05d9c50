"""Rotary positions in config.json: `rope_parameters`, or the older `rope_theta` and `rope_scaling`. This file knows no family."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fewstep.core.recipe import parse
from fewstep.hub.spelling import Key
from fewstep.nn.position import RopeConfig, YarnConfig

Rotary = RopeConfig | YarnConfig

_BASE = Key("rope_theta", float, 10000.0)
_FACTOR = Key("factor", float)
_TRAINED = Key("original_max_position_embeddings", int)
_SCALINGS: Mapping[str, Mapping[str, Key]] = MappingProxyType(
    {
        "default": {},
        "linear": {"factor": _FACTOR},
        "llama3": {
            "factor": _FACTOR,
            "low_frequency": Key("low_freq_factor", float),
            "high_frequency": Key("high_freq_factor", float),
            "trained_length": _TRAINED,
        },
        "dynamic": {"factor": _FACTOR},
        "yarn": {
            "factor": _FACTOR,
            "trained_length": _TRAINED,
            "slow": Key("beta_slow", float, None),
            "fast": Key("beta_fast", float, None),
            "attention": Key("attention_factor", float, None),
        },
    }
)
_SCALES = Key("mscale", float, None), Key("mscale_all_dim", float, None)


def read_rope(values: Mapping[str, Any], max_positions: int) -> Rotary:
    """The rotary encoding of a config.json, of whose dynamic scaling nothing is seen up to `max_positions`.

    Raises ValueError for a scaling that `_SCALINGS` does not have, or that is not the same in all layers and channels.
    """
    where = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    given = values.get(where) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}={given!r}: expected a table")
    kind = str(given.get("rope_type", given.get("type", "default")))
    if kind not in _SCALINGS or any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"{where}={given!r}: not supported; fewstep has {', '.join(_SCALINGS)}, the same in all layers")
    if any(table.get("partial_rotary_factor") not in (None, 1.0) for table in (given, values)):
        raise ValueError("partial_rotary_factor: not supported; the families that fewstep reads turn whole heads")
    trained = values.get(_TRAINED.name, given.get(_TRAINED.name, max_positions))
    try:
        base = _BASE.read({**values, **given})
        fields = {name: key.read({**given, _TRAINED.name: trained}) for name, key in _SCALINGS[kind].items()}
        if kind == "yarn":
            return _yarn(given, {"base": base, **fields})
        if kind == "dynamic":
            fields["trained_length"] = max_positions
        if kind == "llama3" and fields["low_frequency"] >= fields["high_frequency"]:
            raise ValueError(f"low_freq_factor={fields['low_frequency']}: expected less than high_freq_factor")
        return parse(RopeConfig, {"base": base, "scaling": "none" if kind == "default" else kind, **fields})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def write_rope(config: Rotary) -> dict[str, Any]:
    """`config` in the older spelling, which every version of every reader understands."""
    kind = config.kind if isinstance(config, YarnConfig) else config.scaling.replace("none", "default")
    fields = {key.name: getattr(config, name) for name, key in _SCALINGS[kind].items()}
    scaling = {name: value for name, value in fields.items() if value is not None}
    return {"rope_theta": config.base, "rope_scaling": {"rope_type": kind, **scaling} if scaling else None}


def _yarn(given: Mapping[str, Any], fields: Mapping[str, Any]) -> YarnConfig:
    """YaRN of `fields`, those that are None left to its defaults; `mscale` and `mscale_all_dim` stand for `attention` too."""
    if given.get("truncate", True) is not True:
        raise ValueError(f"truncate={given['truncate']!r}: not supported; fewstep's ramp lies between whole numbers")
    stated = {name: value for name, value in fields.items() if value is not None}
    scales = [key.read(given) for key in _SCALES]
    if "attention" not in stated and None not in scales:
        above, below = (0.1 * scale * math.log(max(1.0, stated["factor"])) + 1.0 for scale in scales)
        stated["attention"] = above / below
    return parse(YarnConfig, stated)
