"""Contestants, and the race between them: the same prompts, seeds and token counts, in alternating order.

This file knows the loop and its drafters; other libraries enter through `Contestant`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol, final

from pydantic import Field

from fewstep.core.draft import Drafter
from fewstep.core.event import Cost
from fewstep.core.model import Target
from fewstep.core.recipe import Config
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import Transcripts, requests
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.nn.heads import ParallelHeads, SequentialHeads

PLAIN = "plain"
_TREES = ((2, 1, 1), (3, 2, 1))


@final
class RacePlan(Config):
    """What a race holds equal for everybody.

    `max_new_tokens` are emitted for each of the first `prompts` prompts, `batch` at a time, an end-of-text token or not.
    `rounds` passes are made over all of them. `budget`: the nodes a tree may have. `peers`: other libraries run too, where
    installed. `threads`: of the CPU (0: as they are).
    """

    max_new_tokens: int = Field(64, ge=2)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    prompts: int = Field(16, ge=1)
    rounds: int = Field(5, ge=1)
    batch: int = Field(1, ge=1)
    budget: int = Field(16, ge=1)
    peers: bool = True
    threads: int = Field(0, ge=0)
    seed: int = 0

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(temperature=self.temperature)

    @property
    def settings(self) -> Settings:
        return Settings(self.max_new_tokens, budget=self.budget)


@final
@dataclass(frozen=True, slots=True)
class Lap:
    """One pass over some prompts: the new `tokens` of each and their cost; per call, the drafts it `accepted` and had `drafted`."""

    tokens: list[list[int]] = field(default_factory=list)
    cost: Cost = Cost()
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)

    def __add__(self, other: "Lap") -> "Lap":
        return Lap(
            self.tokens + other.tokens, self.cost + other.cost, self.accepted + other.accepted, self.drafted + other.drafted
        )


class Contestant(Protocol):
    """Continues each of a batch of prompts by the same number of tokens, whatever they are."""

    name: str
    library: str

    def run(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Lap: ...


@final
class Ours:
    """This library's loop with one drafter."""

    library = "fewstep"

    def __init__(self, name: str, target: Target, drafter: Drafter[Any], plan: RacePlan) -> None:
        self.name, self.drafter = name, drafter
        self._target, self._plan = target, plan

    def run(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Lap:
        transcripts, lap = Transcripts(len(prompts)), Lap()
        plan = self._plan
        for event in requests(self._target, self.drafter, prompts, plan.settings, sampling=plan.sampling, seed=seeds):
            transcripts.take(event)
            step = event.payload
            if step.calls:
                lap.accepted.extend(step.drafted.tolist())
                lap.drafted.extend((step.nodes - 1).tolist())
        return Lap([done.tokens for done in transcripts.completions()], event.cost, lap.accepted, lap.drafted)


def entrants(target: Target, draft: str | None = None) -> dict[str, DrafterConfig]:
    """The drafters that `target` can run with by name, plain decoding first; `draft`: the directory of a draft model."""
    found: dict[str, DrafterConfig] = {PLAIN: SilentConfig(), "ngram": NgramConfig()}
    heads = target.heads.get("mtp")
    if isinstance(heads, SequentialHeads | ParallelHeads):
        found["mtp chain"] = MultiTokenConfig()
        for tree in dict.fromkeys(tree[: heads.depth] for tree in _TREES):
            found[f"mtp tree {'-'.join(map(str, tree))}"] = MultiTokenConfig(branching=tree)
    if draft:
        found["draft model"] = DraftModelConfig(path=draft)
    return found


@final
@dataclass(frozen=True, slots=True)
class Spread:
    """The median of repeated measurements, the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


@final
@dataclass(frozen=True, slots=True)
class Record:
    """How a contestant did: its first round, which it repeated, and the wall-clock seconds of every round."""

    name: str
    library: str
    lap: Lap
    seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> Spread:
        """New tokens, those that come with the prompts included, over all of a round's seconds, prompts included."""
        return Spread.of([self.lap.cost.tokens / seconds for seconds in self.seconds])

    def speed_over(self, other: "Record") -> Spread:
        """How many times faster than `other`, round by round."""
        return Spread.of([theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=True)])

    def identical_to(self, other: "Record") -> int:
        """The prompts that both continue with the same tokens."""
        return sum(mine == theirs for mine, theirs in zip(self.lap.tokens, other.lap.tokens, strict=True))

    @property
    def histogram(self) -> list[int]:
        """The number of calls that accepted 0, 1, 2, ... drafts."""
        counts = [0] * (1 + max(self.lap.accepted, default=0))
        for accepted in self.lap.accepted:
            counts[accepted] += 1
        return counts


def compete(
    contestants: Sequence[Contestant],
    prompts: Sequence[Sequence[int]],
    plan: RacePlan,
    advance: Callable[[str], None] = lambda name: None,
) -> list[Record]:
    """Run all `contestants` over all `prompts`, `plan.rounds` times, after one batch each to warm up.

    They take turns batch by batch and whoever starts changes each time, so that whatever else the machine does, it does to all.
    `advance` is called after every batch with the name of who ran it.
    """
    batches = [prompts[start : start + plan.batch] for start in range(0, len(prompts), plan.batch)]
    seeds = [range(plan.seed + start, plan.seed + start + plan.batch) for start in range(0, len(prompts), plan.batch)]
    laps = [Lap() for _ in contestants]
    seconds = [[0.0] * plan.rounds for _ in contestants]
    for contestant in contestants:
        contestant.run(batches[0], seeds[0][: len(batches[0])])
        advance(contestant.name)
    for turn in range(plan.rounds):
        for index, batch in enumerate(batches):
            for place in range(len(contestants)):
                who = (place + turn + index) % len(contestants)
                start = time.perf_counter()
                lap = contestants[who].run(batch, seeds[index][: len(batch)])
                seconds[who][turn] += time.perf_counter() - start
                if turn == 0:
                    laps[who] += lap
                advance(contestants[who].name)
    pairs = zip(contestants, laps, seconds, strict=True)
    return [Record(contestant.name, contestant.library, lap, tuple(times)) for contestant, lap, times in pairs]
