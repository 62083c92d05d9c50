"""`fewstep convert`: models and heads from any layout into any other that can say them. This file knows no layout."""

from pathlib import Path

from fewstep.core.recipe import parse, suggestion
from fewstep.hub.drafters import files, is_foreign, save_drafter
from fewstep.hub.head_configs import one_layer
from fewstep.hub.heads import WEIGHTS, beside, save_heads
from fewstep.hub.layouts import LAYOUTS
from fewstep.hub.load import HEADS as RECORD
from fewstep.hub.load import load, locate
from fewstep.hub.pickles import SUFFIXES, convert_pickle
from fewstep.hub.save import save_hf
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model
from fewstep.models.weights import floating, headers, read_json

MODELS, PICKLES = ("hf", "fewstep"), "safetensors"


def convert(source: str, to: str, directory: Path, *, target: str | None = None, dtype: str | None = None) -> None:
    """Write what `source` holds into the new or empty `directory`, in the layout `to`, its weights as `dtype` (None: as stored).

    A model becomes "hf" or "fewstep"; heads, or those a model has, become one of `LAYOUTS`, heads alone also "fewstep"; a file of
    pickled tensors becomes "safetensors". `target`: the model that heads serve; None: the one they were trained for, where they
    say so. Raises ValueError for a source that cannot be read, and a layout that is not known or cannot say it.
    """
    known = (*MODELS, PICKLES, *LAYOUTS)
    if to not in known:
        raise ValueError(f"to={to!r}: not known; {suggestion(to, known)}")
    if (Path(source).is_file() and Path(source).suffix in SUFFIXES) != (to == PICKLES):
        move = (
            "a .pt or .bin file becomes safetensors, then what you like"
            if to != PICKLES
            else "it is for .pt and .bin files alone"
        )
        raise ValueError(f"to={to!r}: not what {source} can become; {move}")
    if to == PICKLES:
        convert_pickle(Path(source), directory)
        return
    place = locate(source)
    if (place / RECORD).is_file() or is_foreign(place):
        _convert_heads(place, to, directory, target or _trained_for(place), dtype)
        return
    model = load(source, dtype=dtype or "auto", packed=False)
    if to in LAYOUTS:
        save_drafter(model.network, to, directory, model.network, name=source)
    elif to == "hf":
        save_hf(model, directory)
    else:
        model.save(directory)


def _convert_heads(place: Path, to: str, directory: Path, target: str, dtype: str | None) -> None:
    held = floating(headers([place / WEIGHTS] if (place / RECORD).is_file() else files(place)))
    model = load(target, dtype=dtype or held, packed=False)
    heads = beside(place, model.network)
    assert heads is not None
    if to == "hf":
        raise ValueError(f"to={to!r}: for whole models; heads become one of fewstep, {', '.join(LAYOUTS)}")
    if to != "fewstep":
        save_drafter(heads, to, directory, model.network, name=target)
        return
    (drafter,) = heads.heads
    if not _alike(heads.config, model):
        raise ValueError(
            f"to={to!r}: takes heads whose block is like the model's last one, these have another; draft with them as they are"
        )
    save_heads(heads, drafter, directory, target=target)


def _trained_for(place: Path) -> str:
    """The target that heads in our layout name. Raises ValueError where nothing does."""
    record = read_json(place / RECORD).get("target") if (place / RECORD).is_file() else None
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        raise ValueError(f"target: {place} does not say which model its heads serve; name it, --target MODEL")
    return str(record["name"])


def _alike(config: DecoderConfig, model: Model) -> bool:
    """Whether heads beside `config` would have the same blocks beside `model`."""
    own = parse(DecoderConfig, {**dict(one_layer(model.network.config)), "init_std": config.init_std})
    return one_layer(config).model_copy(update={"max_positions": own.max_positions}) == own
