"""Models out, as Hugging Face directories. This file knows no family: families are data."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.hub.families import FAMILIES, Family, explicit, family_of, read_config, write_config
from fewstep.hub.huggingface import CONFIG, GENERATION, HEADS_FILE, HEADS_KEY, WEIGHTS
from fewstep.hub.names import HEADS, family_names
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model, dtype_of
from fewstep.models.weights import INDEX, distinct, write, write_texts


def save_hf(
    model: Model, directory: Path | str, *, dtype: str | torch.dtype | None = None, shard_bytes: int = 5_000_000_000
) -> None:
    """Write `model` as the Hugging Face directory that it came as, or in the words of the first family that can say it.

    `directory` must be new or empty; it appears whole or not at all. `dtype`: of the weights (None: as they are). `shard_bytes`:
    the most that a weights file holds, unless one tensor is larger. Heads beside the trunk, which other readers do not know, go
    into a file of their own that `load` reads back. Cost: the memory of one shard. Raises ValueError for a decoder that no family
    can say, a directory in use, a full disk.
    """
    saved = model.dtype if dtype is None else dtype_of(dtype)
    with appearing(directory) as partial:
        family, values = _config(model, saved)
        named = distinct(family_names(model.network, family))
        heads = {name: named.pop(name) for name in [*named] if name.startswith(HEADS)}
        _write_weights(partial, named, saved, shard_bytes)
        if heads:
            write(partial / HEADS_FILE, heads, saved)
        write_texts(partial, {GENERATION: _json(_ends(model)), **model.texts(), CONFIG: _json(values)})


@contextmanager
def appearing(directory: Path | str) -> Iterator[Path]:
    """A folder to write into that becomes `directory` when the body ends; if it raises, nothing is left.

    Raises ValueError for a directory in use, or when the disk refuses.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"directory={str(directory)!r}: in use; choose a new or empty one")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
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
    write_texts(directory, {INDEX: _json(index)})


def _ends(model: Model) -> dict[str, Any]:
    """The tokens that begin and end a text, as Hugging Face writes them."""
    bos, eos = None if model.tokenizer is None else model.tokenizer.bos, list(model.eos_ids)
    return {
        **({} if bos is None else {"bos_token_id": bos}),
        **({} if not eos else {"eos_token_id": eos[0] if len(eos) == 1 else eos}),
    }


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
