"""The kernels against PyTorch's operators on this machine: `python benchmarks/kernels.py --threads 1`.

Calls alternate within one process, one layer a sample, so that both meet the same machine. Linear layers: `large` walks 16
matrices of 2048 x 2048 that no cache holds; `nano` walks the layers of a ten-million-parameter decoder, many of which stay
cached. Attention: new nodes that see all of a cache and, among themselves, their past.
One thread is timed by its own processor time, which other work on the machine lengthens less than the wall clock.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.nn.kernels import attend, linear, pack
from fewstep.nn.kernels.kernel import default_kernel

ROWS = (1, 2, 4, 6, 8, 16, 32)
MODELS = MappingProxyType(
    {
        "large": ((2048, 2048),) * 16,
        "nano": ((768, 256), (256, 256), (1376, 256), (256, 688), (384, 192), (192, 512)) * 8,  # (out, in)
    }
)
CACHES = ((4, 4, 64, 512), (6, 2, 64, 512), (16, 8, 64, 2048))  # query heads, key-value heads, head width, keys


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


def race(shapes: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Median and best gigabytes of weights per second over whole walks of the model, and median microseconds per layer."""
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    packed = [pack(weight) for weight in weights]
    inputs = {width: torch.randn(rows, width).to(dtype) for _, width in shapes}
    calls = {
        "fewstep": cycle([lambda p=p: linear(inputs[p.shape[1]], p) for p in packed]),
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


def attention_race(cache: tuple[int, int, int, int], rows: int, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Median and best microseconds of one layer's attention, eight layers deep."""
    heads, kv_heads, width, keys = cache
    layers = [torch.randn(1, 2 * kv_heads, keys, width).to(dtype).split(kv_heads, 1) for _ in range(8)]
    q = torch.randn(1, rows, heads, width).to(dtype).transpose(1, 2)
    visible = torch.ones(1, 1, rows, keys, dtype=torch.bool).tril(keys - rows)
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
    grouped = heads != kv_heads
    calls = {
        "fewstep": cycle([lambda k=k, v=v: attend(q, k, v, visible) for k, v in layers]),
        "aten": cycle([lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=grouped) for k, v in layers]),
    }
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    alternate(calls, len(layers), clock)
    timed = alternate(calls, rounds * len(layers), clock)
    return {name: {"median": statistics.median(s) * 1e6, "best": min(s) * 1e6} for name, s in timed.items()}


def race_linears(rounds: int) -> list[dict[str, object]]:
    """Every model, row count and dtype of the linear race, printed as it goes."""
    print("linear layers: GB/s of weights, median (best); us per layer; v(rows) / v(1)")
    print(f"{'model':6} {'dtype':9} {'rows':>4}  {'fewstep':>14} {'us':>8} {'ratio':>6}  {'aten':>14} {'us':>8} {'ratio':>6}")
    records: list[dict[str, object]] = []
    for model, shapes in MODELS.items():
        for dtype in (torch.bfloat16, torch.float32):
            first: dict[str, float] = {}
            for rows in ROWS:
                result = race(shapes, rows, dtype, rounds)
                line = f"{model:6} {str(dtype)[6:]:9} {rows:4}"
                for name, r in result.items():
                    ratio = r["microseconds"] / first.setdefault(name, r["microseconds"])
                    line += f"  {r['median']:6.1f} ({r['best']:5.1f}) {r['microseconds']:8.1f} {ratio:6.2f}"
                print(line, flush=True)
                records.append({"model": model, "dtype": str(dtype), "rows": rows, **result})
    return records


def race_attention(rounds: int) -> list[dict[str, object]]:
    """Every cache, row count and dtype of the attention race, printed as it goes."""
    print("attention of one layer: us, median (best); v(nodes) / v(1)")
    print(
        f"{'heads':8} {'width':>5} {'keys':>5} {'dtype':9} {'nodes':>5}  {'fewstep':>18} {'ratio':>6}  {'aten':>18} {'ratio':>6}"
    )
    records: list[dict[str, object]] = []
    for cache in CACHES:
        for dtype in (torch.bfloat16, torch.float32):
            first: dict[str, float] = {}
            for rows in ROWS[:-1]:
                result = attention_race(cache, rows, dtype, rounds)
                line = f"{cache[0]:3} / {cache[1]:2} {cache[2]:5} {cache[3]:5} {str(dtype)[6:]:9} {rows:5}"
                for name, r in result.items():
                    line += f"  {r['median']:8.1f} ({r['best']:7.1f}) {r['median'] / first.setdefault(name, r['median']):6.2f}"
                print(line, flush=True)
                records.append({"cache": cache, "dtype": str(dtype), "nodes": rows, **result})
    return records


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/kernels.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kernel = default_kernel()
    path = "aten" if kernel is None else kernel.path
    print(f"path {path}, {options.threads} thread(s), torch {torch.__version__}")
    with torch.no_grad():
        linears, attention = race_linears(options.rounds), race_attention(options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"path": path, "threads": options.threads, "torch": torch.__version__, "linear": linears, "attention": attention}
    options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
