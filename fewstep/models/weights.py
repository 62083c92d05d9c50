"""Weights on disk: safetensors files, whole or sharded, read with a one-line error for everything that can be wrong.

Files from others are hostile input: safetensors only, names and shapes checked before anything is copied. This file knows no
model.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

INDEX = "model.safetensors.index.json"


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
        reason = f"only pickle files ({pickles[0]}), which can run code; convert them to safetensors" if pickles else "no safetensors file"
        raise ValueError(f"model={str(directory)!r}: {reason}; expected {' or '.join(names)} or {INDEX}")
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index}: no weight_map; the index is damaged, download it again")
    found = []
    for name in sorted({str(value) for value in files.values()}):
        if Path(name).name != name or not (directory / name).is_file():
            raise ValueError(f"{index}: shard {name!r} is not in {directory}; download the missing file")
        found.append(directory / name)
    return found


def tensors(paths: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the files with its name, one at a time. Raises ValueError for a damaged or truncated file."""
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None


def load_into(module: nn.Module, named: Mapping[str, Tensor], source: str) -> None:
    """Copy `named` into `module`, all or nothing. Raises ValueError naming the first missing, unknown or misshapen tensor."""
    own = module.state_dict(keep_vars=True)
    tied = {name for name, tensor in own.items() if any(tensor is other for earlier, other in own.items() if earlier < name)}
    for name, tensor in own.items():
        if name in named:
            if named[name].shape != tensor.shape:
                found, wanted = tuple(named[name].shape), tuple(tensor.shape)
                raise ValueError(f"{source}: {name} has shape {found}, the model needs {wanted}; the weights belong to another config")
        elif name not in tied:
            raise ValueError(f"{source}: {name} is missing; the weights belong to another config")
    unknown = sorted(set(named) - set(own))
    if unknown:
        raise ValueError(f"{source}: {unknown[0]} is not part of this model ({len(unknown)} such); the weights belong to another config")
    with torch.no_grad():
        for name, tensor in named.items():
            own[name].copy_(tensor)


def state_of(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The module's tensors by name, tied ones once, contiguous on the CPU, floating ones as `dtype`."""
    seen: set[int] = set()
    named = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        value = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        named[name] = value.contiguous()
    return named


def write(path: Path, named: Mapping[str, Tensor]) -> None:
    """Save `named` at `path` whole or not at all. Raises ValueError when the disk refuses (e.g. full)."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(dict(named), partial, metadata={"format": "pt"})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"{path}: could not be written ({error}); free some space or choose another place") from None


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises ValueError for a missing file or anything but a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a model directory that holds it") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
