"""Contestants, and the race between them: the same prompts, seeds and token counts, in alternating order.

This file knows the loop and its drafters; other libraries enter through `Contestant`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Protocol, cast, final

from pydantic import Field

from fewstep.core.draft import Drafter
from fewstep.core.event import Cost
from fewstep.core.model import Target
from fewstep.core.recipe import Config, choice, parse, suggestion
from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import Transcripts, requests
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.decode.verification import VERIFICATIONS, TokenVerificationConfig, VerificationConfig
from fewstep.nn.heads import ParallelHeads, SequentialHeads

PLAIN = "plain"
_TREES = ((2, 1, 1), (3, 2, 1))
_ALONE = ("lookahead", "early_exit")  # they run with any model, when asked for


@final
class RaceConfig(Config):
    """What a race holds equal for everybody.

    `drafters`: names of `entrants` or of the registry, "draft_model=PATH" too; (): all that the model can run with.
    `max_new_tokens` are emitted for each of the first `count` prompts, `batch` at a time, an end-of-text token or not. `rounds`
    passes are made over all of them. `budget`: the nodes a tree may have. `peers`: other libraries run too, where installed.
    `verification`: each drafter also runs as a second entrant that is judged this way.
    """

    drafters: tuple[str, ...] = ()
    max_new_tokens: int = Field(default=64, ge=2)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    rounds: int = Field(default=3, ge=1)
    count: int = Field(default=16, ge=1)
    batch: int = Field(default=1, ge=1)
    budget: int = Field(default=16, ge=1)
    peers: bool = True
    seed: int = 0
    verification: choice(lambda: VERIFICATIONS, "verification") = TokenVerificationConfig()  # type: ignore[valid-type]

    @property
    def judged(self) -> VerificationConfig:
        """How the second entrants are judged."""
        return cast(VerificationConfig, self.verification)

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(temperature=self.temperature)

    @property
    def settings(self) -> Settings:
        return Settings(self.max_new_tokens, budget=self.budget)


@final
@dataclass(frozen=True, slots=True)
class Lap:
    """One pass over some prompts: the new `tokens` of each and their cost; per call, the drafts it `accepted` and had `drafted`;
    the seconds until all prompts were evaluated (0: not known)."""

    tokens: list[list[int]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0

    def __add__(self, other: "Lap") -> "Lap":
        return Lap(
            self.tokens + other.tokens,
            self.cost + other.cost,
            self.accepted + other.accepted,
            self.drafted + other.drafted,
            self.prefill_seconds + other.prefill_seconds,
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

    def __init__(
        self,
        name: str,
        target: Target,
        drafter: Drafter[Any],
        config: RaceConfig,
        verification: VerificationConfig = TokenVerificationConfig(),
    ) -> None:
        self.name, self.drafter = name, drafter
        self._target, self._config = target, config
        self._settings = replace(config.settings, verify=verification.build())

    def judged(self, verification: VerificationConfig) -> "Ours":
        """The same drafter under another verification, which its name says."""
        return Ours(f"{self.name}, {verification.label}", self._target, self.drafter, self._config, verification)

    def run(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Lap:
        transcripts, lap = Transcripts(len(prompts)), Lap()
        config, prefill = self._config, 0.0
        for event in requests(self._target, self.drafter, prompts, self._settings, sampling=config.sampling, seed=seeds):
            transcripts.take(event)
            step = event.payload
            if step.calls:
                lap.accepted.extend(step.drafted.tolist())
                lap.drafted.extend((step.nodes - 1).tolist())
            else:
                prefill = event.cost.seconds
        tokens = [done.tokens for done in transcripts.completions()]
        return Lap(tokens, event.cost, lap.accepted, lap.drafted, prefill)


def entrants(target: Target, names: Sequence[str] = ()) -> dict[str, DrafterConfig]:
    """The drafters that `target` can run with, by name, plain decoding first; `names` are as in `RaceConfig.drafters`.

    Raises ValueError for a name that is none of them.
    """
    known = _known(target)
    chosen = {PLAIN: known[PLAIN]}
    for name in names:
        kind, _, path = name.partition("=")
        found = {key: config for key, config in known.items() if name in (key, config.kind)}
        if path and kind in DRAFTERS:
            found = {kind.replace("_", " "): parse(DRAFTERS[kind], {"path": path}, "drafters")}
        elif kind in _ALONE:
            found = {kind.replace("_", " "): DRAFTERS[kind]()}
        if not found:
            next_move = suggestion(name, [*known, f"{DraftModelConfig.kind}=PATH"])
            raise ValueError(f"drafters={name!r}: this model cannot run with it; {next_move}")
        chosen |= found
    return chosen if names else known


def _known(target: Target) -> dict[str, DrafterConfig]:
    found: dict[str, DrafterConfig] = {PLAIN: SilentConfig(), "ngram": NgramConfig(), "retrieval": RetrievalConfig()}
    heads = target.heads.get("mtp")
    if isinstance(heads, SequentialHeads | ParallelHeads):
        found["mtp chain"] = MultiTokenConfig()
        for tree in dict.fromkeys(tree[: heads.depth] for tree in _TREES):
            found[f"mtp tree {'-'.join(map(str, tree))}"] = MultiTokenConfig(branching=tree)
    found |= {kind: DRAFTERS[kind]() for kind in target.heads if kind in DRAFTERS and kind != "mtp"}
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
    """How a contestant did: its first round, which it repeated, and the wall-clock seconds of every round, `prefill_seconds` of
    which went to the prompts (0: not known)."""

    name: str
    library: str
    lap: Lap
    seconds: tuple[float, ...]
    prefill_seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> Spread:
        """New tokens, those that come with the prompts included, over all of a round's seconds, prompts included."""
        return Spread.of([self.lap.cost.tokens / seconds for seconds in self.seconds])

    def speed_over(self, other: "Record") -> Spread:
        """How many times faster than `other`, round by round."""
        return Spread.of([theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=True)])

    def decoding_speed_over(self, other: "Record") -> Spread:
        """The same without the prompts."""
        mine, theirs = (
            [all_of - prompts for all_of, prompts in zip(record.seconds, record.prefill_seconds, strict=True)]
            for record in (self, other)
        )
        return Spread.of([b / a for a, b in zip(mine, theirs, strict=True)])

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

    def numbers(self, plain: "Record", greedy: bool) -> dict[str, Any]:
        """Everything in JSON values, beside the record of plain decoding; texts can only be identical where they are `greedy`."""
        cost = self.lap.cost
        return {
            "name": self.name,
            "library": self.library,
            "tokens": cost.tokens,
            "calls": cost.calls,
            "prefill_calls": cost.prefill_calls,
            "draft_calls": cost.draft_calls,
            "tokens_per_call": cost.tokens_per_call,
            "calls_per_token": cost.calls / (cost.tokens - cost.prefill_calls),
            "draft_calls_per_call": cost.draft_calls / cost.calls,
            "seconds": list(self.seconds),
            "prefill_seconds": list(self.prefill_seconds) if any(self.prefill_seconds) else None,
            "tokens_per_second": asdict(self.tokens_per_second),
            "speed_over_plain": asdict(self.speed_over(plain)),
            "accepted": self.histogram if self.lap.accepted else None,
            "identical": self.identical_to(plain) if greedy else None,
            "state_bytes": cost.bytes,
        }


def compete(
    contestants: Sequence[Contestant],
    prompts: Sequence[Sequence[int]],
    config: RaceConfig,
    advance: Callable[[str], None] = lambda name: None,
) -> list[Record]:
    """Run all `contestants` over all `prompts`, `config.rounds` times, after one batch each to warm up.

    They take turns batch by batch and whoever starts changes each time, so that whatever else the machine does, it does to all.
    `advance` is called after every batch with the name of who ran it.
    """
    batches = [prompts[start : start + config.batch] for start in range(0, len(prompts), config.batch)]
    seeds = [range(config.seed + start, config.seed + start + config.batch) for start in range(0, len(prompts), config.batch)]
    laps = [Lap() for _ in contestants]
    seconds, prefill = ([[0.0] * config.rounds for _ in contestants] for _ in range(2))
    for contestant in contestants:
        contestant.run(batches[0], seeds[0][: len(batches[0])])
        advance(contestant.name)
    for turn in range(config.rounds):
        for index, batch in enumerate(batches):
            for place in range(len(contestants)):
                who = (place + turn + index) % len(contestants)
                start = time.perf_counter()
                lap = contestants[who].run(batch, seeds[index][: len(batch)])
                seconds[who][turn] += time.perf_counter() - start
                prefill[who][turn] += lap.prefill_seconds
                if turn == 0:
                    laps[who] += lap
                advance(contestants[who].name)
    rows = zip(contestants, laps, seconds, prefill, strict=True)
    return [Record(who.name, who.library, lap, tuple(times), tuple(prompt)) for who, lap, times, prompt in rows]
