"""Spec-Bench's table on one's own model: every drafter, how many tokens a call emits and how much faster that is.

Its models have 7 and 13 billion parameters and ran on one GPU, where a call on 60 tokens costs little more than on one. Whether
the methods keep their order and their numbers on a small model and a CPU is a finding.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.eagle import Eagle2Config, Eagle3Config, EagleConfig
from fewstep.decode.drafters.early_exit import EarlyExitConfig
from fewstep.decode.drafters.lookahead import LookaheadConfig
from fewstep.decode.drafters.medusa import HydraConfig, MedusaConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.hub.load import RECIPE
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.tuning import heads_at_hand, trained_draft
from fewstep.report.contest import RaceConfig, Spread, entrants
from fewstep.report.grid import Grid, GridConfig, run_grid

_LARGE, _SMALL = "leaderboard: Vicuna-13B on an A100", "leaderboard: Vicuna-7B on an RTX 3090"
_EAGLE2, _EAGLE3, _HYDRA = "arXiv 2406.16858, abstract", "arXiv 2503.01840, abstract", "arXiv 2402.05109, abstract, recalled"
_CORPUS = "retrieval corpus"
_TREE = (2, 2, 1, 1)
_ORDER = ("eagle3", "eagle2", "hydra", "medusa", "ngram")

ORDER_TOKENS = Criterion(
    "order-by-tokens",
    "greedy, batch 1: EAGLE-3 > EAGLE-2 > Hydra > Medusa > prompt lookup in tokens per call: share of the pairs in this order",
    _LARGE,
    "at least",
    1.0,
)
ORDER_SPEED = Criterion("order-by-speed", "the same order in speed: share of the pairs in this order", _LARGE, "at least", 1.0)
SAME = Criterion(
    "identical",
    "greedy output is that of plain decoding: share of the prompts, the worst drafter at the worst batch size",
    "fewstep's own goal",
    "at least",
    1.0,
)


def _pair(contestant: str, name: str, tokens: float, speed: float, seen: str = _LARGE) -> tuple[str, Criterion, Criterion]:
    """What the leaderboard says of one method; `seen`: where its tokens per call were."""
    said = Criterion(f"{contestant.replace(' ', '-')}-tokens", f"tokens per call of {name}", seen, "at least", tokens)
    fast = Criterion(f"{contestant.replace(' ', '-')}-speed", f"speed of {name} over plain decoding", _LARGE, "at least", speed)
    return contestant, said, fast


METHODS = (
    _pair("eagle3", "EAGLE-3", 5.71, 3.02),
    _pair("eagle2", "EAGLE-2", 4.35, 2.46, _SMALL),
    _pair("hydra", "Hydra", 3.35, 2.20),
    _pair("eagle", "EAGLE", 3.64, 2.16),
    _pair("medusa", "Medusa", 2.39, 1.80),
    _pair("ngram", "prompt lookup", 1.68, 1.56),
    _pair("draft model", "a small draft model", 2.18, 1.54),
    _pair(_CORPUS, "REST, retrieval from a corpus", 1.82, 1.38),
    _pair("lookahead", "lookahead", 1.63, 1.30),
)
RATIOS = (  # faster, slower, and by how much
    ("eagle3", "eagle2", Criterion("eagle3-over-eagle2", "about 1.4 times as fast as EAGLE-2", _EAGLE3, "at least", 1.4)),
    ("eagle2", "eagle", Criterion("eagle2-over-eagle", "20% to 40% faster than EAGLE-1", _EAGLE2, "at least", 1.2)),
    ("hydra", "medusa", Criterion("hydra-over-medusa", "up to 1.31 times as fast as Medusa", _HYDRA, "at least", 1.31)),
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    model, effort = bench.model, bench.effort
    if model.tokenizer is None:
        raise ValueError("model: has no tokenizer to read prompts with; load it with its tokenizer.json")
    ids = [model.tokenizer.encode(prompt.prompt) for prompt in bench.prompts[: effort.count]]
    race = RaceConfig(max_new_tokens=effort.max_new_tokens, rounds=effort.rounds, count=len(ids), seed=effort.seed, peers=False)
    grid = run_grid(model, contestants(bench), ids, GridConfig(race=race), bench.kept or bench.scratch, bench.console)
    grid.show(bench.console)
    yield from findings(
        grid, f"{len(ids)} prompts, {effort.max_new_tokens} tokens each, {effort.dtype}, trees of at most 16 nodes"
    )


def contestants(bench: Bench) -> dict[str, DrafterConfig]:
    """Every drafter there is, by the name to print, plain decoding first; networks that are not at hand are trained.

    Each has the tree of its default settings, EAGLE-1 one of fixed shape as in its paper. Trees of chosen nodes, as most papers
    have them, also compete as trees of drawn ones ("drawn"), which lose less at a temperature.
    """
    effort, network = bench.effort, bench.model.network
    heads = {kind: heads_at_hand(bench, kind) for kind in ("medusa", "hydra", "eagle", "eagle3")}
    corpus = Path(effort.heads) / RetrievalConfig.kind
    return {
        **entrants(network),
        "lookahead": LookaheadConfig(),
        "early exit": EarlyExitConfig(),
        **({_CORPUS: RetrievalConfig(path=str(corpus))} if effort.heads and corpus.is_dir() else {}),
        "draft model": DraftModelConfig(path=effort.draft or _drafting(bench)),
        "medusa": MedusaConfig(path=heads["medusa"]),
        "medusa drawn": MedusaConfig(path=heads["medusa"], branching=_TREE, mode="drawn"),
        "hydra": HydraConfig(path=heads["hydra"]),
        "eagle": EagleConfig(path=heads["eagle"], branching=_TREE),
        "eagle2": Eagle2Config(path=heads["eagle"]),
        "eagle3": Eagle3Config(path=heads["eagle3"]),
        "eagle3 drawn": Eagle3Config(path=heads["eagle3"], branching=_TREE),
    }


def _drafting(bench: Bench) -> str:
    """The directory of a small model, trained now unless an earlier run left it among the heads."""
    effort = bench.effort
    directory = (Path(effort.heads) if effort.heads else bench.scratch) / DraftModelConfig.kind
    if not (directory / RECIPE).is_file():
        bench.console.print(f"no draft model given: training one for {effort.seconds:g} s")
        trained_draft(bench).save(directory)
    return str(directory)


def findings(grid: Grid, told: str) -> Iterator[Finding]:
    """What a grid says of every criterion; `told`: how it was measured."""
    alone = grid.cells[0.0, 1]
    tokens = {name: row["tokens_per_call"] for name, row in alone.items()}
    speed = {name: row["speed_over_plain"]["median"] for name, row in alone.items()}
    ranked = [", ".join(f"{name} {values[name]:.2f}" for name in _ORDER) for values in (tokens, speed)]
    yield Finding(ORDER_TOKENS, in_order([tokens[name] for name in _ORDER]), f"{ranked[0]}; {told}", grid.as_dict())
    yield Finding(ORDER_SPEED, in_order([speed[name] for name in _ORDER]), ranked[1])
    yield _identical(grid)
    for name, said, fast in METHODS:
        if name not in alone:
            how = f"no corpus at hand; write one with `fewstep corpus MODEL --out HEADS/{RetrievalConfig.kind}`"
            yield from (Finding(criterion, None, how) for criterion in (said, fast))
            continue
        drawn, spread = grid.cells[1.0, 1][name], alone[name]["speed_over_plain"]
        warm = drawn["speed_over_plain"]["median"]
        yield Finding(said, tokens[name], f"at temperature 1 {drawn['tokens_per_call']:.2f}")
        yield Finding(fast, speed[name], f"{spread['low']:.2f} to {spread['high']:.2f}; at temperature 1 {warm:.2f}")
    for faster, slower, criterion in RATIOS:
        rounds = zip(alone[slower]["seconds"], alone[faster]["seconds"], strict=True)
        ratio = Spread.of([theirs / mine for theirs, mine in rounds])
        yield Finding(criterion, ratio.median, f"{ratio.low:.2f} to {ratio.high:.2f}")


def in_order(values: Sequence[float]) -> float:
    """The share of the pairs of `values` whose first is the larger."""
    pairs = list(combinations(values, 2))
    return sum(first > second for first, second in pairs) / len(pairs)


def _identical(grid: Grid) -> Finding:
    shares = {
        (name, batch): row["identical"] / row["prefill_calls"]
        for (temperature, batch), cell in grid.cells.items()
        for name, row in cell.items()
        if not temperature
    }
    worst = min(shares, key=lambda key: shares[key])
    return Finding(SAME, shares[worst], f"{len(shares)} races; the worst: {worst[0]}, batch {worst[1]}")


CLAIM = Claim(
    "spec-bench",
    "Xia et al. 2024, arXiv 2401.07851; and the papers of the methods it ranks",
    "Drafters of every kind, judged without loss, emit several tokens per call, and the better the draft, the faster the text.",
    (
        ORDER_TOKENS,
        ORDER_SPEED,
        SAME,
        *(criterion for _, said, fast in METHODS for criterion in (said, fast)),
        *(criterion for _, _, criterion in RATIOS),
    ),
    measure,
)
