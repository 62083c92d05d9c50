"""What whole steps of decoding cost on this machine: by the nodes they verify, and by what is drafted for them.

Everything is measured through the loop itself, in turn with plain steps, and given in plain steps, since the speed of a machine
that others use wanders. This file knows drafters by their contract.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import mean
from typing import Any, final

import torch
from torch import Tensor

from fewstep.core.draft import Drafter, Handle, Verdict
from fewstep.core.event import Event
from fewstep.core.mixer import Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.silent import Nothing, Silent
from fewstep.decode.generate import requests
from fewstep.decode.guard import Prices, interpolated
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.prefill import placement
from fewstep.decode.stream import Settings, Step
from fewstep.report.shapes import Shape
from fewstep.report.turns import Turn, in_turn, undisturbed

_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
_ROUNDS, _LEAST = 16, 2  # steps of each size, and those taken in any case


@final
@dataclass(frozen=True, slots=True)
class Work:
    """What is decoded while it is timed: `prompts`, `batch` at a time, by `tokens` each, in trees of `nodes` nodes at most."""

    target: Target
    prompts: Sequence[Sequence[int]]
    batch: int
    tokens: int
    nodes: int
    sampling: SamplingConfig

    @property
    def batches(self) -> list[Sequence[Sequence[int]]]:
        """Whole ones only."""
        starts = range(0, len(self.prompts) - self.batch + 1, self.batch)
        return [self.prompts[start : start + self.batch] for start in starts]

    @property
    def device(self) -> torch.device:
        return placement(self.target)[0]

    def stream(self, drafter: Drafter[Any], batch: Sequence[Sequence[int]], tokens: int | None = None) -> Iterator[Event[Step]]:
        """The loop on one batch."""
        settings = Settings(self.tokens if tokens is None else tokens, budget=self.nodes)
        return requests(self.target, drafter, batch, settings, sampling=self.sampling, seed=range(len(batch)))


@final
@dataclass(frozen=True, slots=True)
class Curve:
    """A plain step takes `plain` seconds, one with n nodes that cost nothing to draft `steps[n]` times as long."""

    plain: float
    steps: Mapping[int, float]


@final
@dataclass(frozen=True, slots=True)
class Costs:
    """In plain steps: the `curve`; what drafting adds, `drafts[d][n]` for trees of depth d and n nodes; what drafting adds to
    prompt and first step, `start[d]`, spread over `horizon` tokens; and what each token takes that a drafter is shown late,
    `read`."""

    curve: Curve
    drafts: Mapping[int, Mapping[int, float]]
    start: Mapping[int, float]
    horizon: int
    read: float = 0.0

    def draft(self, shape: Shape) -> float:
        """What drafting adds to a step."""
        widths = {depth: interpolated(known, shape.nodes) for depth, known in self.drafts.items()}
        return max(0.0, interpolated(widths, shape.depth))

    def speed(self, shape: Shape, tokens: float, sizes: Mapping[int, float]) -> float:
        """How many times faster than plain decoding: steps that emit `tokens` each and verify n nodes in a share `sizes[n]`."""
        step = self.draft(shape) + sum(share * interpolated(self.curve.steps, nodes) for nodes, share in sizes.items())
        return 1 / (step / tokens + max(0.0, interpolated(self.start, shape.depth)) / self.horizon)

    def prices(self, shape: Shape) -> Prices:
        """What a guard has to know."""
        return Prices(self.curve.steps, self.draft(shape), self.read)


def measured_curve(work: Work, seconds: float) -> Curve:
    """Time steps of every size in turn, on the first batch, for about `seconds` at most."""
    sizes = [size for size in _SIZES if size <= work.nodes]
    batch = work.batches[0]
    tokens = min(_ROUNDS * len(sizes) + work.nodes, (work.target.max_positions or 1 << 62) - max(map(len, batch)))
    times: dict[int, list[float]] = {size: [] for size in sizes}
    stream = work.stream(_Chains(sizes), batch, tokens)
    for turn in in_turn([stream], work.device, seconds, least=_LEAST * len(sizes)):
        size = int(turn.step.nodes.max())
        if size in times and len(turn.step.rows) == len(batch):
            times[size].append(turn.seconds)
    known = {size: undisturbed(spent) for size, spent in times.items() if spent}
    return Curve(known[1], {size: spent / known[1] for size, spent in known.items()})


def measured_costs(work: Work, drafters: Mapping[Shape, Drafter[Any]], curve: Curve, seconds: float) -> Costs:
    """Time steps with each of `drafters` in turn with plain ones, batch by batch, for about `seconds` at most."""
    entrants = [Silent(), *drafters.values()]
    later: list[list[tuple[int, float]]] = [[] for _ in entrants]  # nodes and seconds of every step but the first
    begun: list[list[float]] = [[] for _ in entrants]  # the prompt and the first step
    share = seconds / len(work.batches)
    spent = 0.0
    for batch in work.batches:
        if spent > seconds:
            break
        steps = [0] * len(entrants)
        for turn in in_turn([work.stream(one, batch) for one in entrants], work.device, share):
            spent += turn.seconds
            if not turn.step.calls:
                begun[turn.who].append(turn.seconds)
            elif steps[turn.who] == 0:
                begun[turn.who][-1] += turn.seconds
            elif len(turn.step.rows) == len(batch):
                later[turn.who].append((int(turn.step.nodes.max()), turn.seconds))
            steps[turn.who] += bool(turn.step.calls)
    plain = undisturbed([seconds for _, seconds in later[0]])
    drafts: dict[int, dict[int, float]] = {}
    start: dict[int, float] = {}
    first = [undisturbed(one) / plain for one in begun]
    for shape, steps_of, prompt in zip(drafters, later[1:], first[1:], strict=True):
        # where the texts ended with their first step, that one stands for the others
        known = steps_of or [(shape.nodes, (prompt - first[0] + 1) * plain)]
        beyond = undisturbed([seconds / plain - interpolated(curve.steps, nodes) for nodes, seconds in known])
        drafts.setdefault(shape.depth, {})[shape.nodes] = beyond
        whole = beyond + interpolated(curve.steps, shape.nodes)
        start[shape.depth] = max(0.0, min(start.get(shape.depth, 1e9), prompt - first[0] + 1 - whole))
    length = mean(len(prompt) for prompt in work.prompts)
    return Costs(curve, drafts, start, work.tokens, max(start.values()) / length)


@final
@dataclass(frozen=True, slots=True)
class Timing:
    """How long `tokens` tokens took after their prompts, in `steps` steps of single rows: `best` seconds per token, of every step
    the fastest of all rounds, and the seconds per token of each lap, `laps`."""

    best: float
    tokens: int
    steps: int
    laps: tuple[float, ...]


def raced(work: Work, drafters: Sequence[Drafter[Any]], rounds: int, seconds: float) -> list[Timing]:
    """Time `drafters` in turn on all batches, `rounds` times or for about `seconds`; every round does the same.

    The evaluation of the prompt counts as far as it takes longer than with the first of them. What was cut short counts as far
    as it came.
    """
    laps: list[list[list[list[Turn]]]] = [[] for _ in work.batches]  # batch, round, drafter
    spent = 0.0
    for number in range(rounds * len(laps)):
        batch = number % len(laps)
        if spent >= seconds and number:
            break
        laps[batch].append(_lap(work, drafters, work.batches[batch], seconds - spent))
        spent += sum(turn.seconds for turns in laps[batch][-1] for turn in turns)
    return [_timing([rounds for rounds in laps if rounds], who) for who in range(len(drafters))]


def _lap(work: Work, drafters: Sequence[Drafter[Any]], batch: Sequence[Sequence[int]], seconds: float) -> list[list[Turn]]:
    """The turns of each drafter on one batch, its prompt's first."""
    turns: list[list[Turn]] = [[] for _ in drafters]
    for turn in in_turn([work.stream(one, batch) for one in drafters], work.device, seconds):
        turns[turn.who].append(turn)
    return turns


def _timing(laps: Sequence[Sequence[Sequence[Sequence[Turn]]]], who: int) -> Timing:
    best, tokens, rows = 0.0, 0, 0
    each: list[float] = []
    for rounds in laps:
        first, *steps = zip(*(lap[who] for lap in rounds), strict=False)  # as many as every round has
        plain = min(lap[0][0].seconds for lap in rounds)
        start = max(0.0, min(turn.seconds for turn in first) - plain)
        count = sum(int(same[0].step.count.sum()) for same in steps)
        best += start + sum(min(turn.seconds for turn in same) for same in steps)
        tokens, rows = tokens + count, rows + sum(len(same[0].step.rows) for same in steps)
        each += [(start + sum(turn.seconds for turn in own)) / count for own in zip(*steps, strict=True)]
    return Timing(best / tokens, tokens, rows, tuple(each))


@final
class _Chains:
    """Proposes chains of given sizes in turn, root included, of tokens that hardly ever follow. Cost: none worth counting."""

    taps: tuple[str, ...] = ()
    prompt_taps: tuple[str, ...] = ()

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = cycle(sizes)

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> Nothing:
        return Nothing()

    def propose(self, root: Tensor, state: Nothing, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, Nothing]:
        chain = torch.arange(min(next(self._sizes), int(budget.min())), device=root.device)
        return Tree.chain((root.unsqueeze(1) + 7 * chain) % handle.target.vocab), state

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: Nothing) -> Nothing:
        return state
