"""Multi-token prediction: a model that drafts with its own extra heads, sequential or parallel.

The papers' models have 7 and 671 billion parameters and trillions of training tokens; what a small one reaches is a finding.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.models.model import Model
from fewstep.nn.heads import SequentialHeads
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.tuning import trained_parallel_heads
from fewstep.report.contest import PLAIN, Contestant, Lap, Ours, RaceConfig, Record, compete, entrants

_GLOECKLE, _DEEPSEEK, _OURS = "arXiv 2404.19737", "arXiv 2412.19437", "fewstep's own goal"
_ONE = "mtp 1"

TOKENS = Criterion("tokens-per-call", "three sequential modules, greedy, the better of chain and tree", _OURS, "at least", 2.2)
SAME = Criterion("identical", "greedy output is that of plain decoding: share of the prompts", _OURS, "at least", 1.0)
ACCEPTED = Criterion(
    "accepted-of-3",
    "an average of 2.5 accepted tokens out of 3 suggestions on code",
    f"{_GLOECKLE}, section 3.2, recalled",
    "at least",
    2.5,
)
FAST = Criterion(
    "speed-of-4-tokens", "4-token prediction is up to 3x faster at inference", f"{_GLOECKLE}, abstract", "at least", 3.0
)
SECOND = Criterion(
    "second-token",
    "the acceptance rate of the second token prediction ranges between 85% and 90%",
    f"{_DEEPSEEK}, section 5.4.3",
    "at least",
    0.85,
)
FAST_ONE = Criterion("speed-of-one-module", "1.8 times the tokens per second", f"{_DEEPSEEK}, section 5.4.3", "at least", 1.8)
FASTER = Criterion("speed", "faster than plain decoding, the fastest of chain and tree", _OURS, "at least", 1.3)
PARALLEL = Criterion(
    "parallel-tokens-per-call",
    "three parallel heads on a frozen trunk, greedy, the better of chain and tree",
    _OURS,
    "at least",
    1.5,
)
PARALLEL_SAME = Criterion("parallel-identical", "the same for parallel heads: share of the prompts", _OURS, "at least", 1.0)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    if isinstance(bench.model.network.heads.get("mtp"), SequentialHeads):
        yield from _sequential(bench)
    else:
        for criterion in (TOKENS, SAME, ACCEPTED, FAST, SECOND, FAST_ONE, FASTER):
            yield Finding(criterion, None, f"{bench.effort.model} has no sequential modules")
    bench.console.print(f"training parallel heads on the frozen trunk for {bench.effort.seconds:g} s")
    greedy = _race(bench, trained_parallel_heads(bench), 0.0)
    numbers = _numbers(greedy)
    best = _best(greedy, lambda record: record.lap.cost.tokens_per_call)
    how = f"{best.name}, heads trained for {bench.effort.seconds:g} s"
    yield Finding(PARALLEL, best.lap.cost.tokens_per_call, how, numbers)
    yield Finding(
        PARALLEL_SAME, _identical(greedy), f"worst drafter, {len(best.lap.tokens)} prompts, {bench.effort.dtype}", numbers
    )


def _sequential(bench: Bench) -> Iterator[Finding]:
    bench.console.print(
        f"racing the model's own modules over {min(bench.effort.count, len(bench.prompts))} prompts, greedy and drawn"
    )
    greedy, drawn = (_race(bench, bench.model, temperature) for temperature in (0.0, 1.0))
    numbers = {"greedy": _numbers(greedy), "temperature 1": _numbers(drawn)}
    plain, chain, one = greedy[PLAIN], greedy["mtp chain"], greedy[_ONE]
    best = _best(greedy, lambda record: record.lap.cost.tokens_per_call)
    fastest = _best(greedy, lambda record: record.speed_over(plain).median)
    drawn_best = _best(drawn, lambda record: record.lap.cost.tokens_per_call)
    told = f"{best.name}; at temperature 1 {drawn_best.lap.cost.tokens_per_call:.2f} ({drawn_best.name})"
    rates = acceptance_by_depth(chain.lap)
    yield Finding(TOKENS, best.lap.cost.tokens_per_call, told, numbers)
    yield Finding(SAME, _identical(greedy), _told(bench, greedy), numbers)
    yield Finding(
        ACCEPTED, sum(rates), "chain, greedy; by depth " + ", ".join(f"{rate:.2f}" for rate in rates), {"by_depth": rates}
    )
    speed = fastest.speed_over(plain)
    spread = f"{fastest.name}; {speed.low:.2f} to {speed.high:.2f} over {len(plain.seconds)} rounds in alternating order"
    yield Finding(FAST, speed.median, spread, numbers)
    drawn_rate = acceptance_by_depth(drawn["mtp chain"].lap)[0]
    yield Finding(SECOND, rates[0], f"first module, greedy; drawn at temperature 1: {drawn_rate:.2f}", {"drawn": drawn_rate})
    speed_of_one = one.speed_over(plain)
    yield Finding(FAST_ONE, speed_of_one.median, f"{speed_of_one.low:.2f} to {speed_of_one.high:.2f}", numbers)
    yield Finding(FASTER, speed.median, spread, numbers)


def acceptance_by_depth(lap: Lap) -> list[float]:
    """For each depth of a chain, the share of the drafts made at that depth that were accepted, with all before them."""
    pairs = list(zip(lap.accepted, lap.drafted, strict=True))
    deepest = max((drafted for _, drafted in pairs), default=0)
    made = [[accepted for accepted, drafted in pairs if drafted >= depth] for depth in range(1, deepest + 1)]
    return [sum(accepted >= depth for accepted in calls) / len(calls) for depth, calls in enumerate(made, 1)]


def _race(bench: Bench, model: Model, temperature: float) -> dict[str, Record]:
    effort = bench.effort
    if model.tokenizer is None:
        raise ValueError("model: has no tokenizer to read prompts with; load it with its tokenizer.json")
    ids = [model.tokenizer.encode(prompt.prompt) for prompt in bench.prompts[: effort.count]]
    config = RaceConfig(max_new_tokens=effort.max_new_tokens, temperature=temperature, rounds=effort.rounds, seed=effort.seed)
    chosen = {**entrants(model.network, ("mtp",)), _ONE: MultiTokenConfig(branching=(1,))}
    network = model.network
    contestants: Sequence[Contestant] = [
        Ours(name, network, drafter.build(network, lambda path: network), config) for name, drafter in chosen.items()
    ]
    return {record.name: record for record in compete(contestants, ids, config)}


def _best(records: Mapping[str, Record], worth: Any) -> Record:
    return max((record for record in records.values() if record.name != PLAIN), key=worth)


def _identical(records: Mapping[str, Record]) -> float:
    plain = records[PLAIN]
    return min(record.identical_to(plain) for record in records.values()) / len(plain.lap.tokens)


def _told(bench: Bench, records: Mapping[str, Record]) -> str:
    return f"worst drafter, {len(records[PLAIN].lap.tokens)} prompts, {bench.effort.dtype}"


def _numbers(records: Mapping[str, Record]) -> dict[str, Any]:
    plain = records[PLAIN]
    return {
        name: {
            "tokens_per_call": record.lap.cost.tokens_per_call,
            "draft_calls": record.lap.cost.draft_calls,
            "accepted": record.histogram,
            "seconds": list(record.seconds),
            "speed_over_plain": record.speed_over(plain).median,
            "identical": record.identical_to(plain),
        }
        for name, record in records.items()
    }


CLAIM = Claim(
    "mtp",
    "Gloeckle et al. 2024, arXiv 2404.19737; DeepSeek-V3, arXiv 2412.19437",
    "Heads that predict further tokens draft for the model they were trained with, which then decodes faster and loses nothing.",
    (TOKENS, SAME, ACCEPTED, FAST, SECOND, FAST_ONE, FASTER, PARALLEL, PARALLEL_SAME),
    measure,
)
