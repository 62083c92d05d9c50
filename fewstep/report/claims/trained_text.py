"""Small language models for claims about objectives: one backbone, so many steps each, and their bits per byte.

This file knows the trainings of `race text` and trains as that does; it knows no claim.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fewstep.core.recipe import parse
from fewstep.report.claims.claim import Bench
from fewstep.report.text_cells import Setup, learn
from fewstep.report.text_methods import TRAININGS, TextRaceConfig

# a small vocabulary and short rows: what is compared is seen after minutes
SIZES: Mapping[str, Any] = MappingProxyType({"vocab": 512, "batch": 16, "length": 64, "prompt": 16, "windows": 128, "draws": 8})


def bits_after(bench: Bench, training: str, steps: int, seed: int) -> dict[str, float]:
    """Bits per byte of held-out text, their `error` and the `seconds` of a network of `race text` trained for `steps`.

    Networks lie in the bench's folder that stays, so that a killed claim goes on where it was.
    """
    config = parse(TextRaceConfig, {**SIZES, "seed": seed, "judge": bench.effort.model})
    config = config.model_copy(update={"tokens": steps * config.batch * config.length})
    folder = (bench.kept or bench.scratch) / f"{steps}-steps-seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    bench.console.print(f"training {TRAININGS[training].title} for {steps} steps, seed {seed}", highlight=False)
    found = learn(Setup(config, folder, bench.console), training)
    return {"bits": found["bits"]["value"], "error": found["bits"]["error"], "seconds": found["seconds"]}
