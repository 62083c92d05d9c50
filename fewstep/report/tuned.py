"""What tuning found, kept from one run to the next: a file per model, dtype, machine, batch and drafter.

A file that is damaged or of another format is passed over with a notice. This file measures nothing.
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

from fewstep.core.draft import Drafter
from fewstep.core.recipe import resolve
from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.guard import Prices, guarded
from fewstep.decode.text import GenerationConfig, pick_drafter
from fewstep.decode.verification import TokenVerificationConfig
from fewstep.models.model import Model
from fewstep.report.costs import cpu_name

FORMAT = "fewstep-tuned-1"

_SAMPLED = 64  # rows of the embedding that stand for the weights


@final
@dataclass(frozen=True, slots=True)
class Tuned:
    """The `drafter` to use (silent: plain decoding is best), its measured speed over plain decoding, and what steps cost."""

    drafter: DrafterConfig
    speed: float
    prices: Prices

    def build(self, model: Model, load: Load) -> Drafter[Any]:
        """The drafter, guarded: where a text does not reward it, it falls silent."""
        built = self.drafter.build(model.network, load)
        return built if isinstance(self.drafter, SilentConfig) else guarded(built, self.prices)


def circumstances(model: Model, batch: int, sampled: bool) -> dict[str, Any]:
    """What a tuning holds for: model, dtype, device, threads, processor, batch, and whether tokens are drawn or the likeliest."""
    network = model.network
    digest = hashlib.sha256(json.dumps(network.config.model_dump(mode="json"), sort_keys=True).encode())
    digest.update(network.embedding.weight[:_SAMPLED].detach().float().cpu().numpy().tobytes())
    return {
        "model": digest.hexdigest()[:16],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "batch": batch,
        "sampled": sampled,
    }


def cache() -> Path:
    """Where tunings are kept: $XDG_CACHE_HOME/fewstep/tuned, else ~/.cache/fewstep/tuned."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fewstep" / "tuned"


def keep(found: Tuned, tried: str, facts: Mapping[str, Any]) -> Path:
    """Write what was found when the drafter `tried` was tuned under `facts`; the path of the file."""
    path = cache() / f"{_fingerprint(facts)}-{tried}.json"
    record = {
        "format": FORMAT,
        "facts": dict(facts),
        "drafter": found.drafter.model_dump(mode="json"),
        "speed": found.speed,
        "prices": {"steps": {str(n): price for n, price in found.prices.steps.items()}, "draft": found.prices.draft},
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


def drafter_for(
    model: Model,
    drafter: str | DrafterConfig | Drafter[Any],
    rows: int,
    config: GenerationConfig,
    load: Load,
    fields: Mapping[str, object] | None = None,
) -> Drafter[Any]:
    """`pick_drafter`, where "auto" is what tuning found best for `rows` rows, guarded, if `model` was tuned here.

    Tuned trees may branch, which only verification token by token takes; drafter `fields` that are set are not overruled.
    Raises ValueError as `pick_drafter` does.
    """
    if drafter == "auto" and not fields and isinstance(config.judged, TokenVerificationConfig):
        found = recall(circumstances(model, rows, config.temperature > 0))
        if found is not None:
            return found.build(model, load)
    return pick_drafter(model, drafter, load, fields)


def _read(path: Path, facts: Mapping[str, Any]) -> Tuned:
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["format"] != FORMAT:
        raise ValueError(f"format={record['format']!r}, expected {FORMAT!r}")
    if record["facts"] != dict(facts):
        raise ValueError("facts: of other circumstances than its name says")
    config = resolve(record["drafter"], DRAFTERS, "drafter")
    assert isinstance(config, DrafterConfig)
    steps = {int(nodes): float(price) for nodes, price in record["prices"]["steps"].items()}
    if 1 not in steps:
        raise ValueError("prices.steps: no price of one node")
    return Tuned(config, float(record["speed"]), Prices(steps, float(record["prices"]["draft"])))


def _fingerprint(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]
