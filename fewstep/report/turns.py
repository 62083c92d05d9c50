"""Streams that take turns, so that whatever else the machine does, it does to all of them. This file knows the loop's events."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch

from fewstep.core.event import Event
from fewstep.decode.stream import Step
from fewstep.report.costs import now

_BURST = 0.05  # seconds


@final
@dataclass(frozen=True, slots=True)
class Turn:
    """One step of the stream number `who`, and the `seconds` it took."""

    who: int
    step: Step
    seconds: float


def in_turn(
    streams: Sequence[Iterator[Event[Step]]], device: torch.device, seconds: float = float("inf"), least: int = 4
) -> Iterator[Turn]:
    """Advance the stream that has emitted the fewest tokens for a moment, until all have ended or `seconds` are over.

    So at any moment all have done about the same work, and a step finds in the caches what the one before it left there, as it
    does where nothing else is decoded. However little time there is, every stream takes `least` steps if it has so many.
    """
    tokens, steps = [0] * len(streams), [0] * len(streams)
    running, end = set(range(len(streams))), clock(device) + seconds
    while running:
        who = min(running, key=lambda i: (tokens[i], i))
        until = clock(device) + _BURST
        while clock(device) < until:
            start = clock(device)
            event = next(streams[who], None)
            spent = clock(device) - start
            if event is None:
                running.remove(who)
                break
            tokens[who], steps[who] = event.cost.tokens, steps[who] + 1
            yield Turn(who, event.payload, spent)
            if start > end and min(steps[i] for i in running) >= least:
                return


def clock(device: torch.device) -> float:
    """Seconds that this thread has computed, where it does all the work and others use the processor too; else the clock's."""
    return time.thread_time() if device.type == "cpu" and torch.get_num_threads() == 1 else now(device)


def undisturbed(times: Sequence[float]) -> float:
    """The lower quartile: a typical time of those that nothing else interfered with, if a quarter of them are."""
    return sorted(times)[len(times) // 4]
