"""Rotary positions in config.json: `rope_parameters`, or the older `rope_theta` and `rope_scaling`. This file knows no family."""

from collections.abc import Mapping
from typing import Any

from fewstep.core.recipe import parse
from fewstep.hub.spelling import Key
from fewstep.nn.position import RopeConfig

_BASE = Key("rope_theta", float, 10000.0)
_FACTOR = Key("factor", float)
_TRAINED = Key("original_max_position_embeddings", int)
_SCALINGS: Mapping[str, Mapping[str, Key]] = {
    "default": {},
    "linear": {"factor": _FACTOR},
    "llama3": {
        "factor": _FACTOR,
        "low_frequency": Key("low_freq_factor", float),
        "high_frequency": Key("high_freq_factor", float),
        "trained_length": _TRAINED,
    },
}


def read_rope(values: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """The rotary encoding of a config.json. Raises ValueError for a scaling other than none, linear and llama3."""
    where = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    given = values.get(where) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}={given!r}: expected a table")
    kind = str(given.get("rope_type", given.get("type", "default")))
    if kind not in _SCALINGS or any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"{where}={given!r}: not supported; fewstep has {', '.join(_SCALINGS)}, the same in all layers")
    trained = values.get(_TRAINED.name, given.get(_TRAINED.name, max_positions))
    if any(table.get("partial_rotary_factor") not in (None, 1.0) for table in (given, values)):
        raise ValueError("partial_rotary_factor: not supported; fewstep turns whole heads")
    try:
        base = _BASE.read({**values, **given})
        fields = {name: key.read({**given, _TRAINED.name: trained}) for name, key in _SCALINGS[kind].items()}
        if kind == "llama3" and fields["low_frequency"] >= fields["high_frequency"]:
            raise ValueError(f"low_freq_factor={fields['low_frequency']}: expected less than high_freq_factor")
        return parse(RopeConfig, {"base": base, "scaling": "none" if kind == "default" else kind, **fields})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def write_rope(config: RopeConfig) -> dict[str, Any]:
    """`config` in the older spelling, which every version of every reader understands."""
    kind = "default" if config.scaling == "none" else config.scaling
    scaling = {key.name: getattr(config, name) for name, key in _SCALINGS[kind].items()}
    return {"rope_theta": config.base, "rope_scaling": {"rope_type": kind, **scaling} if scaling else None}
