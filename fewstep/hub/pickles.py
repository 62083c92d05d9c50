"""The one place that reads a pickle: its tensors go into a safetensors file, when the user asks. This file knows no model."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from fewstep.models.weights import read_json, write

SUFFIXES = (".pt", ".bin", ".pth")
_NAMES: Mapping[str, str] = MappingProxyType({"pytorch_model": "model"})  # what the same weights are called as safetensors


def refusal(file: Path) -> ValueError:
    """Why `file` is not read, and the command that makes it readable."""
    out = file.parent.with_name(f"{file.parent.resolve().name}-safetensors")
    return ValueError(
        f"{file}: a pickle, which can run code, is never loaded; convert it: fewstep convert {file} --to safetensors --out {out}"
    )


def convert_pickle(file: Path, directory: Path) -> None:
    """Write the tensors of `file` into the new or empty `directory`, as safetensors, and copy the JSON files beside it.

    PyTorch's restricted reader takes tensors and plain values alone; nothing in the file runs. Raises ValueError for a file that
    holds anything else, is damaged, or is one of several, and for a directory in use.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"out={str(directory)!r}: in use; choose a new or empty one")
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give the path of a .pt or .bin file")
    try:
        found = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # what a damaged or hostile file raises is anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: not a file of tensors alone ({reason}); get the weights as safetensors") from None
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{file}: expected a table of tensors by name, found {type(found).__name__}; get a state dict")
    tensors = {str(name): tensor.clone() for name, tensor in found.items()}  # those that share memory must not, on disk
    beside = [path for path in sorted(file.parent.glob("*.json")) if not path.name.endswith(".index.json")]
    for path in beside:
        read_json(path)
    write(directory / f"{_NAMES.get(file.stem, file.stem)}.safetensors", tensors)
    for path in beside:
        shutil.copyfile(path, directory / path.name)
