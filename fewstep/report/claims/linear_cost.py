"""Linear attention's cost against the length, and the length from which it is cheaper than softmax attention.

Multiply-adds are counted; seconds are this machine's: a forward and a backward pass of one layer over one sequence, the mixers by
turns. PyTorch's fused kernel skips what the causal mask hides, and is counted so.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fewstep.core.mixer import Context
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.mixers.linear import LinearConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.counts import multiply_adds

_WIDTH, _HEADS = 256, 4
_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
_MIDDLE, _LONG = 1024, 2048
_PAPER = "arXiv 2006.16236"

LINEAR = Criterion(
    "multiply-adds-are-linear",
    "multiply-adds a token for 8192 tokens over those for 1024",
    f"{_PAPER}, section 3.2; the threshold is fewstep's own, for the last chunk has no state to hand on",
    "at most",
    1.1,
)
COUNTED = Criterion(
    "fewer-at-1024",
    "multiply-adds of softmax attention over its own for 1024 tokens, causal, heads of 64 channels",
    f"{_PAPER}, section 3.2: fewer where the length exceeds the width; the length is fewstep's own",
    "at least",
    1.0,
)
STATE = Criterion(
    "state-is-constant",
    "bytes of the state after 1024 tokens over those after 128",
    f"{_PAPER}, section 3.4",
    "at most",
    1.0,
)
FASTER = Criterion(
    "faster-at-2048",
    "seconds of softmax attention over its own, a training step of one layer over 2048 tokens",
    f"{_PAPER}, figure 1; the length is fewstep's own",
    "at least",
    1.0,
)
MUCH_FASTER = Criterion(
    "faster-at-8192",
    "seconds of softmax attention over its own, a training step of one layer over 8192 tokens",
    f"{_PAPER}, figure 1; the threshold is fewstep's own",
    "at least",
    3.0,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.effort.seed)
        linear, softmax = (config.build(width=_WIDTH, heads=_HEADS) for config in (LinearConfig(), AttentionConfig()))
    counts = {length: [_counted(mixer, length) for mixer in (linear, softmax)] for length in _LENGTHS}
    how = f"one layer of width {_WIDTH}, {_HEADS} heads, projections included"
    middle, longest = counts[_MIDDLE], counts[_LENGTHS[-1]]
    growth, other = (many / few * _MIDDLE / _LENGTHS[-1] for few, many in zip(middle, longest, strict=True))
    yield Finding(LINEAR, growth, f"{how}; softmax attention: {other:.2g}", _named(counts))
    yield Finding(COUNTED, middle[1] / middle[0], f"{how}; {_crossing(counts)}", _named(counts))
    sizes = {length: [bytes_of_state(mixer, length) for mixer in (linear, softmax)] for length in (_LENGTHS[0], _MIDDLE)}
    small, large = sizes.values()
    told = (
        f"{large[0]} bytes in float32; softmax attention: {large[1]}, {large[1] / small[1]:.2g} times those after {_LENGTHS[0]}"
    )
    yield Finding(STATE, large[0] / small[0], told, _named(sizes))
    seconds = {length: timed([_step(mixer, length) for mixer in (linear, softmax)], bench.effort.rounds) for length in _LENGTHS}
    how = f"{how}; medians of {bench.effort.rounds} by turns, {torch.get_num_threads()} threads"
    for criterion, length in ((FASTER, _LONG), (MUCH_FASTER, _LENGTHS[-1])):
        fast, slow = seconds[length]
        told = f"{fast:.3g} s for {slow:.3g} s; {_crossing(seconds)}; {how}"
        yield Finding(criterion, slow / fast, told, _named(seconds))


def crossover(costs: Mapping[int, list[Any]]) -> float | None:
    """The length from which on the first of two costs, by length, is the smaller: between two lengths by a straight line of
    the costs a token; the shortest length if it always is, None if it is not at the longest."""
    lengths = sorted(costs)
    ahead = [(costs[length][1] - costs[length][0]) / length for length in lengths]
    if ahead[-1] <= 0:
        return None
    behind = max((i for i, gain in enumerate(ahead) if gain <= 0), default=None)
    if behind is None:
        return float(lengths[0])
    share = -ahead[behind] / (ahead[behind + 1] - ahead[behind])
    return lengths[behind] + share * (lengths[behind + 1] - lengths[behind])


def _crossing(costs: Mapping[int, list[Any]]) -> str:
    length = crossover(costs)
    return f"no crossover up to {max(costs)} tokens" if length is None else f"crossover at {length:.0f} tokens"


def timed(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """The median seconds of each of `calls` over `rounds` by turns, after one that is not counted."""
    spent: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, times in zip(calls, spent, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in spent]


def _step(mixer: Any, length: int) -> Callable[[], object]:
    """A forward and a backward pass over one sequence."""
    x, positions = torch.randn(1, length, _WIDTH, requires_grad=True), torch.arange(length).unsqueeze(0)
    wanted = [x, *mixer.parameters()]
    return lambda: torch.autograd.grad(mixer(x, Context(positions))[0].sum(), wanted)


def _counted(mixer: Any, length: int) -> int:
    """Multiply-adds of a forward pass."""
    x, positions = torch.randn(1, length, _WIDTH), torch.arange(length).unsqueeze(0)
    with torch.no_grad():
        return multiply_adds(lambda: mixer(x, Context(positions)))


@torch.no_grad()
def bytes_of_state(mixer: Any, length: int) -> int:
    """What is kept of so many tokens once they are read and committed."""
    state = mixer.init_state(1, length, device="cpu", dtype=torch.float32)
    _, state = mixer.extend(torch.randn(1, length, _WIDTH), Context(), state)
    state = state.commit(torch.arange(length).unsqueeze(0), torch.tensor([length]))
    return int(state.nbytes())


def _named(costs: Mapping[int, list[Any]]) -> dict[str, Any]:
    return {f"{length} tokens": dict(zip(("linear", "softmax"), pair, strict=True)) for length, pair in costs.items()}


CLAIM = Claim(
    "linear-cost",
    f"Katharopoulos et al. 2020, Transformers are RNNs, {_PAPER}",
    "A token costs linear attention the same however many there are, so that it is cheaper than softmax attention of long texts.",
    (LINEAR, COUNTED, STATE, FASTER, MUCH_FASTER),
    measure,
)
