"""Times flash attention against PyTorch's math path where PyTorch's fused kernel does not serve: biases, packing, unequal widths.

    python benchmarks/attention.py [--threads 2] [--length 2048] [--heads 4] [--rounds 3] [--out runs/attention.json]

The math path is `scaled_dot_product_attention` under SDPBackend.MATH, told by a mask of numbers what to hide. Whatever makes that
mask from a bias by distance or from segments is part of its time, since it is part of what flash attention does without. "fused"
is the same function choosing for itself, with zeros where widths differ; "twin" is fewstep's own tile by tile form in PyTorch's
operators. Contestants take turns. Memory is what forward and backward add to the peak of a process of their own.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from fewstep.nn.flash import flash_attention, flash_tiles
from fewstep.nn.kernels.kernel import default_kernel

Attention = Callable[["Case", Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Case:
    """What is attended: a bias ("dense" [1,H,T,T], "distance" [H,2T-1] or none), a mask, packed sequences, widths."""

    name: str
    bias: str = ""
    causal: bool = False
    sequences: int = 1
    values: int = 64
    groups: int = 1  # query heads a key head
    learned: bool = False

    def segments(self, length: int) -> Tensor | None:
        return None if self.sequences == 1 else (torch.arange(length) * self.sequences // length).unsqueeze(0)


CASES = (
    Case("dense bias", bias="dense"),
    Case("dense bias, learned", bias="dense", learned=True),
    Case("dense bias, causal", bias="dense", causal=True),
    Case("bias by distance, learned, causal", bias="distance", causal=True, learned=True),
    Case("16 packed sequences, causal", causal=True, sequences=16),
    Case("4 packed sequences", sequences=4),
    Case("values of width 128, causal", causal=True, values=128),
    Case("values of width 32", values=32),
    Case("4 query heads a key head, dense bias", bias="dense", groups=4),
)


def flash(case: Case, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """What fewstep calls."""
    return flash_attention(q, k, v, bias, segments=case.segments(q.shape[2]), causal=case.causal)[0]


def twin(case: Case, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The same in PyTorch's operators."""
    segments = case.segments(q.shape[2])
    pair = None if segments is None else (segments, segments)
    return flash_tiles(q, k, v, bias, pair, case.causal, q.shape[3] ** -0.5)[0]


def math_path(case: Case, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's, all scores at once."""
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask_of(case, q, bias), enable_gqa=case.groups > 1)


def fused(case: Case, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's as it chooses itself: tile by tile, but for a learned bias; widths are made equal by zeros."""
    apart = k.shape[3] - v.shape[3]
    q, k, v = pad(q, (0, max(0, -apart))), pad(k, (0, max(0, -apart))), pad(v, (0, max(0, apart)))
    plain, scale = case.causal and bias is None and case.sequences == 1, 64**-0.5
    mask = None if plain else mask_of(case, q, bias)
    y = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=case.groups > 1)
    return y[..., : case.values]


def mask_of(case: Case, q: Tensor, bias: Tensor | None) -> Tensor | None:
    """What is added to the scores, all of it."""
    length, segments = q.shape[2], case.segments(q.shape[2])
    order = torch.arange(length)
    if bias is not None and bias.ndim == 2:
        bias = bias[:, order - order.unsqueeze(1) + length - 1].unsqueeze(0)
    hidden = order > order.unsqueeze(1) if case.causal else None
    if segments is not None:
        apart = segments.mT != segments
        hidden = apart if hidden is None else hidden | apart
    if hidden is not None:
        bias = (torch.zeros(length, length) if bias is None else bias).masked_fill(hidden, -torch.inf)
    return bias


CONTESTANTS: Mapping[str, Attention] = MappingProxyType({"fewstep": flash, "math": math_path, "fused": fused, "twin": twin})


def drawn(case: Case, length: int, heads: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the bias, if there is one; the gradient of what comes out."""
    shapes = [(1, heads, length, 64), (1, heads // case.groups, length, 64), (1, heads // case.groups, length, case.values)]
    shapes += {"dense": [(1, heads, length, length)], "distance": [(heads, 2 * length - 1)]}.get(case.bias, [])
    return [torch.randn(shape) for shape in shapes], torch.randn(1, heads, length, case.values)


def calls_of(case: Case, length: int, heads: int, attention: Attention) -> dict[str, Callable[[], object]]:
    """Forward alone, and forward with backward."""
    inputs, weight = drawn(case, length, heads)

    def forward() -> object:
        with torch.no_grad():
            return attention(case, *inputs[:3], inputs[3] if case.bias else None)

    def both() -> object:
        leaves = [x.detach().requires_grad_(i < 3 or case.learned) for i, x in enumerate(inputs)]
        y = attention(case, *leaves[:3], leaves[3] if case.bias else None)
        return torch.autograd.grad(y, [x for x in leaves if x.requires_grad], weight)

    return {"forward": forward, "both": both}


def timed(case: Case, length: int, heads: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of each pass of each contestant, which take turns. One thread is timed by its own processor time."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    calls = {name: calls_of(case, length, heads, attention) for name, attention in CONTESTANTS.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {pass_: [] for pass_ in passes} for name, passes in calls.items()}
    for turn in range(rounds + 1):  # the first warms up
        for name, passes in calls.items():
            for pass_, call in passes.items():
                start = clock()
                call()
                if turn:
                    seconds[name][pass_].append(clock() - start)
    return {
        name: {pass_: {"median": statistics.median(each), "best": min(each)} for pass_, each in passes.items()}
        for name, passes in seconds.items()
    }


def agreement(case: Case, length: int, heads: int) -> float:
    """The largest difference to the math path."""
    inputs, _ = drawn(case, length, heads)
    bias = inputs[3] if case.bias else None
    return float((flash(case, *inputs[:3], bias) - math_path(case, *inputs[:3], bias)).abs().max())


def peak(name: str, length: int, heads: int) -> float:
    """MiB that forward and backward with a learned bias by distance add to the peak of this process."""
    torch.set_num_threads(1)
    case = Case("", bias="distance", causal=True, learned=True)
    calls_of(case, 64, heads, CONTESTANTS[name])["both"]()
    call = calls_of(case, length, heads, CONTESTANTS[name])["both"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def peaks(length: int, heads: int) -> dict[str, dict[int, float]]:
    """At the length and at twice that, each in a process of its own."""
    found: dict[str, dict[int, float]] = {name: {} for name in CONTESTANTS}
    for name, by_length in found.items():
        for count in (length, 2 * length):
            with get_context("spawn").Pool(1) as pool:
                by_length[count] = pool.apply(peak, (name, count, heads))
    return found


def main() -> None:
    """Print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--out", type=Path, default=Path("runs/attention.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kernel = default_kernel()
    report: dict[str, Any] = {"path": "PyTorch" if kernel is None else kernel.path, "torch": torch.__version__}
    report |= {"threads": options.threads, "length": options.length, "heads": options.heads, "key width": 64}
    print(", ".join(f"{name} {value}" for name, value in report.items()))
    if options.memory:
        report["MiB"] = peaks(options.length, options.heads)
        for name, sizes in report["MiB"].items():
            print(f"{name:8}" + "".join(f"  {count} tokens: {size:7.1f} MiB" for count, size in sizes.items()))
    else:
        report["cases"] = race(options.length, options.heads, options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1))


def race(length: int, heads: int, rounds: int) -> list[dict[str, Any]]:
    """Every case, printed as it goes."""
    print("forward | forward and backward: median ms of fewstep, then times over it")
    records = []
    for case in CASES:
        difference, result = agreement(case, length, heads), timed(case, length, heads, rounds)
        line = f"{case.name:38}"
        for pass_ in ("forward", "both"):
            ours = result["fewstep"][pass_]["median"]
            others = (name for name in CONTESTANTS if name != "fewstep")
            ratios = "".join(f"  {name} {result[name][pass_]['median'] / ours:5.2f}x" for name in others)
            line += f" | {ours * 1e3:7.1f} ms{ratios}"
        print(line, flush=True)
        records.append({"case": case.name, "difference": difference, **result})
    return records


if __name__ == "__main__":
    main()
