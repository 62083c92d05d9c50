"""How long a user waits before anything happens: `import fewstep` beside `import torch`, and `fewstep --help`.

Fresh interpreters take turns, in another order each round, after one round that warms the disk cache and is not counted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "python": ("-c", "pass"),
    "import torch": ("-c", "import torch"),
    "import fewstep": ("-c", "import fewstep"),
    "import fewstep, torch": ("-c", "import fewstep, torch"),
    "fewstep.generate": ("-c", "import fewstep; fewstep.generate"),
    "fewstep --help": ("-m", "fewstep.cli", "--help"),
}
DIFFERENCES: Mapping[str, tuple[str, str]] = {
    "import fewstep, beside torch": ("import fewstep, torch", "import torch"),
    "fewstep.generate, beside torch": ("fewstep.generate", "import torch"),
}


def seconds(arguments: Sequence[str]) -> float:
    """The wall time of one fresh interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each command by round."""
    names = list(COMMANDS)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = seconds(COMMANDS[name])
            if turn:
                taken[name].append(elapsed)
    return taken


def summary(taken: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Median, least and most of each command, and of the differences within a round."""
    paired = {name: [a - b for a, b in zip(taken[one], taken[other], strict=True)] for name, (one, other) in DIFFERENCES.items()}
    return {
        name: {"median": statistics.median(values), "least": min(values), "most": max(values)}
        for name, values in {**taken, **paired}.items()
    }


def main() -> None:
    """Measure, print a table, and write the same numbers with every run's beside it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--out", type=Path, default=Path("runs/benchmarks/startup.json"))
    chosen = options.parse_args()
    taken = measure(chosen.rounds)
    rows = summary(taken)
    table = Table("seconds", *(next(iter(rows.values()))), title=f"Start-up, {chosen.rounds} rounds")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    Console().print(table)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps({"python": sys.version, "summary": rows, "seconds": taken}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
