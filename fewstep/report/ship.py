"""Make a trained run a shipped model: bf16 weights, recipe, tokenizer, held-out prompts, file hashes, and a card of what it is.

Run it as `python -m fewstep.report.ship RUN NAME`. This file knows where shipped models live and what must stand beside them.
"""

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fewstep.core.recipe import resolve
from fewstep.hub.load import SHIPPED, load, newest
from fewstep.report.likelihood import bits_per_byte
from fewstep.report.prompts import write_held_out
from fewstep.training.data import DATA
from fewstep.training.data.grouping import xz_bits_per_byte
from fewstep.training.data.sources import DataConfig

CARD, CONTEXT, STRIDE = "card.json", 384, 256


def ship(run: Path, name: str, *, licence: str, console: Console | None = None) -> Path:
    """Write the newest checkpoint of `run` as the shipped model `name`; its folder.

    Validation bits per byte stand beside those of xz on the same files, alone and primed with the training text.
    Raises ValueError for a run without a checkpoint or recipe.
    """
    model = load(run, packed=False)
    if model.tokenizer is None or "data" not in model.recipe:
        raise ValueError(f"run={str(run)!r}: no tokenizer or no data section in its recipe; ship a run of `fewstep train`")
    data = resolve(model.recipe["data"], DATA, "data")
    assert isinstance(data, DataConfig)
    folder = SHIPPED / name
    model.save(folder, dtype="bfloat16")
    write_held_out(folder, data, model.tokenizer)
    corpus = data.build()
    train, held_out = ([document.text for document in corpus.documents(part)] for part in ("train", "validation"))
    text, primer = "".join(held_out).encode(), "".join(train).encode()
    state = json.loads((newest(run) / "state.json").read_text(encoding="utf-8"))
    card: dict[str, Any] = {
        "name": name,
        "parameters": model.size,
        "weights": "bfloat16",
        "python": platform.python_version(),
        "licence_of_data": licence,
        "training": {key: state[key] for key in ("step", "tokens", "seconds") if key in state},
        "validation": {
            "bytes": len(text),
            "bits_per_byte": bits_per_byte(load(name, packed=True), held_out, CONTEXT, STRIDE).value,
            "bits_per_byte_xz": xz_bits_per_byte(text),
            "bits_per_byte_xz_primed_with_training_text": xz_bits_per_byte(text, primer),
        },
    }
    (folder / CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")
    (console or Console()).print_json(data=card)
    return folder


def main(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    name: Annotated[str, typer.Argument(help="The name to ship it under.")],
    licence: Annotated[str, typer.Option(help="The licence of its training data.")] = "PSF-2.0 (Python standard library)",
) -> None:
    """Ship a trained run."""
    ship(run, name, licence=licence)


if __name__ == "__main__":
    typer.run(main)
