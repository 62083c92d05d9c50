"""Checkpoints on disk: complete or absent, whatever kills the process. Safetensors and JSON only.

A checkpoint is written into a hidden folder, flushed to the disk and renamed; its `manifest.json`, written last, holds the size
and digest of every other file. This file knows no model, no optimizer and no objective: it stores tensors and JSON by name.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "weights.safetensors"
_TENSORS, _STATE, _MANIFEST, _HIDDEN, _VERSION = "train.safetensors", "state.json", "manifest.json", ".partial-", 1

Notice = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run needs to go on: `weights` as a user loads them, `tensors` and `state` (JSON values) of the training alone."""

    step: int
    weights: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


@final
class Checkpoints:
    """The checkpoints of a run folder: `root/step-00001000/...`, the newest `keep` of them."""

    def __init__(self, root: Path, keep: int) -> None:
        self._root = root
        self._keep = keep

    def steps(self) -> list[int]:
        """The steps of the checkpoints present, oldest first, whether or not they are whole."""
        return sorted(int(path.name.removeprefix("step-")) for path in self._root.glob("step-*") if path.name[5:].isdigit())

    def path(self, step: int) -> Path:
        return self._root / f"step-{step:08d}"

    def write(self, checkpoint: Checkpoint, extra: Mapping[str, str]) -> None:
        """Store `checkpoint` and the text files `extra` beside it, then drop the oldest beyond `keep`, and later ones.

        Later ones can only be damaged: a run resumes from the newest that is whole. Raises ValueError when the disk refuses; what
        was there before is untouched.
        """
        path, partial = self.path(checkpoint.step), self._root / f"{_HIDDEN}{checkpoint.step}"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            partial.mkdir()
            _fill(partial, checkpoint, extra)
            if path.exists():
                self._remove(path)
            partial.rename(path)
            _flush(self._root)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            steps = self.steps()
            kept = f"step {steps[-1]} is intact" if steps else "there was none before"
            raise ValueError(f"checkpoint={str(path)!r}: cannot be written ({error}); {kept}; make room and resume") from error
        steps = self.steps()
        earlier = [step for step in steps if step < checkpoint.step]
        for step in steps:
            if step > checkpoint.step or step in earlier[: len(earlier) + 1 - self._keep]:
                self._remove(self.path(step))

    def latest(self, notice: Notice) -> Checkpoint | None:
        """The newest whole checkpoint, or None in an empty folder; damaged ones are passed over, each with a notice.

        Raises ValueError when all are damaged.
        """
        for step in reversed(self.steps()):
            try:
                return read(self.path(step))
            except ValueError as error:
                notice(f"{error}; passed over")
        if self.steps():
            raise ValueError(f"checkpoints={str(self._root)!r}: all of them are damaged; train anew in another directory")
        return None

    def _remove(self, path: Path) -> None:
        doomed = self._root / f"{_HIDDEN}old-{path.name}"
        path.rename(doomed)  # so that a death inside rmtree leaves no half checkpoint behind
        shutil.rmtree(doomed, ignore_errors=True)

    def _sweep(self) -> None:
        for left in self._root.glob(f"{_HIDDEN}*"):
            shutil.rmtree(left, ignore_errors=True)


def read(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`. Raises ValueError for one that is missing, cut short or altered."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != _VERSION:
            raise ValueError(f"format {manifest['version']}, this library reads {_VERSION}")
        for name, written in manifest["files"].items():
            if _fingerprint(path / name) != written:
                raise ValueError(f"{name} is not as it was written")
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        return Checkpoint(int(manifest["step"]), load_file(path / WEIGHTS), load_file(path / _TENSORS), state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"checkpoint={str(path)!r}: damaged ({error}); use an older one") from error


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` by name, tied tensors once, under their first name; frozen parameters are left out.

    What is not trained stays where it came from: heads beside a large trunk make small checkpoints.
    """
    seen: set[int] = set()
    unique: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if id(tensor) not in seen and not frozen:
            seen.add(id(tensor))
            unique[name] = tensor.detach()
    return unique


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `tensors_of` gave into `model`. Raises ValueError when a name or a shape differs."""
    own = tensors_of(model)
    for name in sorted(own.keys() ^ tensors.keys()):
        where = "checkpoint" if name in own else "model"
        raise ValueError(f"weights {name!r}: not in the {where}; resume with the recipe the run was started with")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                shapes = f"{tuple(tensors[name].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
                raise ValueError(f"weights {name!r}: shape {shapes}; resume with the recipe the run was started with")
            tensor.copy_(tensors[name])


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """`value` (nested dicts and lists of tensors and JSON values) as JSON, its tensors moved into `tensors` under `name`.

    Raises ValueError for a value that is neither.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"$tensor": name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{name}: key {key!r} is not a string; a checkpoint holds string keys only")
        return {key: pack(item, tensors, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"{name}={value!r}: a checkpoint holds tensors and JSON values only; convert it in state_dict")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack` (tuples come back as lists)."""
    if isinstance(value, dict):
        if value.keys() == {"$tensor"}:
            return tensors[value["$tensor"]]
        return {key: unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    return value


def _fill(folder: Path, checkpoint: Checkpoint, extra: Mapping[str, str]) -> None:
    for name, text in {_STATE: json.dumps(checkpoint.state, indent=1), **extra}.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, tensors in ((WEIGHTS, checkpoint.weights), (_TENSORS, checkpoint.tensors)):
        save_file({key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}, folder / name)
        shutil.copymode(folder / _STATE, folder / name)  # safetensors leaves a file that its owner alone may read
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    manifest = {"version": _VERSION, "step": checkpoint.step, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _flush(path)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(file, _digest).hexdigest()}


def _digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
