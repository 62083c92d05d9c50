"""What a mixer's calls cost at a length, in seconds and bytes, beside softmax attention as plain PyTorch has it.

This file knows the contract of mixers and how layers take turns. Who races, and what becomes of the numbers, is in `mixers`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import log2
from types import MappingProxyType
from typing import Any, Literal, Protocol, Self, final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fewstep.core.mixer import Causal, Context, Full, Mixer, State
from fewstep.nn.recurrent import even_heads
from fewstep.report.contest import Spread
from fewstep.report.turns import clock

Work = Literal["forward", "training", "prefill", "decode"]

WORKS: Mapping[Work, str] = MappingProxyType(
    {
        "forward": "the parallel form over the whole sequence, without gradients",
        "training": "the same and its backward pass: gradients of the weights and of what came in",
        "prefill": "the whole sequence taken up into an empty state, and committed",
        "decode": "one more token after so many, committed",
    }
)
SOFTMAX, BOTH_WAYS = "softmax (PyTorch)", "softmax, both ways"  # whom mixers are held against, causal ones and others
_STEPS, _SHORT = 8, 1024  # decode steps of a turn; tokens of a turn of the other works, if the sequence is no longer


class Layer(Protocol):
    """A map over one row of tokens [1,T,D] in the forms that are timed. `causal`: tokens see none behind them."""

    @property
    def causal(self) -> bool: ...

    @property
    def weights(self) -> Sequence[Tensor]:
        """What it learns."""
        ...

    def whole(self, x: Tensor) -> Tensor:
        """The parallel form."""
        ...

    def prefill(self, x: Tensor, room: int) -> None:
        """Take up x [1,T,D] in place of what came before, with room for so many more. Raises ValueError if there is no state."""
        ...

    def step(self, x: Tensor) -> Tensor:
        """Take up one more token [1,1,D]."""
        ...

    def state_bytes(self, length: int) -> int:
        """Bytes of a state of that many tokens. Raises ValueError if there is none."""
        ...


@final
class Mixing:
    """A mixer by its contract. It runs causally if it can."""

    def __init__(self, mixer: Mixer, weights: Sequence[Tensor]) -> None:
        self._mixer, self.weights = mixer, weights
        self.causal = "causal" in mixer.modes
        self._mask = Causal() if self.causal else Full()
        self._one = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
        self._state: State | None = None

    def whole(self, x: Tensor) -> Tensor:
        return self._mixer.forward(x, Context(torch.arange(x.shape[1]).unsqueeze(0), mask=self._mask))[0]

    def prefill(self, x: Tensor, room: int) -> None:
        length = x.shape[1]
        _, state = self._mixer.extend(x, Context(), self._empty(length + room))
        self._state = state.commit(torch.arange(length).unsqueeze(0), torch.tensor([length]))

    def step(self, x: Tensor) -> Tensor:
        assert self._state is not None, "prefill comes first"
        y, state = self._mixer.extend(x, Context(), self._state)
        self._state = state.commit(*self._one)
        return y

    def state_bytes(self, length: int) -> int:
        return self._empty(length).nbytes()

    def _empty(self, capacity: int) -> State:
        return self._mixer.init_state(1, capacity, device="cpu", dtype=torch.float32)


@final
class Softmax(nn.Module):
    """Softmax attention between two projections, its cache a slice of a buffer: what everybody's seconds are held against."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        """Raises ValueError where the heads do not divide the width."""
        super().__init__()
        self.heads, self.head_width, self.causal = heads, even_heads(width, heads), causal
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self._cache, self._length = torch.zeros(2, 1, heads, 0, self.head_width), 0

    @property
    def weights(self) -> Sequence[Tensor]:
        return list(self.parameters())

    def whole(self, x: Tensor) -> Tensor:
        return self._joined(scaled_dot_product_attention(*self._split(x), is_causal=self.causal))

    def prefill(self, x: Tensor, room: int) -> None:
        self._cache, self._length = self._empty(x.shape[1] + room), 0
        q, k, v = self._append(x)
        self._joined(scaled_dot_product_attention(q, k, v, is_causal=True))

    def step(self, x: Tensor) -> Tensor:
        return self._joined(scaled_dot_product_attention(*self._append(x)))

    def state_bytes(self, length: int) -> int:
        return self._empty(length).nbytes

    def _empty(self, capacity: int) -> Tensor:
        if not self.causal:
            raise ValueError("softmax attention that looks both ways has no cached form")
        return torch.zeros(2, 1, self.heads, capacity, self.head_width)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _append(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries of x, and the keys and values of all tokens so far."""
        q, k, v = self._split(x)
        start, self._length = self._length, self._length + x.shape[1]
        for cache, new in zip(self._cache, (k, v), strict=True):
            cache[:, :, start : self._length] = new
        return q, self._cache[0][:, :, : self._length], self._cache[1][:, :, : self._length]

    def _joined(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """What one work of one mixer costs at one length: seconds a call in each round, and those of softmax attention in the same
    rounds; or the `reason` for which it was left out."""

    mixer: str
    work: Work
    length: int
    seconds: tuple[float, ...] = ()
    softmax_seconds: tuple[float, ...] = ()
    reason: str = ""

    @property
    def tokens(self) -> int:
        """Of a call."""
        return 1 if self.work == "decode" else self.length

    @property
    def median(self) -> float:
        """Seconds a call."""
        return Spread.of(self.seconds).median

    @property
    def speed_over_softmax(self) -> Spread | None:
        """How many times faster than softmax attention, round by round; None where that was left out."""
        ratios = [theirs / mine for mine, theirs in zip(self.seconds, self.softmax_seconds, strict=False)]
        return Spread.of(ratios) if ratios else None

    def numbers(self) -> dict[str, Any]:
        """Everything in JSON values."""
        place = {"mixer": self.mixer, "work": self.work, "length": self.length}
        if self.reason:
            return {**place, "reason": self.reason}
        speed = self.speed_over_softmax
        return {
            **place,
            "seconds": list(self.seconds),
            "softmax_seconds": list(self.softmax_seconds),
            "median_seconds": self.median,
            "tokens_per_second": asdict(Spread.of([self.tokens / seconds for seconds in self.seconds])),
            "speed_over_softmax": asdict(speed) if speed else None,
        }

    @classmethod
    def read(cls, numbers: Mapping[str, Any]) -> Self:
        """A cell from its `numbers`."""
        seconds, softmax = (tuple(numbers.get(key, ())) for key in ("seconds", "softmax_seconds"))
        return cls(numbers["mixer"], numbers["work"], numbers["length"], seconds, softmax, numbers.get("reason", ""))


def alternate(
    calls: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1, advance: Callable[[str], None] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds a call of each, in every round; all have been called before.

    They take turns of `repeats` calls and whoever starts changes each round, so that whatever else the machine does, it does to
    all. `advance` is called after each turn with its name.
    """
    names, device = list(calls), torch.device("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            start = clock(device)
            for _ in range(repeats):
                calls[name]()
            seconds[name].append((clock(device) - start) / repeats)
            advance(name)
    return seconds


def repeats(work: Work, length: int) -> int:
    """Calls of one turn: several where one is too short to be timed."""
    return _STEPS if work == "decode" else max(1, _SHORT // length)


def prepared(work: Work, layer: Layer, x: Tensor, rounds: int) -> Callable[[], object]:
    """The call of `work` over x [1,T,D], tried out. Raises ValueError, the layer's own, where it refuses."""
    quiet = torch.inference_mode()
    if work == "training":
        call: Callable[[], object] = partial(_graded, layer, x.detach().requires_grad_())
    elif work == "forward":
        call = partial(quiet(layer.whole), x)
    elif work == "prefill":
        call = partial(quiet(layer.prefill), x, 0)
    else:
        quiet(layer.prefill)(x, _STEPS * rounds + 1)
        call = partial(quiet(layer.step), x[:, :1])
    call()
    return call


def expected(known: Mapping[int, float], length: int) -> float:
    """Seconds a call at `length`, as the two longest of the `known` shorter lengths tell by a power law; 0 if there are none."""
    shorter = sorted(each for each in known if each < length)[-2:]
    if not shorter:
        return 0.0
    last, power = shorter[-1], 1.0
    if len(shorter) == 2:
        power = log2(known[last] / known[shorter[0]]) / log2(last / shorter[0])
    return known[last] * (length / last) ** min(2.0, max(0.0, power))


def _graded(layer: Layer, x: Tensor) -> None:
    y = layer.whole(x)
    torch.autograd.grad(y, (x, *layer.weights), torch.ones_like(y), allow_unused=True)
