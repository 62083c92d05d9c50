"""What a solver costs beside the network, in microseconds a step: `python benchmarks/solvers.py`, on an idle machine.

The denoiser is free: it returns the same array at every call, and what calling it costs is taken off. `step` is the solver alone,
`loop` the whole of `decode.denoise.sample` with its check of every estimate; making the table of coefficients is told apart, per
run. Contestants take turns, and beside them stands `diffusers` where it is installed (extra `peers`), whose `scheduler.step` gets
the same arrays and whose setup is `set_timesteps`. Nothing is asserted.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep.core.process import Solver
from fewstep.core.random import CounterRng
from fewstep.decode.denoise import sample
from fewstep.diffusion.grids import KarrasConfig
from fewstep.diffusion.processes import EDMConfig
from fewstep.diffusion.solvers.heun import HeunConfig
from fewstep.diffusion.solvers.ode import DEISConfig, DPMSolverConfig
from fewstep.diffusion.solvers.sde import DDIMConfig
from fewstep.diffusion.solvers.unipc import UniPCConfig

Setup = Callable[[], Callable[[], object]]  # what is done once a run, and gives the run
SOLVERS: Mapping[str, Solver[Any]] = {
    "DDIM": DDIMConfig().build(),
    "2M": DPMSolverConfig().build(),
    "3M": DPMSolverConfig(terms=3).build(),
    "UniPC-2": UniPCConfig().build(),
    "DEIS-3": DEISConfig().build(),
    "Heun": HeunConfig().build(),
}
SCHEDULERS: Mapping[str, tuple[str, dict[str, object]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "2M": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "3M": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}),
    "UniPC-2": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "DEIS-3": ("DEISMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}),
}


def contestants(x: Tensor, steps: int) -> dict[tuple[str, str], Setup]:
    """By library and solver, and the denoiser alone."""
    made: dict[tuple[str, str], Setup] = {("denoiser", "free"): lambda: lambda: [_free(x, x) for _ in range(steps)]}
    for name, solver in SOLVERS.items():
        made["fewstep step", name] = _step(solver, x, steps)
        made["fewstep loop", name] = _loop(solver, x, steps)
    if importlib.util.find_spec("diffusers") is not None:
        made |= {("diffusers", name): _scheduler(*SCHEDULERS[name], x, steps) for name in SCHEDULERS}
    return made


def _free(x: Tensor, t: Tensor) -> Tensor:
    return x


def _step(solver: Solver[Any], x: Tensor, steps: int) -> Setup:
    process = EDMConfig()
    rng = CounterRng.seeded(range(len(x)))

    def setup() -> Callable[[], object]:
        first = solver.init(x, process, KarrasConfig().build(process, steps))

        def run() -> None:
            arrived, memory = x, first
            for i in range(steps):
                arrived, memory = solver.step(_same, arrived, i, memory, rng)

        return run

    def _same(_: Tensor, t: Tensor) -> Tensor:
        return x

    return setup


def _loop(solver: Solver[Any], x: Tensor, steps: int) -> Setup:
    process = EDMConfig()
    grid, rng = KarrasConfig().build(process, steps), CounterRng.seeded(range(len(x)))
    memory = solver.init(x, process, grid)

    def run() -> object:
        return sample(lambda _, t: x, process, _Ready(solver, memory), grid, x, rng)

    return lambda: run


class _Ready:
    """A solver whose table is made already."""

    def __init__(self, solver: Solver[Any], memory: Any) -> None:
        self.order, self.calls, self.stochastic, self.step = solver.order, solver.calls, solver.stochastic, solver.step
        self._memory = memory

    def init(self, x: Tensor, process: object, grid: Tensor) -> Any:
        return self._memory


def _scheduler(kind: str, options: dict[str, object], x: Tensor, steps: int) -> Setup:
    import diffusers

    scheduler = getattr(diffusers, kind)(prediction_type="sample", **options)

    def setup() -> Callable[[], object]:
        scheduler.set_timesteps(steps)

        def run() -> None:
            arrived = x
            for t in scheduler.timesteps:
                arrived = scheduler.step(x, t, arrived).prev_sample

        return run

    return setup


def race(setups: Mapping[tuple[str, str], Setup], rounds: int) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Seconds of every setup and run, in turn; a first round warms up."""
    seconds: dict[tuple[str, str], dict[str, list[float]]] = {key: {"setup": [], "run": []} for key in setups}
    for turn in range(rounds + 1):
        for key, setup in setups.items():
            begun = time.perf_counter()
            run = setup()
            ready = time.perf_counter()
            run()
            done = time.perf_counter()
            if turn:
                seconds[key]["setup"].append(ready - begun)
                seconds[key]["run"].append(done - ready)
    return seconds


@torch.no_grad()
def main(options: argparse.Namespace, console: Console) -> None:
    """All runs, the table, and every number in a file."""
    torch.set_num_threads(options.threads)
    x = torch.randn(options.rows, *options.shape)
    seconds = race(contestants(x, options.steps), options.rounds)
    own = min(seconds.pop(("denoiser", "free"))["run"])
    title = f"microseconds a step beside the network, x {list(x.shape)}, {options.steps} steps, {options.rounds} runs"
    table = Table("", "solver", "least", "quartiles", "setup, microseconds a run", title=title)
    record: list[dict[str, object]] = []
    for (library, name), taken in sorted(seconds.items(), key=lambda item: item[0][1]):
        calls = SOLVERS[name].calls if library.startswith("fewstep") else 1
        each = [1e6 * (run - calls * own) / options.steps for run in taken["run"]]
        low, middle, high = statistics.quantiles(each, n=4)
        setup = "" if library.endswith("loop") else f"{1e6 * min(taken['setup']):.0f}"
        table.add_row(library, name, f"{min(each):.1f}", f"{low:.1f} {middle:.1f} {high:.1f}", setup)
        record.append({"library": library, "solver": name, "least": min(each), "quartiles": [low, middle, high], "setup": setup})
    console.print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    setting = {"torch": torch.__version__, "threads": options.threads, "shape": list(x.shape), "steps": options.steps}
    options.out.write_text(json.dumps({**setting, "microseconds": record}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--shape", type=int, nargs="+", default=[2])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/solvers.json"))
    main(parser.parse_args(), Console())
