"""Hugging Face model directories in and out: config.json, sharded safetensors, tokenizer files.

Nothing in them is run: no pickle is read and code that `auto_map` names is ignored. This file knows no family: families are data.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.recipe import parse
from fewstep.hub.families import FAMILIES, Family, explicit, family_of, read_config, write_config
from fewstep.hub.names import HEADS, family_names
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model, assemble, dtype_of, read_tokenizer, settings_of
from fewstep.models.weights import INDEX, distinct, headers, read_json, shards, write
from fewstep.text.chat import ChatTemplate

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
HEADS_KEY, HEADS_FILE = (
    "fewstep_heads",
    "fewstep/heads.safetensors",
)  # a folder of its own: some readers take every file they find


def read_hf(directory: Path, name: str, device: torch.device | str = "cpu", dtype: str | torch.dtype = "float32") -> Model:
    """The model in a Hugging Face `directory`, called `name`. Its recipe keeps config.json, so that `save_hf` loses nothing.

    Cost: the memory of the model and the pages of one shard. Raises ValueError for an unknown architecture, a config, tokenizer
    or weights that do not fit together, a damaged or missing file; nothing is half loaded.
    """
    values = read_json(directory / CONFIG)
    heads = values.pop(HEADS_KEY, [])
    try:
        family = family_of(values)
        config = read_config(family, values)
        if heads:
            config = parse(DecoderConfig, {**dict(config), "heads": heads})
        recipe = {"name": name, "origin": {"config": values}, **_generation(directory, values)}
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from None
    tokenizer = read_tokenizer(directory, config.vocab)
    files = [*shards(directory, (WEIGHTS,)), *([directory / HEADS_FILE] if heads else [])]
    stored = {key: header for key, header in headers(files).items() if not key.endswith(family.computed)}
    network = assemble(
        config,
        stored,
        str(directory),
        device=device,
        dtype=dtype,
        named=lambda network: family_names(network, family),
    )
    return Model(network, tokenizer, recipe, chat=ChatTemplate.load(directory), settings=settings_of(directory))


def save_hf(
    model: Model, directory: Path | str, *, dtype: str | torch.dtype | None = None, shard_bytes: int = 5_000_000_000
) -> None:
    """Write `model` as the Hugging Face directory that it came as, or in the words of the first family that can say it.

    `directory` must be new or empty; it appears whole or not at all. `dtype`: of the weights (None: as they are). `shard_bytes`:
    the most that a weights file holds, unless one tensor is larger. Heads beside the trunk, which other readers do not know, go
    into a file of their own that `load` reads back. Cost: the memory of one shard. Raises ValueError for a decoder that no family
    can say, a directory in use, a full disk.
    """
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"directory={str(directory)!r}: in use; choose a new or empty one")
    saved = model.dtype if dtype is None else dtype_of(dtype)
    family, values = _config(model, saved)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        named = distinct(family_names(model.network, family))
        _write_weights(
            partial, {name: tensor for name, tensor in named.items() if not name.startswith(HEADS)}, saved, shard_bytes
        )
        heads = {name: tensor for name, tensor in named.items() if name.startswith(HEADS)}
        if heads:
            (partial / HEADS_FILE).parent.mkdir()
            write(partial / HEADS_FILE, heads, saved)
        for name, text in {GENERATION: _json(_ends(model)), **model.texts(), CONFIG: _json(values)}.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text, encoding="utf-8")
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        raise ValueError(f"directory={str(directory)!r}: cannot be written ({error}); make room or choose another") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config(model: Model, dtype: torch.dtype) -> tuple[Family, dict[str, Any]]:
    """The family to write `model` as, and its config.json: the one it came with where that still describes it."""
    config, label = model.network.config, str(dtype).removeprefix("torch.")
    origin: Mapping[str, Any] = model.recipe.get("origin", {}).get("config", {})
    if origin and read_config(family_of(origin), origin) == explicit(config):
        family, values = family_of(origin), {**origin, **{key: label for key in ("dtype", "torch_dtype") if key in origin}}
    else:
        family, described = _first_family(config)
        values = {**described, **_ends(model), "torch_dtype": label}
    heads = config.model_dump(mode="json")["heads"]
    return family, {**values, HEADS_KEY: heads} if heads else values


def _first_family(config: DecoderConfig) -> tuple[Family, dict[str, Any]]:
    reasons = []
    for family in FAMILIES.values():
        try:
            return family, write_config(family, config)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(
        f"model: not a decoder that a Hugging Face family can say ({'; '.join(reasons)}); save it as a fewstep model"
    )


def _write_weights(directory: Path, named: Mapping[str, Tensor], dtype: torch.dtype, limit: int) -> None:
    """One file, or with an index as many as keep each at `limit` bytes."""
    shards: list[dict[str, Tensor]] = [{}]
    used = total = 0
    for name, tensor in named.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used, total = used + size, total + size
    if len(shards) == 1:
        write(directory / WEIGHTS, shards[0], dtype)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write(directory / file, shard, dtype)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX).write_text(_json(index), encoding="utf-8")


def _generation(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's section of that name: the ids that end a text, which may be several; {} where only the tokenizer says."""
    file = directory / GENERATION
    for values in (read_json(file) if file.is_file() else {}, config):
        match values.get("eos_token_id"):
            case int(token):
                return {"generation": {"eos_ids": [token]}}
            case [*tokens] if tokens and all(isinstance(token, int) for token in tokens):
                return {"generation": {"eos_ids": tokens}}
            case None:
                continue
            case other:
                raise ValueError(f"eos_token_id={other!r}: expected a token id or a list of them")
    return {}


def _ends(model: Model) -> dict[str, Any]:
    """The tokens that begin and end a text, as Hugging Face writes them."""
    bos, eos = None if model.tokenizer is None else model.tokenizer.bos, list(model.eos_ids)
    return {
        **({} if bos is None else {"bos_token_id": bos}),
        **({} if not eos else {"eos_token_id": eos[0] if len(eos) == 1 else eos}),
    }


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
