"""`load`: a model from wherever it is. This file knows the layouts of directories, not what is in their files."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from fewstep.core.recipe import suggestion
from fewstep.hub.download import download
from fewstep.hub.huggingface import CONFIG, read_hf
from fewstep.models.model import Model
from fewstep.nn.packed import pack
from fewstep.training.checkpoint import Checkpoints

SHIPPED = Path(__file__).parents[1] / "shipped"
RECIPE, RUN, HEADS = "recipe.json", "checkpoints", "heads.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load(
    source: str | Path, device: torch.device | str = "cpu", dtype: str | torch.dtype = "float32", *, packed: bool = True
) -> Model:
    """The model at `source`, its weights as `dtype` ("auto": as stored) on `device`.

    `packed` lays the weights out for decoding where a CPU kernel can be built; set it to False to train the model.

    `source` is, and is tried in this order: the name of a shipped model (a string without a slash: write ./NAME for a directory
    of that name); a directory, of fewstep (recipe.json), of Hugging Face (config.json), or of a training run, whose newest whole
    checkpoint is taken; a hub id "owner/name", from the cache of `huggingface_hub` or downloaded, safetensors and JSON only.
    Raises ValueError when there is no model, or one that is damaged, unknown or inconsistent; nothing is half loaded.
    """
    directory = locate(source)
    if (directory / HEADS).is_file():
        raise ValueError(f"model={str(source)!r}: heads for a model, not a model; load that one, with drafter=KIND={source}")
    own, theirs = (directory / RECIPE).is_file(), (directory / CONFIG).is_file()
    if own and theirs:
        raise ValueError(f"model={str(source)!r}: holds both {RECIPE} (fewstep) and {CONFIG} (Hugging Face); remove one of them")
    if theirs:
        name = directory.resolve().name if Path(source).is_dir() else str(source)
        return _laid_out(read_hf(directory, name, device, dtype), packed)
    if not own and (directory / RUN).is_dir():
        directory = newest(directory)
    elif not own:
        raise ValueError(
            f"model={str(source)!r}: no model in this directory; expected {RECIPE} (fewstep), {CONFIG} (Hugging Face) or {RUN}/"
        )
    return _laid_out(Model.load(directory, device, dtype), packed)


def _laid_out(model: Model, packed: bool) -> Model:
    if packed:
        pack(model.network)
    return model


def locate(source: str | Path) -> Path:
    """The directory that `source` names, downloaded if it is a hub id. Raises ValueError if it names none."""
    name, path, known = str(source), Path(source).expanduser(), shipped()
    if isinstance(source, str) and name in known:
        return known[name]
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"model={name!r}: a file; give the directory that holds it")
    if isinstance(source, str) and _HUB_ID.fullmatch(name):
        return download(name)
    raise ValueError(f"model={name!r}: no such directory, shipped model or hub id (owner/name); {suggestion(name, list(known))}")


def shipped() -> Mapping[str, Path]:
    """The directories of the models, and of heads for them, that come with the library, by name."""
    return {path.parent.name: path.parent for file in (RECIPE, HEADS) for path in sorted(SHIPPED.glob(f"*/{file}"))}


def newest(run: Path) -> Path:
    """The newest whole checkpoint of a run folder; damaged ones are passed over with a warning. Raises ValueError for none."""
    checkpoints = Checkpoints(run / RUN, keep=1)
    latest = checkpoints.latest(lambda notice: warnings.warn(notice, RuntimeWarning, stacklevel=4))
    if latest is None:
        raise ValueError(f"model={str(run)!r}: a run without a checkpoint yet; wait for its first, or train it")
    return checkpoints.path(latest.step)
