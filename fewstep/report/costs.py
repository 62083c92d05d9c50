"""What a call costs on this machine: verification by tree size, proposals, memory traffic and its lower bound.

This file times contracts (`Target`, `Drafter`); it knows neither by name.
"""

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fewstep.core.draft import Drafter, Handle, Verdict
from fewstep.core.mixer import Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.prefill import placement, prefill, prompt_chain
from fewstep.decode.stream import Settings
from fewstep.models.weights import distinct
from fewstep.nn.packed import PackedModule

_LARGE = 1 << 28  # bytes: more than any cache holds
_WARMUP, _REPEATS = 3, 20
_COUNTED, _TIMED = 4, 24  # new tokens


@final
@dataclass(frozen=True, slots=True)
class DraftCost:
    """One proposal: median `seconds`, `bytes` of weights it reads, and both as shares of a target call on one token."""

    seconds: float
    bytes: int
    time_ratio: float
    byte_ratio: float


@final
@dataclass(frozen=True, slots=True)
class Machine:
    """What the target's calls cost here.

    `call_seconds[n]`: one call on a chain of n tokens, median. `weight_bytes`: what a call reads. `bandwidth`:
    bytes per second read from a buffer beyond the caches, and `cached_bandwidth` from one as large as the weights.
    """

    call_seconds: Mapping[int, float]
    weight_bytes: int
    bandwidth: float
    cached_bandwidth: float

    @property
    def verification(self) -> dict[int, float]:
        """v(n) / v(1)."""
        return {count: seconds / self.call_seconds[1] for count, seconds in self.call_seconds.items()}

    @property
    def bound_seconds(self) -> float:
        """The least seconds per plain token if every weight comes from memory; a model that stays in the caches may beat it."""
        return self.weight_bytes / self.bandwidth

    @property
    def cached_bound_seconds(self) -> float:
        """The same at the bandwidth of a buffer as large as the weights."""
        return self.weight_bytes / self.cached_bandwidth


def machine_costs(target: Target, prompt: Sequence[int], sizes: Sequence[int] = (1, 2, 4, 8, 16, 32)) -> Machine:
    """Measure the target's calls after `prompt`, and the memory. `sizes` holds 1."""
    calls = call_seconds(target, prompt, sizes)
    device = placement(target)[0]
    read = _call_bytes(target)
    return Machine(calls, read, read_bandwidth(_LARGE, device), read_bandwidth(read, device))


@torch.inference_mode()
def call_seconds(target: Target, prompt: Sequence[int], sizes: Sequence[int], batch: int = 1) -> dict[int, float]:
    """Median seconds of one call on chains of n tokens after `batch` times `prompt`, for each n of `sizes`, which take turns."""
    device, dtype = placement(target)
    chain = prompt_chain([prompt] * batch, device)
    state = prefill(target, chain, target.init_state(batch, len(prompt) + max(sizes), device=device, dtype=dtype)).state
    tokens = chain.tokens.repeat(1, 1 + max(sizes) // len(prompt))
    seconds: dict[int, list[float]] = {count: [] for count in sizes}
    for _ in range(_WARMUP + _REPEATS):
        for count in sizes:
            start = now(device)
            output = target.extend(Tree.chain(tokens[:, :count]), state)
            seconds[count].append(now(device) - start)
            state = output.state.rollback()
    return {count: median(times[_WARMUP:]) for count, times in seconds.items()}


def draft_cost(
    target: Target, drafter: Drafter[Any], prompts: Sequence[Sequence[int]], call: float, sampling: SamplingConfig
) -> DraftCost:
    """What one proposal of `drafter` costs while it decodes `prompts`; `call`: the seconds of a target call on one token."""
    device = placement(target)[0]
    read: list[int] = []
    seconds: list[float] = []
    counted, timed = _Watched(drafter, lambda: _counted(read)), _Watched(drafter, lambda: _timed(device, seconds))
    decode(target, counted, prompts[:1], Settings(_COUNTED), sampling=sampling)  # warms up, too
    for prompt in prompts:
        decode(target, timed, [prompt], Settings(_TIMED), sampling=sampling)
    nbytes = int(median(read))
    return DraftCost(median(seconds), nbytes, median(seconds) / call, nbytes / _call_bytes(target))


def read_bandwidth(nbytes: int, device: torch.device | str = "cpu") -> float:
    """Bytes per second that sums and matrix-vector products read from a buffer of `nbytes`: the best of a few runs."""
    width = 1024
    rows = max(1, nbytes // (4 * width))
    buffer, vector = torch.ones(rows, width, device=device), torch.ones(width, device=device)
    best = float("inf")
    for _ in range(4):
        for read in (buffer.sum, lambda: torch.mv(buffer, vector)):
            start = now(torch.device(device))
            read()
            best = min(best, now(torch.device(device)) - start)
    return buffer.nbytes / best


def now(device: torch.device) -> float:
    """The clock, after all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the weights of `module`, tied ones once."""
    return sum(tensor.nbytes for tensor in distinct(module.state_dict(keep_vars=True)).values())


@torch.inference_mode()
def _call_bytes(target: Target) -> int:
    device, dtype = placement(target)
    state = target.init_state(1, 1, device=device, dtype=dtype)
    read: list[int] = []
    with _counted(read):
        target.extend(Tree.chain(torch.zeros(1, 1, dtype=torch.int64, device=device)), state)
    return read[0]


@contextmanager
def _timed(device: torch.device, seconds: list[float]) -> Iterator[None]:
    start = now(device)
    yield
    seconds.append(now(device) - start)


@contextmanager
def _counted(read: list[int]) -> Iterator[None]:
    """Append the bytes of weights that modules read inside: an embedding's rows are too few to count."""
    total = [0]

    def count(module: nn.Module, arguments: object) -> None:
        if isinstance(module, PackedModule):
            total[0] += module.nbytes
        elif not isinstance(module, nn.Embedding):
            total[0] += sum(tensor.nbytes for tensor in module.parameters(recurse=False))

    hook = register_module_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()
    read.append(total[0])


@final
class _Watched:
    """A drafter whose proposals happen inside a context."""

    def __init__(self, drafter: Drafter[Any], around: Callable[[], Any]) -> None:
        self.taps, self.prompt_taps = drafter.taps, drafter.prompt_taps
        self._drafter, self._around = drafter, around

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> Any:
        return self._drafter.init(prompt, hidden, capacity)

    def propose(self, root: Tensor, state: Any, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, Any]:
        with self._around():
            return self._drafter.propose(root, state, handle, budget, rng)

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: Any) -> Any:
        return self._drafter.observe(tree, verdict, hidden, state)
