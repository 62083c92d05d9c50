"""Times the Triton kernels on a CUDA device: attention beside PyTorch's, linear attention and the selective scan in tokens/s.

    python benchmarks/gpu.py [--lengths 4096 8192 16384] [--rounds 20] [--out runs/gpu.json]

Attention: bfloat16, heads of 128, 16 of them, 16384 tokens a call whatever the length, against the backends of
`scaled_dot_product_attention`. Linear attention with one decay a head: bfloat16, heads of 128, beside flash-linear-attention's
kernel where that is installed. Scan: float32, 2048 channels of 16 states. Contestants take turns; seconds are the device's own,
median and best of the rounds, after a call each to compile and to choose tiles. Without such a device nothing is measured.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fewstep.nn.triton import Kernels, load

HEADS, WIDTH, TOKENS = 16, 128, 16384  # of a call
CHANNELS, STATES = 2048, 16
BACKENDS = (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION))

Pass = Callable[[], Tensor]


def seconds_of(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median and best seconds of each, the contestants taking turns, caches emptied between them."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    flushed = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            taken[name].append(begin.elapsed_time(end) / 1e3)
    return {name: {"median": statistics.median(times), "best": min(times)} for name, times in taken.items()}


def both_ways(run: Pass, leaves: list[Tensor]) -> Callable[[], object]:
    """Forward and backward from a gradient that is made once."""
    weight = torch.randn_like(run())
    return lambda: torch.autograd.grad(run(), leaves, weight)


def runs_here(run: Callable[[], object]) -> bool:
    """Whether a contestant takes these shapes on this device."""
    try:
        run()
    except RuntimeError as error:
        print(f"  left out: {str(error).splitlines()[0]}")
        return False
    return True


def attention(kernels: Kernels, length: int, causal: bool) -> tuple[dict[str, Pass], list[Tensor]]:
    """The flash kernel and what PyTorch has here."""
    shape = (max(1, TOKENS // length), HEADS, length, WIDTH)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def theirs(backend: SDPBackend) -> Pass:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal)

        return run

    others = {name: theirs(backend) for name, backend in BACKENDS}
    runs: dict[str, Pass] = {"fewstep": lambda: kernels.flash_attention(q, k, v, causal=causal)[0]}
    return {**runs, **{name: run for name, run in others.items() if runs_here(run)}}, [q, k, v]


def race_attention(kernels: Kernels, lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Every length, causal and not, forward and both ways."""
    print(f"attention, bfloat16, {HEADS} heads of {WIDTH}, {TOKENS} tokens: ms, median (best); speed over the best other")
    records = []
    for length, causal in product(lengths, (False, True)):
        runs, leaves = attention(kernels, length, causal)
        work = 4 * leaves[0].numel() * length * (0.5 if causal else 1.0)
        for title, factor in (("forward", 1.0), ("both ways", 3.5)):
            calls = {name: run if title == "forward" else both_ways(run, leaves) for name, run in runs.items()}
            taken = seconds_of(calls, rounds)
            label = f"{length:6} {'causal' if causal else 'full':6} {title:9}"
            tell(label, taken, lambda s, w=work * factor: f"{w / s / 1e12:6.0f} TFLOP/s")
            records.append({"length": length, "causal": causal, "pass": title, "seconds": taken})
    return records


def race_recurrences(kernels: Kernels, lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Linear attention and the selective scan, tokens a second."""
    print(
        f"one decay a head, bfloat16, {HEADS} heads of {WIDTH}; selective scan, float32, {CHANNELS} channels of {STATES} states"
    )
    records = []
    for length in lengths:
        batch = max(1, TOKENS // length)
        for kind, make in (("linear attention", linear_attention), ("selective scan", selective_scan)):
            runs, leaves = make(kernels, batch, length)
            for title in ("forward", "both ways"):
                calls = {name: run if title == "forward" else both_ways(run, leaves) for name, run in runs.items()}
                taken = seconds_of(calls, rounds)
                tell(f"{length:6} {kind:16} {title:9}", taken, lambda s, n=batch * length: f"{n / s / 1e6:8.2f} M tokens/s")
                records.append({"length": length, "kernel": kind, "pass": title, "tokens": batch * length, "seconds": taken})
    return records


def linear_attention(kernels: Kernels, batch: int, length: int) -> tuple[dict[str, Pass], list[Tensor]]:
    """The chunkwise kernel and, where it is installed, flash-linear-attention's."""
    q, k, v = torch.randn(3, batch, length, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16).unbind(0)
    log_a = -0.1 * torch.rand(batch, length, HEADS, device="cuda")
    leaves = [x.clone().requires_grad_() for x in (q * WIDTH**-0.5, k, v, log_a)]
    start = torch.zeros(batch, HEADS, WIDTH, WIDTH, device="cuda")
    runs: dict[str, Pass] = {"fewstep": lambda: kernels.sweep(*leaves, start)[0]}
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return runs, leaves
    runs["fla"] = lambda: chunk_simple_gla(*leaves, scale=1.0)[0]
    return runs, leaves


def selective_scan(kernels: Kernels, batch: int, length: int) -> tuple[dict[str, Pass], list[Tensor]]:
    """The kernel alone."""
    u, delta = torch.randn(batch, length, CHANNELS, device="cuda"), 0.1 * torch.rand(batch, length, CHANNELS, device="cuda")
    a = -torch.arange(1.0, STATES + 1, device="cuda").unsqueeze(1).repeat(1, CHANNELS)
    b, c = torch.randn(2, batch, length, STATES, device="cuda").unbind(0)
    leaves = [x.clone().requires_grad_() for x in (u, delta, a, b, c)]
    start = torch.zeros(batch, STATES, CHANNELS, device="cuda")
    return {"fewstep": lambda: kernels.selective_scan(*leaves, start)[0]}, leaves


def tell(label: str, taken: dict[str, dict[str, float]], rate: Callable[[float], str]) -> None:
    """A line a contestant; ours is given its speed over the best of the others."""
    others = [seconds["median"] for name, seconds in taken.items() if name != "fewstep"]
    for name, seconds in taken.items():
        beside = f"  {min(others) / seconds['median']:5.2f}x" if name == "fewstep" and others else ""
        print(
            f"  {label} {name:8} {seconds['median'] * 1e3:8.3f} ({seconds['best'] * 1e3:8.3f}) {rate(seconds['median'])}{beside}",
            flush=True,
        )


def main() -> None:
    """Print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    options = parser.parse_args()
    kernels = load() if torch.cuda.is_available() else None
    if kernels is None:
        print("not measured: no CUDA device, or no Triton kernels on it")
        return
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    report["attention"] = race_attention(kernels, options.lengths, options.rounds)
    report["recurrences"] = race_recurrences(kernels, options.lengths, options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
