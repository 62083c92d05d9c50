"""What tuning found, kept from one run to the next: a file per model, dtype, machine, batch and drafter.

A drafter is known by its kind and by the files it reads. What is damaged, of another format, or about files that have changed
since is passed over with a notice. This file measures nothing.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from fewstep.core.draft import Drafter
from fewstep.core.recipe import resolve
from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.guard import Guarded, Prices
from fewstep.decode.text import GenerationConfig, drafter_config, pick_drafter
from fewstep.decode.verification import TokenVerificationConfig
from fewstep.models.model import Model
from fewstep.models.weights import distinct
from fewstep.report.costs import cpu_name

FORMAT = "fewstep-tuned-2"
UNTUNED = Prices({1: 1.0, 16: 2.5}, 0.5, 0.02)  # a small model on a CPU: where speculation costs more, it is seldom used

_SAMPLED = 64  # numbers of each weight that stand for it
_ENDS = 1 << 16  # bytes at the start and the end of a file that stand for it


@final
@dataclass(frozen=True, slots=True)
class Tuned:
    """The `drafter` to use (silent: plain decoding is best), its measured speed over plain decoding, and what steps cost."""

    drafter: DrafterConfig
    speed: float
    prices: Prices

    @property
    def label(self) -> str:
        """What was chosen, in a line."""
        fields = {k: v for k, v in self.drafter.model_dump(mode="json", exclude_defaults=True).items() if k != "kind"}
        said = "".join(f" {name}={value}" for name, value in fields.items())
        return f"{self.drafter.kind}{said}, {self.speed:.2f}x plain decoding"

    def build(self, model: Model, load: Load) -> Drafter[Any]:
        """The drafter, guarded: where a text does not reward it, it falls silent."""
        built = self.drafter.build(model.network, load)
        return built if isinstance(self.drafter, SilentConfig) else Guarded(built, self.prices)


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """The drafter that a request gets, and `why`, in a line."""

    drafter: Drafter[Any]
    why: str


def circumstances(model: Model, batch: int, sampled: bool) -> dict[str, Any]:
    """What a tuning holds for: model, dtype, device, threads, processor, batch, and whether tokens are drawn or the likeliest."""
    return {
        "model": _weights(model.network, json.dumps(model.network.config.model_dump(mode="json"), sort_keys=True)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "batch": batch,
        "sampled": sampled,
    }


def identity(drafter: DrafterConfig) -> dict[str, str]:
    """What tells a drafter from others of its kind: where its files are, and a digest of them ("": a hub's or shipped ones)."""
    path = drafter.model_dump().get("path", "")
    place, digest = Path(path).expanduser(), hashlib.sha256()
    if not path or not place.is_dir():
        return {"kind": drafter.kind, "path": path, "files": ""}
    for file in sorted(one for one in place.rglob("*") if one.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(place)}:{size}:".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_ENDS))
            opened.seek(max(0, size - _ENDS))
            digest.update(opened.read(_ENDS))
    return {"kind": drafter.kind, "path": str(place.resolve()), "files": digest.hexdigest()[:16]}


def cache() -> Path:
    """Where tunings are kept: $XDG_CACHE_HOME/fewstep/tuned, else ~/.cache/fewstep/tuned."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fewstep" / "tuned"


def keep(found: Tuned, tried: DrafterConfig, facts: Mapping[str, Any]) -> Path:
    """Write what was found when the drafter `tried` was tuned under `facts`; the path of the file."""
    known = identity(tried)
    path = cache() / f"{_fingerprint(facts)}-{tried.kind}-{_fingerprint({**known, 'files': ''})}.json"
    prices = found.prices
    record = {
        "format": FORMAT,
        "facts": dict(facts),
        "tried": known,
        "drafter": found.drafter.model_dump(mode="json"),
        "speed": found.speed,
        "prices": {"steps": {str(n): price for n, price in prices.steps.items()}, "draft": prices.draft, "read": prices.read},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")  # so that nobody reads half a file
    partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    partial.replace(path)
    return path


def recall(facts: Mapping[str, Any]) -> Tuned | None:
    """The fastest drafter that was found under `facts`; None if nothing was tuned under them."""
    found = []
    for path in sorted(cache().glob(f"{_fingerprint(facts)}-*.json")):
        try:
            found.append(_read(path, facts))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            notice = f"{path}: not what `fewstep tune` writes ({error}); ignored, tune again or remove it"
            warnings.warn(notice, RuntimeWarning, stacklevel=2)
    return max(found, key=lambda tuned: tuned.speed, default=None)


def choose(
    model: Model,
    drafter: str | DrafterConfig | Drafter[Any],
    rows: int,
    config: GenerationConfig,
    load: Load,
    fields: Mapping[str, object] | None = None,
) -> Choice:
    """`pick_drafter`, where "auto" is what tuning found best for `rows` rows if `model` was tuned here, and guarded in any case.

    Tuned trees may branch, which only verification token by token takes; drafter `fields` that are set are not overruled.
    Raises ValueError as `pick_drafter` does.
    """
    if drafter != "auto":
        return Choice(pick_drafter(model, drafter, load, fields), "as asked")
    if not fields and isinstance(config.judged, TokenVerificationConfig):
        found = recall(circumstances(model, rows, config.temperature > 0))
        if found is not None:
            return Choice(found.build(model, load), f"{found.label} where it was tuned")
    first = drafter_config(model, drafter, fields or {})
    why = f"{first.kind}, not tuned: `fewstep tune MODEL` chooses what is fastest here"
    return Choice(Guarded(first.build(model.network, load), UNTUNED), why)


def _read(path: Path, facts: Mapping[str, Any]) -> Tuned:
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["format"] != FORMAT:
        raise ValueError(f"format={record['format']!r}, expected {FORMAT!r}")
    if record["facts"] != dict(facts):
        raise ValueError("facts: of other circumstances than its name says")
    config = resolve(record["drafter"], DRAFTERS, "drafter")
    assert isinstance(config, DrafterConfig)
    if not isinstance(config, SilentConfig) and record["tried"] != identity(config):
        raise ValueError(f"drafter.path={record['tried']['path']!r}: not the files that were tuned")
    steps = {int(nodes): float(price) for nodes, price in record["prices"]["steps"].items()}
    if 1 not in steps:
        raise ValueError("prices.steps: no price of one node")
    return Tuned(config, float(record["speed"]), Prices(steps, float(record["prices"]["draft"]), float(record["prices"]["read"])))


def _weights(module: nn.Module, config: str) -> str:
    """A digest of the config and of some numbers of every weight."""
    digest = hashlib.sha256(config.encode())
    for name, weight in distinct(module.state_dict(keep_vars=True)).items():
        flat = weight.detach().flatten()
        digest.update(name.encode())
        digest.update(flat[:: max(1, len(flat) // _SAMPLED)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _fingerprint(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]
