"""Weights on disk: safetensors files, whole or sharded, read with a one-line error for everything that can be wrong.

Files from others are hostile input: safetensors only, names and shapes checked before anything is copied. This file knows no
model.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
FLOATS: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
)

INTEGERS: Mapping[str, torch.dtype] = MappingProxyType({"I64": torch.int64, "BOOL": torch.bool})  # tables of token ids


def shards(directory: Path, names: Sequence[str] = ("weights.safetensors", "model.safetensors")) -> list[Path]:
    """The safetensors files of a model directory: the first of `names` that exists, else the shards of its index.

    Raises ValueError when there are none, when a shard of the index is missing or its name leaves the directory.
    """
    for name in names:
        if (directory / name).is_file():
            return [directory / name]
    index = directory / INDEX
    if not index.is_file():
        pickles = sorted(path.name for path in directory.glob("*.bin")) + sorted(path.name for path in directory.glob("*.pt"))
        reason = (
            f"only pickle files ({pickles[0]}), which can run code; convert them to safetensors"
            if pickles
            else "no safetensors file"
        )
        raise ValueError(f"model={str(directory)!r}: {reason}; expected {' or '.join(names)} or {INDEX}")
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index}: no weight_map; the index is damaged, download it again")
    found = []
    for name in sorted({str(value) for value in files.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: shard {name!r} is not the name of a safetensors file beside it; do not trust this index")
        if not (directory / name).is_file():
            raise ValueError(f"{index}: shard {name!r} is missing; download it into {directory}")
        found.append(directory / name)
    return found


@final
@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a safetensors file as the file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def headers(paths: Sequence[Path]) -> dict[str, Stored]:
    """What the files hold, by tensor name; no tensor is read.

    Raises ValueError for a damaged or truncated file, a name in two files, a tensor of a type that is no plain float or int64.
    """
    known = {**FLOATS, **INTEGERS}
    stored: dict[str, Stored] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                header = file.get_slice(name)
                if name in stored:
                    raise ValueError(f"{path}: {name} is also in {stored[name].file.name}; remove the file that does not belong")
                if header.get_dtype() not in known:
                    raise ValueError(
                        f"{path}: {name} is stored as {header.get_dtype()}; quantised weights are not supported, "
                        f"use a checkpoint in one of {', '.join(FLOATS)}"
                    )
                stored[name] = Stored(path, tuple(header.get_shape()), known[header.get_dtype()])
    return stored


def check(own: Mapping[str, Tensor], stored: Mapping[str, Stored], source: str) -> None:
    """Raises ValueError naming the first tensor of a model, `own`, that is missing or misshapen, or the first unknown one.

    A tensor with several names (tied) needs one of them. The tensors may be on the meta device.
    """
    for names in _names(own):
        if not any(name in stored for name in names):
            raise ValueError(f"{source}: {names[0]} is missing; the weights belong to another config")
        for name in names:
            wanted, found = tuple(own[name].shape), stored[name].shape if name in stored else None
            if found not in (None, wanted):
                raise ValueError(f"{source}: {name} has shape {found}, expected {wanted}; the weights belong to another config")
            if found is not None and stored[name].dtype.is_floating_point != own[name].is_floating_point():
                raise ValueError(f"{source}: {name} is stored as {stored[name].dtype}, expected {own[name].dtype}; convert it")
    unknown = sorted(stored.keys() - own.keys())
    if unknown:
        raise ValueError(
            f"{source}: {unknown[0]} is not part of this model ({len(unknown)} such); the weights belong to another config"
        )


@torch.no_grad()
def fill(own: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Copy into `own` what `check` found in order. Files are mapped, one at a time, so their pages can be dropped at any moment.

    Raises ValueError for a tensor that is stored under two names with different values though the model ties them.
    """
    first = {next(name for name in names if name in stored) for names in _names(own)}
    for name, value in _read(stored, first):
        own[name].copy_(value)
    for name, value in _read(stored, stored.keys() - first):
        if not torch.equal(own[name], value.to(own[name])):
            raise ValueError(
                f"{stored[name].file}: {name} differs from the tensor this model ties it to; untie them in the config"
            )


def floating(stored: Mapping[str, Stored]) -> torch.dtype:
    """The narrowest floating-point dtype that holds every stored weight without loss; float32 if there is none."""
    kinds = {header.dtype for header in stored.values() if header.dtype.is_floating_point}
    return reduce(torch.promote_types, kinds or {torch.float32})


def allocated(named: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """Memory for tensors like `named`: weights as `dtype`, tables of ids as they are."""
    return {
        name: torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=device)
        for name, tensor in named.items()
    }


def distinct(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `named`, tied ones once, under their first name."""
    return {names[0]: named[names[0]] for names in _names(named)}


def write(path: Path, named: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Save `named` at `path`, its weights as `dtype` (None: as they are), whole or not at all.

    Raises ValueError when the disk refuses.
    """
    partial = path.with_name(f".{path.name}.partial")
    portable = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in named.items()
    }
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        save_file(portable, partial, metadata={"format": "pt"})
        partial.chmod(mode)  # safetensors leaves a file that its owner alone may read
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"{path}: could not be written ({error}); free some space or choose another place") from None


def write_texts(directory: Path, texts: Mapping[str, str]) -> None:
    """Write text files by name relative to `directory`, whose folders are made. Raises ValueError when the disk refuses."""
    for name, text in texts.items():
        try:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"{directory / name}: could not be written ({error}); free some space or choose another place"
            ) from None


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises ValueError for a missing file or anything but a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a model directory that holds it") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None


def _read(stored: Mapping[str, Stored], names: Set[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors `names`, file by file."""
    for path in sorted({stored[name].file for name in names}):
        with _opened(path) as file:
            for name in sorted(names):
                if stored[name].file == path:
                    yield name, file.get_tensor(name)


def _names(named: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each distinct tensor, in order."""
    names: dict[int, list[str]] = {}
    for name, tensor in named.items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())
