"""Weights per second through the skinny matmul and through PyTorch's linear, by rows: `python benchmarks/kernels.py --threads 1`.

Calls alternate within one process, one matrix a sample, so that both meet the same machine. `large` walks 16 matrices of
2048 x 2048 that no cache holds; `nano` walks the layers of a ten-million-parameter decoder, many of which stay cached.
One thread is timed by its own processor time, which other work on the machine lengthens less than the wall clock.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.nn.kernels import linear, pack
from fewstep.nn.kernels.skinny import default_kernel

ROWS = (1, 2, 4, 6, 8, 16, 32)
MODELS = {
    "large": [(2048, 2048)] * 16,
    "nano": [(768, 256), (256, 256), (1376, 256), (256, 688), (384, 192), (192, 512)] * 8,  # (out, in)
}


def alternate(
    calls: dict[str, Iterator[Callable[[], Tensor]]], samples: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each sample, the contestants taking turns; each has its own walk over the weights."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, walk in calls.items():
            call = next(walk)
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


def race(shapes: list[tuple[int, int]], rows: int, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Median and best gigabytes of weights per second over whole walks of the model, and median microseconds per layer."""
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    packed = [pack(weight) for weight in weights]
    inputs = {width: torch.randn(rows, width).to(dtype) for _, width in shapes}
    calls = {
        "skinny": cycle([lambda p=p: linear(inputs[p.shape[1]], p) for p in packed]),
        "aten": cycle([lambda w=w: F.linear(inputs[w.shape[1]], w) for w in weights]),
    }
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    alternate(calls, len(shapes), clock)
    size, result = sum(weight.nbytes for weight in weights), {}
    for name, seconds in alternate(calls, rounds * len(shapes), clock).items():
        layers = [seconds[i :: len(shapes)] for i in range(len(shapes))]
        median, best = (sum(pick(layer) for layer in layers) for pick in (statistics.median, min))
        result[name] = {"median": size / median / 1e9, "best": size / best / 1e9, "microseconds": median / len(shapes) * 1e6}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/kernels.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kernel = default_kernel()
    path = "aten" if kernel is None else kernel.path
    print(f"path {path}, {options.threads} thread(s), torch {torch.__version__}; GB/s of weights: median (best), us per layer")
    print(
        f"{'model':6} {'dtype':9} {'rows':>4}  {'skinny':>14} {'us':>8} {'v(r)/v(1)':>9}  {'aten':>14} {'us':>8} {'v(r)/v(1)':>9}"
    )
    records = []
    with torch.no_grad():
        for model, shapes in MODELS.items():
            for dtype in (torch.bfloat16, torch.float32):
                first: dict[str, float] = {}
                for rows in ROWS:
                    result = race(shapes, rows, dtype, options.rounds)
                    line = f"{model:6} {str(dtype)[6:]:9} {rows:4}"
                    for name, r in result.items():
                        ratio = r["microseconds"] / first.setdefault(name, r["microseconds"])
                        line += f"  {r['median']:6.1f} ({r['best']:5.1f}) {r['microseconds']:8.1f} {ratio:9.2f}"
                    print(line, flush=True)
                    records.append(
                        {"model": model, "dtype": str(dtype), "rows": rows, "threads": options.threads, "path": path, **result}
                    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
