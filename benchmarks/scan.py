"""Times the selective scan and RWKV-4's mean, forward and backward, against loops over tokens and transformers; decode steps.

    python benchmarks/scan.py [--threads 1] [--length 2048] [--width 128] [--rounds 3] [--out runs/scan.json]

The reference is the loop over tokens of `selective_scan_ref` as its authors wrote it. Its backward fills a zero tensor of all
tokens for each token it took out, so its time grows with the square of the length; the same loop over tensors taken apart once
("loop, unbound") does not, and is the fairer measure of a loop. Contestants take turns; one slow turn each may be all there is.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.core.mixer import Context
from fewstep.nn.kernels import selective_scan, wkv, wkv_empty
from fewstep.nn.kernels.kernel import default_kernel
from fewstep.nn.kernels.scan import selective_blocks
from fewstep.nn.kernels.wkv import wkv_blocks
from fewstep.nn.mixers import MIXERS
from fewstep.nn.mixers.mamba import MambaConfig

RECURRENT = ("mamba", "mamba2", "lru", "s4d", "s4", "rwkv4", "rwkv6", "rwkv7", "retnet", "linear", "gated_deltanet")
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # u, delta [B,T,D], A [N,D], B, C [B,T,N] -> y


def ours(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """What the mixer calls."""
    return selective_scan(u, delta, a, b, c, u.new_zeros(u.shape[0], *a.shape))[0]


def twin(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Its PyTorch twin."""
    return selective_blocks(u, delta, a, b, c, u.new_zeros(u.shape[0], *a.shape), None)[0]


def reference(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba's `selective_scan_ref` for variable B and C: arXiv 2312.00752, algorithm 2, token by token."""
    decay = torch.exp(torch.einsum("bld,nd->bdln", delta, a))
    added = torch.einsum("bld,bln,bld->bdln", delta, b, u)
    x, outputs = u.new_zeros(u.shape[0], u.shape[2], a.shape[0]), []
    for i in range(u.shape[1]):
        x = decay[:, :, i] * x + added[:, :, i]
        outputs.append(torch.einsum("bdn,bn->bd", x, c[:, i]))
    return torch.stack(outputs, 1)


def unbound(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The same loop over tensors taken apart once."""
    decay = torch.exp(torch.einsum("bld,nd->lbdn", delta, a)).unbind(0)
    added = torch.einsum("bld,bln,bld->lbdn", delta, b, u).unbind(0)
    x, outputs = u.new_zeros(u.shape[0], u.shape[2], a.shape[0]), []
    for factor, summand, read in zip(decay, added, c.unbind(1), strict=True):
        x = factor * x + summand
        outputs.append(torch.einsum("bdn,bn->bd", x, read))
    return torch.stack(outputs, 1)


def theirs(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The scan of transformers' Mamba where its kernels are missing."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return mamba_selective_scan(*(x.mT for x in (u, delta, a, b, c))).mT


def chosen_clock() -> Callable[[], float]:
    """The thread's own processor time where there is one thread: other work lengthens it less than the wall clock."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def seconds_of(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median and least seconds of each call over `rounds` turns, one after another."""
    clock, taken = chosen_clock(), {name: list[float]() for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            taken[name].append(clock() - start)
    return {name: {"median": statistics.median(times), "best": min(times)} for name, times in taken.items()}


def race_scans(length: int, width: int, states: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of the scan alone, for one sequence."""
    inputs = (
        torch.randn(1, length, width),
        F.softplus(torch.randn(1, length, width) - 3),
        -torch.arange(1.0, states + 1).unsqueeze(1).repeat(1, width),
        torch.randn(1, length, states),
        torch.randn(1, length, states),
    )
    weight = torch.randn(1, length, width)

    def call(scan: Scan) -> Callable[[], object]:
        def run() -> object:
            leaves = [x.clone().requires_grad_() for x in inputs]
            return torch.autograd.grad((scan(*leaves) * weight).sum(), leaves)

        return run

    contestants: dict[str, Scan] = {"fewstep": ours, "fewstep, PyTorch": twin, "loop, unbound": unbound, "reference": reference}
    contestants["transformers"] = theirs
    expected = reference(*inputs)
    for name, scan in contestants.items():
        torch.testing.assert_close(scan(*inputs), expected, rtol=1e-3, atol=1e-4, msg=lambda told, name=name: f"{name}: {told}")
    quick = {name: call(contestants[name]) for name in ("fewstep", "fewstep, PyTorch", "loop, unbound")}
    slow = {name: call(contestants[name]) for name in ("reference", "transformers")}
    seconds_of(quick, 1)
    return seconds_of(quick, 3 * rounds) | seconds_of(slow, rounds)


def race_means(length: int, width: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of RWKV-4's weighted mean, for one sequence: the kernel, its twin and the loop over tokens."""
    inputs = (*torch.randn(2, 1, length, width).unbind(), 0.1 + torch.rand(width), torch.randn(width))
    weight = torch.randn(1, length, width)

    def loop(k: Tensor, v: Tensor, fading: Tensor, bonus: Tensor) -> Tensor:
        above, below, most = wkv_empty(1, width, k)
        outputs = []
        for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
            top = torch.maximum(most, bonus + key)
            past, own = (most - top).exp(), (bonus + key - top).exp()
            outputs.append((past * above + own * value) / (past * below + own))
            top = torch.maximum(most - fading, key)
            past, own = (most - fading - top).exp(), (key - top).exp()
            above, below, most = past * above + own * value, past * below + own, top
        return torch.stack(outputs, 1)

    def call(mean: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> object:
            leaves = [x.clone().requires_grad_() for x in inputs]
            return torch.autograd.grad((mean(*leaves) * weight).sum(), leaves)

        return run

    contestants: dict[str, Callable[..., Tensor]] = {
        "fewstep": lambda *x: wkv(*x, wkv_empty(1, width, x[0]))[0],
        "fewstep, PyTorch": lambda *x: wkv_blocks(*x, wkv_empty(1, width, x[0]), None)[0],
        "loop": loop,
    }
    expected = loop(*inputs)
    for mean in contestants.values():
        torch.testing.assert_close(mean(*inputs), expected, rtol=1e-3, atol=1e-4)
    calls = {name: call(mean) for name, mean in contestants.items()}
    seconds_of(calls, 1)
    return seconds_of(calls, rounds)


def race_mixers(length: int, width: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of the whole mixer, for one sequence, beside that of transformers with its slow path."""
    from transformers import MambaConfig as TheirConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mine = MambaConfig().build(width=width, heads=1)
    other = MambaMixer(TheirConfig(hidden_size=width, num_hidden_layers=1), 0)
    x, positions = torch.randn(1, length, width), torch.arange(length).unsqueeze(0)

    def call(module: torch.nn.Module, *rest: object) -> Callable[[], object]:
        def run() -> object:
            y = module(x, *rest)
            return torch.autograd.grad((y[0] if isinstance(y, tuple) else y).square().sum(), list(module.parameters()))

        return run

    calls = {"fewstep": call(mine, Context(positions)), "transformers": call(other)}
    seconds_of({"fewstep": calls["fewstep"]}, 1)
    return seconds_of(calls, rounds)


def decode_steps(width: int, lengths: tuple[int, ...] = (128, 1024, 8192)) -> dict[str, dict[int, float]]:
    """Median microseconds of a decode step, one token in and committed, behind so many tokens."""
    found: dict[str, dict[int, float]] = {}
    for kind in (*RECURRENT, "attention"):  # attention, whose steps grow, is there to compare
        found[kind] = {}
        module = MIXERS[kind]().build(width=width, heads=4)
        path, keep = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
        for length in lengths:
            with torch.inference_mode():
                state = module.init_state(1, length + 64, device="cpu", dtype=torch.float32)
                _, state = module.extend(torch.randn(1, length, width), Context(), state)
                state = state.commit(torch.arange(length).unsqueeze(0), keep * length)
                clock, times = chosen_clock(), []
                for _ in range(40):
                    start = clock()
                    _, state = module.extend(torch.randn(1, 1, width), Context(), state)
                    state = state.commit(path, keep)
                    times.append(clock() - start)
                found[kind][length] = statistics.median(times) * 1e6
    return found


def main() -> None:
    """Print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/scan.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kernel = default_kernel()
    path = "PyTorch" if kernel is None else kernel.path
    print(f"path {path}, {options.threads} thread(s), length {options.length}, width {options.width}, torch {torch.__version__}")
    report: dict[str, Any] = {"path": path, "threads": options.threads, "length": options.length, "width": options.width}
    report["decode step, us"] = decode_steps(options.width)
    for name, times in report["decode step, us"].items():
        print(
            f"decode step {name:10}" + "".join(f"  {length:5} tokens: {us:7.0f} us" for length, us in times.items()), flush=True
        )
    races = {
        "wkv": lambda: race_means(options.length, 6 * options.width, options.rounds),
        "scan": lambda: race_scans(options.length, options.width, options.states, options.rounds),
        "mixer": lambda: race_mixers(options.length, options.width, options.rounds),
    }
    for title, run in races.items():
        report[title] = run()
        for name, taken in report[title].items():
            ratio = taken["median"] / report[title]["fewstep"]["median"]
            print(
                f"{title:6} {name:18} {taken['median'] * 1e3:10.1f} ms (best {taken['best'] * 1e3:.1f})  {ratio:7.1f}x",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
