"""Speculative decoding of models whose past is a state: Mamba-2, linear attention, and a hybrid of Mamba-2 and attention.

A tree of drafts is verified in one pass beside one carried state, and the pending tokens' inputs are all that is kept of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from fewstep.core.mixer import Tree
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.hub.load import load, shipped
from fewstep.models.decoder import Decoder
from fewstep.models.model import Model
from fewstep.nn.recurrent import RecurrentState
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.contest import PLAIN, Ours, RaceConfig, Record, compete, entrants
from fewstep.report.prompts import Prompt, prompts_for

_OURS = "fewstep's own goal"
_NODES = 16  # of the tree whose memory is counted
_RUNS = Path("runs")  # where `fewstep train` leaves a model
_TREES: Mapping[str, DrafterConfig] = {"ngram tree": NgramConfig(depth=4, branches=3)}


@final
@dataclass(frozen=True, slots=True)
class Subject:
    """A kind of model: its `name`, the recipe that makes one, and what is claimed of it."""

    name: str
    recipe: str
    faster: Criterion
    same: Criterion
    memory: Criterion

    @classmethod
    def of(cls, name: str, told: str) -> "Subject":
        return cls(
            name,
            f"code-{name}",
            Criterion(f"{name}-speed", f"{told}: the best tree over plain decoding, greedy, on a CPU", _OURS, "at least", 1.5),
            Criterion(
                f"{name}-identical",
                f"{told}: greedy output is that of plain decoding: share of the prompts, the worst drafter",
                _OURS,
                "at least",
                1.0,
            ),
            Criterion(
                f"{name}-memory",
                f"{told}: bytes of recurrent state while a tree of {_NODES} nodes is verified over those of a state a node",
                _OURS,
                "at most",
                0.25,
            ),
        )

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        return self.faster, self.same, self.memory


SUBJECTS = (
    Subject.of("mamba2", "Mamba-2 alone"),
    Subject.of("linear", "linear attention alone"),
    Subject.of("hybrid", "recurrent layers and attention"),
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    for subject in SUBJECTS:
        found = at_hand(subject, bench)
        if found is None:
            how = f"no such model at hand; `fewstep train {subject.recipe}`, then run this again or name it with --set model=DIR"
            yield from (Finding(criterion, None, how) for criterion in subject.criteria)
            continue
        model, prompts = found
        bench.console.print(f"racing {subject.name} over {len(prompts)} prompts, greedy and drawn")
        greedy, drawn = (_race(bench, model, prompts, temperature) for temperature in (0.0, 1.0))
        yield from _judged(subject, bench, greedy, drawn)
        pending, apart = state_bytes(model.network, _NODES)
        how = f"{pending} bytes, one state is {apart // _NODES}"
        yield Finding(subject.memory, pending / apart, how, {"pending": pending, "a state a node": apart})


def at_hand(subject: Subject, bench: Bench) -> tuple[Model, list[Prompt]] | None:
    """The subject's model and held-out prompts: the bench's own model if it is one, else one that ships, lies beside the
    bench's model, or was left in `runs` by its recipe."""
    effort = bench.effort
    if name_of(bench.model.network) == subject.name:
        return bench.model, list(bench.prompts[: effort.count])
    ships = shipped().get(subject.recipe)
    for place in (ships, Path(effort.model).parent / subject.recipe, _RUNS / subject.recipe):
        if place is not None and place.is_dir():
            model = load(place, dtype=effort.dtype)
            if name_of(model.network) == subject.name:
                return model, prompts_for(place, model, effort.count, effort.seed)
    return None


def name_of(network: Decoder) -> str:
    """What the claim calls a model of such mixers; "" for one that it does not speak of."""
    layers = [type(state) is RecurrentState for state in _states(network)]
    kinds = {mixer.kind for mixer in network.config.mixers}
    if any(layers) and not all(layers):
        return "hybrid"
    return kinds.pop() if len(kinds) == 1 else ""


def state_bytes(network: Decoder, nodes: int) -> tuple[int, int]:
    """Bytes of recurrent state of one row: with a tree of `nodes` pending, and of as many states of committed tokens."""
    before, pending = _states(network), _states(network, nodes)
    sizes = [
        (state.nbytes(), full.nbytes()) for state, full in zip(before, pending, strict=True) if type(state) is RecurrentState
    ]
    return sum(full for _, full in sizes), nodes * sum(one for one, _ in sizes)


@torch.inference_mode()
def _states(network: Decoder, nodes: int = 0) -> list[Any]:
    """The state of every layer with a tree of `nodes` pending, in pairs of siblings one below the other."""
    weight = network.embedding.weight
    state: Any = network.init_state(1, max(1, nodes), device=weight.device, dtype=weight.dtype)
    if nodes:
        order = torch.arange(nodes, device=weight.device).unsqueeze(0)
        state = network.extend(Tree(torch.zeros_like(order), (order - 1).div(2, rounding_mode="floor")), state).state
    return [state.layer(i) for i in range(network.depth)]


def _race(bench: Bench, model: Model, prompts: list[Prompt], temperature: float) -> dict[str, Record]:
    effort, network = bench.effort, model.network
    if model.tokenizer is None:
        raise ValueError("model: has no tokenizer to read prompts with; load it with its tokenizer.json")
    ids = [model.tokenizer.encode(prompt.prompt) for prompt in prompts]
    config = RaceConfig(max_new_tokens=effort.max_new_tokens, temperature=temperature, rounds=effort.rounds, seed=effort.seed)
    chosen = {**entrants(network), **_TREES}
    contestants = [Ours(name, network, drafter.build(network, lambda path: network), config) for name, drafter in chosen.items()]
    return {record.name: record for record in compete(contestants, ids, config)}


def _judged(subject: Subject, bench: Bench, greedy: Mapping[str, Record], drawn: Mapping[str, Record]) -> Iterator[Finding]:
    plain = greedy[PLAIN]
    trees = {name: record for name, record in greedy.items() if "tree" in name}
    best = _fastest(trees, plain)
    chain = _fastest({name: record for name, record in greedy.items() if name not in trees and name != PLAIN}, plain)
    speed = greedy[best].speed_over(plain)
    how = (
        f"{best}: {_told(greedy, best)} ({speed.low:.2f} to {speed.high:.2f}); at temperature 1 {_told(drawn, best)}; "
        f"best chain, {chain}: {_told(greedy, chain)}"
    )
    numbers = {
        label: {name: record.numbers(race[PLAIN], greedy=race is greedy) for name, record in race.items()}
        for label, race in (("greedy", greedy), ("temperature 1", drawn))
    }
    yield Finding(subject.faster, speed.median, how, numbers)
    share = min(record.identical_to(plain) for record in greedy.values()) / len(plain.lap.tokens)
    yield Finding(subject.same, share, f"{len(plain.lap.tokens)} prompts, {len(greedy) - 1} drafters, {bench.effort.dtype}")


def _fastest(records: Mapping[str, Record], plain: Record) -> str:
    return max(records, key=lambda name: records[name].speed_over(plain).median)


def _told(race: Mapping[str, Record], name: str) -> str:
    record = race[name]
    return f"{record.lap.cost.tokens_per_call:.2f} tokens a call, {record.speed_over(race[PLAIN]).median:.2f} times as fast"


CLAIM = Claim(
    "recurrent-speculation",
    "a tree form of Dao & Gu 2024, arXiv 2405.21060, and Katharopoulos et al. 2020, arXiv 2006.16236",
    "Models with a state in place of a cache decode speculatively too: one pass verifies a tree beside one state, and it pays.",
    tuple(criterion for subject in SUBJECTS for criterion in subject.criteria),
    measure,
)
