"""Heads alone on disk, for a target that has its own directory: `heads.safetensors`, and `heads.json`, which says what they are.

`heads.json`: `format`; `heads`, their config, measured accuracies included; `target`, the name it was trained for and the
`width`, `vocab` and `depth` that heads must find again. This file knows no heads.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewstep.core.recipe import Config, parse, resolve
from fewstep.hub.drafters import is_foreign, read_drafter
from fewstep.hub.load import HEADS as RECORD
from fewstep.hub.load import load, locate
from fewstep.hub.pickles import SUFFIXES, refusal
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.models.model import Model, blank
from fewstep.models.weights import allocated, check, distinct, fill, headers, read_json, write, write_texts
from fewstep.nn.heads import HEADS
from fewstep.nn.packed import PackedModule, pack

WEIGHTS, FORMAT = "heads.safetensors", "fewstep-heads-1"


def save_heads(network: Decoder, drafter: str, directory: Path | str, *, target: str) -> None:
    """Write the heads of `network` that serve `drafter`; `target` is the name the network was loaded by.

    Raises ValueError when the disk refuses.
    """
    directory = Path(directory)
    write(directory / WEIGHTS, distinct(network.heads[drafter].state_dict(keep_vars=True)))
    head = next(head for head in network.config.heads if head.drafter == drafter)
    record = {"format": FORMAT, "heads": head.model_dump(mode="json"), "target": {"name": target, **_shape(network)}}
    write_texts(directory, {RECORD: json.dumps(record, indent=1)})


def read_heads(directory: Path | str, target: Decoder) -> Decoder:
    """The heads in `directory` on the device and in the dtype of `target`, packed if it is, beside a trunk without memory.

    Raises ValueError for a missing, damaged or truncated file, or heads for a model of another shape; nothing is half loaded.
    """
    directory = Path(directory)
    head = _checked(read_json(directory / RECORD), directory, target)
    shell = blank(parse(DecoderConfig, {**dict(target.config), "heads": [head]}), str(directory))
    (heads,) = shell.heads.values()
    stored = headers([directory / WEIGHTS])
    check(heads.state_dict(keep_vars=True), stored, str(directory / WEIGHTS))
    weight = target.embedding.weight
    heads.load_state_dict(allocated(heads.state_dict(), weight.dtype, weight.device), assign=True)
    fill(heads.state_dict(keep_vars=True), stored)
    if any(isinstance(part, PackedModule) for part in target.modules()):
        pack(heads)
    return shell.eval()


def companion(model: Model) -> Callable[[str], Decoder]:
    """How a drafter of `model` gets what it names by path: heads for that model, or a second model of its device and dtype."""

    def fetch(path: str) -> Decoder:
        found = beside(path, model.network)
        return found or load(path, device=str(model.device), dtype=model.dtype).network

    return fetch


def beside(path: str | Path, target: Decoder) -> Decoder | None:
    """The heads for `target` in the directory or hub id `path`, in our layout or another project's; None if it holds none.

    Raises ValueError for what `read_heads` and `read_drafter` refuse, and for a pickle.
    """
    if Path(path).suffix in SUFFIXES and Path(path).is_file():
        raise refusal(Path(path))
    directory = locate(path)
    if (directory / RECORD).is_file():
        return read_heads(directory, target)
    return read_drafter(directory, target) if is_foreign(directory) else None


def _checked(record: dict[str, Any], directory: Path, target: Decoder) -> Config:
    """The config of the heads that `record` describes, if they fit `target`."""
    file = directory / RECORD
    if record.get("format") != FORMAT or not isinstance(record.get("target"), dict):
        raise ValueError(f"{file}: format={record.get('format')!r}: expected {FORMAT!r}; write it with `fewstep train`")
    for name, own in _shape(target).items():
        if (theirs := record["target"].get(name)) != own:
            raise ValueError(f"{file}: heads for a model of {name} {theirs}, this one has {own}; give heads trained for it")
    try:
        return resolve(record.get("heads"), HEADS, "heads")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _shape(network: Decoder) -> dict[str, int]:
    return {"width": network.width, "vocab": network.vocab, "depth": network.depth}
