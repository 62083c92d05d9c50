"""Requests in, completions out: seeds, samples and bookkeeping around the one loop. This file knows no text."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from fewstep.core.draft import Drafter
from fewstep.core.event import Cost, Event
from fewstep.core.model import Target
from fewstep.core.random import CounterRng
from fewstep.decode.laws import Sampling, SamplingConfig
from fewstep.decode.prefill import placement
from fewstep.decode.stream import Finish, Review, Settings, Step, stream

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True)
class Completion:
    """What one request got: new `tokens` (an end token included), where each came from, what it cost, and why it ended.

    `drafted[i]`: token i was drafted and accepted, not computed. `accepted`: accepted drafts of each call. `finish`: "eos",
    "length" or "stop". `cost.seconds` runs from the start of the batch to the row's last token: rows overlap, so sums of it mean
    nothing. `cost.bytes` is the batch's. `logits` [T,V]: if kept. `text`: filled by whoever knows the tokenizer.
    """

    tokens: list[int]
    drafted: list[bool]
    accepted: list[int]
    cost: Cost
    finish: str
    logits: Tensor | None = None
    text: str = ""


def requests(
    target: Target,
    drafter: Drafter[Any],
    prompts: Sequence[Sequence[int]],
    settings: Settings = Settings(),
    *,
    sampling: SamplingConfig | Sequence[SamplingConfig] = SamplingConfig(),
    seed: int | Sequence[int] = 0,
    samples: int = 1,
    review: Review | None = None,
) -> Iterator[Event[Step]]:
    """The loop over `samples` continuations of every prompt: sample s of prompt b is row b * samples + s.

    `sampling`, `seed` and `settings.max_new_tokens` are one for all prompts or one per prompt. A row's seed is a hash of its
    prompt's seed and s, so a prompt gives the same samples alone and in any batch. Raises ValueError as `stream` does.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: below 1; ask for at least one sample per prompt")
    count, device = len(prompts), placement(target)[0]
    configs = _per_row("sampling", [sampling] * count if isinstance(sampling, SamplingConfig) else sampling, count, samples)
    seeds = _per_row("seed", [seed] * count if isinstance(seed, int) else seed, count, samples)
    if not isinstance(settings.max_new_tokens, int):
        settings = replace(settings, max_new_tokens=_per_row("max_new_tokens", settings.max_new_tokens, count, samples))
    rows = [prompt for prompt in prompts for _ in range(samples)]
    rng = CounterRng.seeded([row_seed(value, i % samples) for i, value in enumerate(seeds)], device)
    return stream(target, drafter, rows, Sampling.of(configs, target.vocab, device), rng, settings, review)


def decode(
    target: Target,
    drafter: Drafter[Any],
    prompts: Sequence[Sequence[int]],
    settings: Settings = Settings(),
    *,
    sampling: SamplingConfig | Sequence[SamplingConfig] = SamplingConfig(),
    seed: int | Sequence[int] = 0,
    samples: int = 1,
    review: Review | None = None,
) -> list[Completion]:
    """`requests` run to the end: one completion per row."""
    transcripts = Transcripts(len(prompts) * samples)
    for event in requests(target, drafter, prompts, settings, sampling=sampling, seed=seed, samples=samples, review=review):
        transcripts.take(event)
    return transcripts.completions()


@final
@dataclass(slots=True)
class _Row:
    """What a row got so far: the fields of a `Completion`, and of its `Cost`."""

    tokens: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    calls: int = 0
    draft_calls: int = 0
    prefill_calls: int = 0
    seconds: float = 0.0
    bytes: int = 0
    finish: int = Finish.RUNNING

    def completion(self) -> Completion:
        cost = Cost(self.calls, self.draft_calls, self.prefill_calls, len(self.tokens), self.seconds, self.bytes)
        logits = torch.cat(self.logits) if self.logits else None
        return Completion(self.tokens, self.drafted, self.accepted, cost, Finish(self.finish).name.lower(), logits)


@final
class Transcripts:
    """The completions of a batch in the making."""

    def __init__(self, rows: int) -> None:
        self._rows = [_Row() for _ in range(rows)]

    def take(self, event: Event[Step]) -> None:
        """Write down what a step gave each of its rows."""
        step, total = event.payload, event.cost
        columns = (step.rows, step.tokens, step.count, step.drafted, step.finish)
        for i, (index, tokens, count, drafted, finish) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            row = self._rows[index]
            row.tokens += tokens[:count]
            row.drafted += [j < drafted for j in range(count)]
            if step.calls:
                row.accepted.append(drafted)
            row.calls += step.calls
            row.draft_calls += step.draft_calls
            row.prefill_calls += not step.calls
            row.seconds, row.bytes, row.finish = total.seconds, total.bytes, finish
            if step.logits is not None:
                row.logits.append(step.logits[i, :count])

    def completions(self) -> list[Completion]:
        """One per row, as far as they have come."""
        return [row.completion() for row in self._rows]


def row_seed(seed: int, sample: int) -> int:
    """The seed of sample `sample` of a request with seed `seed`: 63 bits of a hash."""
    digest = hashlib.blake2b(f"{seed}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _per_row(field: str, values: Sequence[T], prompts: int, samples: int) -> list[T]:
    if len(values) != prompts:
        raise ValueError(f"{field}: {len(values)} values for {prompts} prompts; give one, or one per prompt")
    return [value for value in values for _ in range(samples)]
