"""Block diffusion as the drafter of an autoregressive model, without loss: a drafter of the target's size, and a quarter of it.

The papers' drafters read what the target has computed of the text; these are language models that read the text themselves.
"""

from collections.abc import Iterator, Mapping

from fewstep.decode.drafters.block_diffusion import BlockDiffusionConfig
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.hub.heads import companion
from fewstep.report.claims.at_hand import AtHand, at_hand, encoded
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.dflash import race_dflash
from fewstep.report.contest import PLAIN, Ours, RaceConfig, Record, compete, entrants

SAME, QUARTER = "block", "block-quarter"  # their places among the heads
_TREE = (2, 2, 1, 1)
_BESIDE = ("mtp", "ngram")
_OURS = "fewstep's own goal"
_BEST = "the best of a chain and a tree drafted in one evaluation and a chain in as many as tokens"

TOKENS = Criterion(
    "tokens-per-call", f"tokens per target call, greedy, batch 1, a drafter of the target's size, {_BEST}", _OURS, "at least", 2.0
)
QUARTER_TOKENS = Criterion(
    "quarter-tokens-per-call", "the same, a drafter of a quarter of the target's weights", _OURS, "at least", 3.0
)
QUARTER_SPEED = Criterion(
    "quarter-speed",
    "wall clock of plain decoding over that of the quarter-size drafter, the fastest of them",
    _OURS,
    "at least",
    1.8,
)
IDENTICAL = Criterion(
    "identical", "greedy output is that of plain decoding: share of the prompts, the worst drafter", _OURS, "at least", 1.0
)
DFLASH = Criterion(
    "over-dflash",
    "tokens per target call of the drafter of the target's size over those of transformers' DFlash",
    "arXiv 2602.06036; the threshold is fewstep's own",
    "at least",
    1.0,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria; contestants take turns prompt by prompt."""
    effort, network, ids = bench.effort, bench.model.network, encoded(bench)
    drafters = {SAME: at_hand(bench, SAME, "code-block-distilled"), QUARTER: at_hand(bench, QUARTER, "code-block-draft")}
    kinds = [name for name in _BESIDE if name == "ngram" or name in network.heads]
    chosen = entrants(network, kinds)
    for name, drafter in drafters.items():
        chosen |= variants(name, drafter)
    config = RaceConfig(max_new_tokens=effort.max_new_tokens, rounds=effort.rounds, count=len(ids), seed=effort.seed, peers=False)
    fetch = companion(bench.model)
    contestants = [Ours(name, network, drafter.build(network, fetch), config) for name, drafter in chosen.items()]
    bench.console.print(f"racing {len(contestants)} drafters over {len(ids)} prompts, {effort.rounds} rounds", highlight=False)
    records = {record.name: record for record in compete(contestants, ids, config)}
    told = {
        name: f"{drafter.model.size / bench.model.size:.0%} of the weights, {drafter.told}" for name, drafter in drafters.items()
    }
    yield from findings(records, told)
    best = max((records[name] for name in variants(SAME, drafters[SAME])), key=_tokens)
    try:
        beside = race_dflash(bench, ids, config)
    except ValueError as error:
        yield Finding(DFLASH, None, str(error))
        return
    how = (
        f"{_tokens(best):.2f} for {_tokens(beside):.2f}, whose drafter is trained for {effort.seconds:g} s where none is at hand"
    )
    numbers = {"tokens_per_call": _tokens(beside), "identical": beside.identical_to(records[PLAIN])}  # it raced by itself
    yield Finding(DFLASH, _tokens(best) / _tokens(beside), how, numbers)


def variants(name: str, drafter: AtHand) -> dict[str, DrafterConfig]:
    """The ways to draft with one block model, by the name to print."""
    path, size = drafter.path, drafter.block
    return {
        f"{name} chain": BlockDiffusionConfig(path=path, size=size),
        f"{name} tree": BlockDiffusionConfig(path=path, size=size, branching=_TREE[:size]),
        f"{name} in steps": BlockDiffusionConfig(path=path, size=size, steps=size),
    }


def findings(records: Mapping[str, Record], told: Mapping[str, str]) -> Iterator[Finding]:
    """What a race of ours says of the criteria; `told`: each drafter in words."""
    plain = records[PLAIN]
    same, quarter = ([records[f"{name} {way}"] for way in ("chain", "tree", "in steps")] for name in (SAME, QUARTER))
    numbers = {name: record.numbers(plain, greedy=True) for name, record in records.items()}
    best, small = (max(group, key=_tokens) for group in (same, quarter))
    beside = ", ".join(
        f"{name} {_tokens(record):.2f}" for name, record in records.items() if record not in (plain, *same, *quarter)
    )
    yield Finding(TOKENS, _tokens(best), f"{best.name}, {told[SAME]}; beside it {beside}", numbers)
    yield Finding(QUARTER_TOKENS, _tokens(small), f"{small.name}, {told[QUARTER]}")
    fastest = max(quarter, key=lambda record: record.speed_over(plain).median)
    speed = fastest.speed_over(plain)
    how = f"{fastest.name}; {speed.low:.2f} to {speed.high:.2f} over {len(plain.seconds)} rounds in alternating order"
    yield Finding(QUARTER_SPEED, speed.median, how)
    count = len(plain.lap.tokens)
    worst = min((*same, *quarter), key=lambda record: record.identical_to(plain))
    yield Finding(IDENTICAL, worst.identical_to(plain) / count, f"{count} prompts, the worst: {worst.name}")


def _tokens(record: Record) -> float:
    return record.lap.cost.tokens_per_call


CLAIM = Claim(
    "block-drafts",
    "DFlash, arXiv 2602.06036; Arriola et al. 2025, arXiv 2503.09573",
    "A block diffusion model drafts so well that an autoregressive one emits several tokens a call, the same as without it.",
    (TOKENS, QUARTER_TOKENS, QUARTER_SPEED, IDENTICAL, DFLASH),
    measure,
)
