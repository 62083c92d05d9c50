"""The tuner against a full search: what it chooses beside every shape it could have chosen, raced on the same prompts.

`python benchmarks/tuning.py --cell MODEL/DTYPE/BATCH/DRAFTER` measures one cell (`--list` names them, `--all` measures those that
are missing) and writes runs/benchmarks/tuning/CELL.json; the table of what is there is printed. `--guard BATCH` times the guard
on code-nano with heads of noise. On an idle machine; nothing is asserted.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from types import MappingProxyType
from typing import Any, final

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fewstep.core.draft import Drafter
from fewstep.core.recipe import parse
from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.silent import Silent
from fewstep.decode.guard import Guarded
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.text import GenerationConfig
from fewstep.hub.heads import companion
from fewstep.hub.load import load
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model, dtype_of
from fewstep.nn.packed import pack
from fewstep.report.costs import cpu_name
from fewstep.report.prompts import prompts_for
from fewstep.report.shapes import Shape
from fewstep.report.steps import Work, raced
from fewstep.report.tune import TuneConfig, tune
from fewstep.report.tuned import choose, circumstances, keep

OUT = Path("runs/benchmarks/tuning")
RANDOM: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "random-19M": {"width": 384, "depth": 10, "query_heads": 6, "hidden": 1024},
        "random-69M": {"width": 768, "depth": 10, "query_heads": 12, "hidden": 2048},
    }
)
DRAFTED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"code-nano": ("ngram", "mtp"), "random-19M": ("ngram", "mtp"), "random-69M": ("ngram", "retrieval")}
)
NODES, TOKENS, ROUNDS = 16, 64, 3
TOGETHER, FINALISTS = 4, 5  # few at once, so that each finds in the caches what it left there


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """What is tuned."""

    model: str
    dtype: str
    batch: int
    drafter: str

    @property
    def name(self) -> str:
        return f"{self.model}/{self.dtype}/{self.batch}/{self.drafter}"

    @property
    def file(self) -> Path:
        return OUT / f"{self.name.replace('/', '-')}.json"


CELLS = tuple(
    Cell(model, dtype, batch, drafter)
    for model, drafters in DRAFTED.items()
    for dtype in ("bfloat16", "float32")
    for batch in (1, 8)
    for drafter in drafters
)


def loaded(cell: Cell, count: int) -> tuple[Model, list[list[int]]]:
    """The model, and `count` prompts for it."""
    if cell.model not in RANDOM:
        model = load(cell.model, dtype=cell.dtype)
        assert model.tokenizer is not None
        return model, [model.tokenizer.encode(prompt.prompt) for prompt in prompts_for(cell.model, model, count)]
    torch.manual_seed(0)
    heads = [{"kind": "mtp_sequential", "depth": 3}] if "mtp" in DRAFTED[cell.model] else []
    mixers = [{"kind": "attention", "kv_heads": 2}]
    values = {**RANDOM[cell.model], "vocab": 8192, "mixers": mixers, "heads": heads, "tied": True, "max_positions": 1024}
    model = Model(parse(DecoderConfig, values).build().to(dtype_of(cell.dtype)).eval(), None)
    pack(model.network)
    return model, torch.randint(8192, (count, 32)).tolist()


def measured(cell: Cell, limit: float) -> dict[str, Any]:
    """Tune, then race what was chosen and every shape it was chosen from, for about `limit` seconds in all (a third each)."""
    began = time.perf_counter()
    config = TuneConfig(batch=cell.batch, nodes=NODES, seconds=limit / 9)
    model, prompts = loaded(cell, max(config.prompts, 4 * cell.batch))
    network, fetch, drafter = model.network, companion(model), DRAFTERS[cell.drafter]()
    found = tune(network, drafter, fetch, prompts, config)
    tuned = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:  # through the file, as `generate` gets it
        os.environ["XDG_CACHE_HOME"] = folder
        keep(found.chosen, drafter, circumstances(model, cell.batch, False))
        chosen = choose(model, "auto", cell.batch, GenerationConfig(), fetch)
    grid = [one.shape for one in found.candidates]
    names = ["plain", *map(shown, grid), "tuned"]
    entrants = [Silent(), *(shape.config.build(network, fetch) for shape in grid), chosen.drafter]
    work = Work(network, prompts, cell.batch, TOKENS, NODES, SamplingConfig())
    speeds = first_heat(work, entrants, limit / 3)
    fastest = sorted(range(len(entrants) - 1), key=lambda i: -speeds[i])[:FINALISTS]
    final = [*sorted({0, 1, 2, *fastest}), len(entrants) - 1]  # the likeliest two by the tuner's numbers, too
    timings = raced(work, [entrants[i] for i in final], ROUNDS, limit / 3)
    mine, *others = timings[-1], *timings[:-1]
    best = min(range(len(others)), key=lambda i: others[i].best)
    laps = [theirs / own for own, theirs in zip(mine.laps, others[best].laps, strict=True)]
    return {
        "cell": cell.name,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "tuning_seconds": tuned,
        "curve": {str(n): price for n, price in found.curve.steps.items()},
        "plain_seconds": found.curve.plain,
        "chosen": found.chosen.label,
        "finalists": [[shown(one.shape), speed] for one, speed in zip(found.candidates, found.measured, strict=False)],
        "predicted": [[shown(one.shape), one.pace.tokens, one.predicted] for one in found.candidates],
        "best": names[final[best]],
        "ratio": others[best].best / mine.best,
        "ratio_laps": laps,
        "first_heat": dict(zip(names, speeds, strict=True)),
        "speeds": {names[i]: timings[0].best / one.best for i, one in zip(final, timings, strict=True)},
    }


def first_heat(work: Work, entrants: Sequence[Drafter[Any]], seconds: float) -> list[float]:
    """How many times faster than the first of `entrants`, plain decoding, each of them is: a few at a time beside it."""
    speeds = [1.0]
    for start in range(1, len(entrants), TOGETHER):
        some = [entrants[0], *entrants[start : start + TOGETHER]]
        plain, *others = raced(work, some, 1, seconds * len(some) / (len(entrants) * (1 + 1 / TOGETHER)))
        speeds += [plain.best / one.best for one in others]
    return speeds


def shown(shape: Shape) -> str:
    """A shape in a few characters: the fields that are not the default, or how deep and large it is."""
    fields = shape.config.model_dump(exclude_defaults=True, mode="json")
    return " ".join(f"{name}={value}" for name, value in fields.items() if name != "kind") or f"default ({shape.nodes} nodes)"


def guard(batch: int, dtype: str, console: Console) -> dict[str, Any]:
    """code-nano with heads of noise: the speed of "auto" and of a guarded chain over plain decoding, by length of text."""
    model = load("code-nano", dtype="float32", packed=False)
    network = model.network
    torch.manual_seed(0)
    for weight in (weight for heads in network.heads.values() for weight in heads.parameters()):
        torch.nn.init.normal_(weight, std=0.02)
    network.to(dtype_of(dtype)).eval()
    pack(network)
    assert model.tokenizer is not None
    prompts = [model.tokenizer.encode(prompt.prompt) for prompt in prompts_for("code-nano", model, 4 * batch)]
    fetch, config, found = companion(model), TuneConfig(batch=batch, nodes=NODES), {}
    chain = MultiTokenConfig()
    tuning = tune(network, chain, fetch, prompts, config.model_copy(update={"finalists": 1, "rounds": 1}))
    (costly,) = [one for one in tuning.candidates if one.shape.config == MultiTokenConfig(branching=(1, 1, 1))]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        entrants: dict[str, Drafter[Any]] = {"plain": Silent(), "unguarded": chain.build(network, fetch)}
        entrants["guarded"] = Guarded(chain.build(network, fetch), costly.prices)
        entrants["auto, not tuned"] = choose(model, "auto", batch, GenerationConfig(), fetch).drafter
        keep(tuning.chosen, chain, circumstances(model, batch, False))
        entrants["auto, tuned"] = choose(model, "auto", batch, GenerationConfig(), fetch).drafter
    table = Table(
        "tokens", *entrants, title=f"noise for heads, {dtype}, batch {batch}: speed over plain decoding", box=SIMPLE_HEAD
    )
    for tokens in (64, 128, 256, 512):
        work = Work(network, prompts[: max(2, batch)], batch, tokens, NODES, SamplingConfig())
        timings = raced(work, [*entrants.values()], ROUNDS, 20.0)
        found[tokens] = {name: timings[0].best / one.best for name, one in zip(entrants, timings, strict=True)}
        table.add_row(str(tokens), *(f"{speed:.3f}" for speed in found[tokens].values()))
    console.print(table)
    return {"batch": batch, "dtype": dtype, "tuned": tuning.chosen.label, "prices": costly.prices.draft, "speeds": found}


def show(console: Console) -> None:
    """The cells that were measured."""
    table = Table("cell", "plain ms", "v(4)", "v(16)", "chosen", "best of the grid", "tuned / best", "quartiles", box=SIMPLE_HEAD)
    for cell in CELLS:
        if not cell.file.is_file():
            continue
        record = json.loads(cell.file.read_text(encoding="utf-8"))
        speeds, spread = record["speeds"], quantiles(record["ratio_laps"], n=4)
        table.add_row(
            cell.name,
            f"{1e3 * record['plain_seconds']:.2f}",
            *(f"{record['curve'][nodes]:.2f}" for nodes in ("4", "16")),
            f"{record['chosen'].partition(',')[0]} {speeds['tuned']:.2f}x",
            f"{record['best']} {speeds[record['best']]:.2f}x",
            f"{record['ratio']:.3f}",
            f"{spread[0]:.2f}-{spread[2]:.2f}",
        )
    console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", help="MODEL/DTYPE/BATCH/DRAFTER")
    parser.add_argument("--all", action="store_true", help="every cell that has no file yet")
    parser.add_argument("--list", action="store_true", help="name the cells")
    parser.add_argument("--guard", type=int, help="time the guard at this batch")
    parser.add_argument("--dtype", default="float32", help="of --guard")
    parser.add_argument("--limit", type=float, default=80.0, help="seconds of computing per cell, about")
    given = parser.parse_args()
    console = Console(width=180)
    OUT.mkdir(parents=True, exist_ok=True)
    if given.list:
        console.print("\n".join(cell.name for cell in CELLS), highlight=False)
    if given.guard:
        record = guard(given.guard, given.dtype, console)
        (OUT / f"guard-{given.dtype}-{given.guard}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    for cell in CELLS:
        if cell.name == given.cell or (given.all and not cell.file.is_file()):
            cell.file.write_text(json.dumps(measured(cell, given.limit), indent=1), encoding="utf-8")
    show(console)


if __name__ == "__main__":
    main()
