"""Typical acceptance, Medusa's lossy verification: the tokens per call it gains, and how far from the model's law it takes them.

The paper reads quality off a judge's marks; here every law is known, so the deviation itself is computed, at every token.
"""

from collections.abc import Iterator, Sequence
from typing import final

import torch

from fewstep.core.draft import Verdict, Verify
from fewstep.core.mixer import Tree
from fewstep.core.random import Rng
from fewstep.decode.drafters.medusa import MedusaConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.decode.verification import TypicalVerificationConfig
from fewstep.decode.verify import verify
from fewstep.hub.heads import companion
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.tuning import heads_at_hand
from fewstep.report.contest import PLAIN, RaceConfig, Spread
from fewstep.report.grid import Grid, GridConfig, run_grid

_WARM, _HOT = 0.7, 1.0  # the paper's temperature, and the one at which a law is the model's own
_JUDGE = TypicalVerificationConfig()
_DRAFTED, _TYPICAL = "medusa", f"medusa, {_JUDGE.label}"
_MEDUSA = "arXiv 2401.10774"

TOKENS = Criterion(
    "tokens-gained",
    "typical acceptance boosts the acceptance rate: tokens per call over those of exact verification, temperature 0.7",
    f"{_MEDUSA}, abstract and section 3.3.2",
    "at least",
    1.0,
)
SPEED = Criterion("speed-gained", "the same in speed", f"{_MEDUSA}, abstract and section 3.3.2", "at least", 1.0)
GREEDY = Criterion(
    "tokens-over-greedy",
    "it makes drawing even faster than greedy decoding: tokens per call at temperature 0.7 over those of greedy decoding",
    "the authors' announcement, together.ai, September 2023",
    "at least",
    1.0,
)
HOTTER = Criterion(
    "gain-grows",
    "exact verification loses more as the temperature rises: tokens gained at temperature 1 over those gained at 0.7",
    f"{_MEDUSA}, section 2.3.1, recalled",
    "at least",
    1.0,
)
VARIATION = Criterion(
    "total-variation",
    "the law of a token given the text before it is the model's, which the paper gives up: mean total variation, temperature 0.7",
    "fewstep's own goal: what `fewstep exactness` promises to see",
    "at most",
    0.01,
)


@final
class Deviations:
    """A `Verify` that notes how far typical acceptance is from the target's law, tree by tree and token by token, exactly.

    Given the text and the tree, typical acceptance draws nothing but the last token of a step: a drafted token x that is kept has
    all the mass where the target gives it p(x), a total variation of 1 - p(x); the drawn one has the target's law, 0. `first`: of
    the next token of every step and row; `all`: of every token that this verification emits. `follow` judges in its place, so
    that the text is another's; then only `first` means something.
    """

    def __init__(self, follow: Verify | None = None) -> None:
        self.first: list[float] = []
        self.all: list[float] = []
        self._typical, self._follow = _JUDGE.build(), follow

    def __call__(self, tree: Tree, p: torch.Tensor, rng: Rng) -> Verdict:
        verdict = self._typical(tree, p, rng)
        rows = torch.arange(tree.batch, device=p.device).unsqueeze(1)
        nodes = verdict.path[:, 1:]
        lost = 1 - p[rows, verdict.path[:, :-1], tree.tokens.gather(1, nodes)]
        for row, keep in zip(lost.tolist(), verdict.keep.tolist(), strict=True):
            found = [*row[: keep - 1], 0.0]
            self.first.append(found[0])
            self.all += found
        return verdict if self._follow is None else self._follow(tree, p, rng)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    model, effort = bench.model, bench.effort
    if model.tokenizer is None:
        raise ValueError("model: has no tokenizer to read prompts with; load it with its tokenizer.json")
    ids = [model.tokenizer.encode(prompt.prompt) for prompt in bench.prompts[: effort.count]]
    drafters = {PLAIN: SilentConfig(), _DRAFTED: MedusaConfig(path=heads_at_hand(bench, _DRAFTED))}
    race = RaceConfig(
        max_new_tokens=effort.max_new_tokens,
        rounds=effort.rounds,
        count=len(ids),
        peers=False,
        seed=effort.seed,
        verification=_JUDGE,
    )
    plan = GridConfig(temperatures=(0.0, _WARM, _HOT), batches=(1,), race=race)
    grid = run_grid(model, drafters, ids, plan, bench.kept or bench.scratch, bench.console)
    grid.show(bench.console)
    yield from _gains(grid)
    bench.console.print("comparing laws token by token")
    drafter = drafters[_DRAFTED].build(model.network, companion(model))
    found = {}
    for temperature in (_WARM, _HOT):
        own, steps = Deviations(), Deviations(follow=verify)
        for judge in (own, steps):
            settings = Settings(effort.max_new_tokens, budget=race.budget, verify=judge)
            decode(model.network, drafter, ids, settings, sampling=SamplingConfig(temperature=temperature), seed=effort.seed)
        found[temperature] = {"own text": told(own.all), "starts of steps, the model's text": told(steps.first)}
    warm, hot = (found[temperature]["own text"] for temperature in (_WARM, _HOT))
    starts = found[_WARM]["starts of steps, the model's text"]
    how = (
        f"epsilon {_JUDGE.epsilon:g}, delta {_JUDGE.delta:g}: largest {warm['max']:.3f} over {warm['contexts']} contexts of its "
        f"own text; at the starts of steps on the model's own text mean {starts['mean']:.3f}, largest {starts['max']:.3f}; "
        f"at temperature {_HOT:g} mean {hot['mean']:.3f}, largest {hot['max']:.3f}"
    )
    yield Finding(VARIATION, warm["mean"], how, {f"temperature {key:g}": value for key, value in found.items()})


def told(deviations: Sequence[float]) -> dict[str, float]:
    """The mean and the largest of total variations, and over how many contexts."""
    return {"mean": sum(deviations) / len(deviations), "max": max(deviations), "contexts": len(deviations)}


def _gains(grid: Grid) -> Iterator[Finding]:
    cells = {temperature: cell for (temperature, _), cell in grid.cells.items()}
    tokens = {key: (cell[_TYPICAL]["tokens_per_call"], cell[_DRAFTED]["tokens_per_call"]) for key, cell in cells.items()}
    gain = {key: lossy / exact for key, (lossy, exact) in tokens.items()}
    warm = cells[_WARM]
    rounds = zip(warm[_DRAFTED]["seconds"], warm[_TYPICAL]["seconds"], strict=True)
    speed = Spread.of([theirs / mine for theirs, mine in rounds])
    over = {name: warm[name]["speed_over_plain"]["median"] for name in (_TYPICAL, _DRAFTED)}
    (lossy, exact), (_, greedy) = tokens[_WARM], tokens[0.0]
    hot = f"{tokens[_HOT][0]:.2f} for {tokens[_HOT][1]:.2f} at temperature {_HOT:g}"
    yield Finding(TOKENS, gain[_WARM], f"{lossy:.2f} for {exact:.2f}", grid.as_dict())
    how = f"{speed.low:.2f} to {speed.high:.2f}; {over[_TYPICAL]:.2f} and {over[_DRAFTED]:.2f} times the speed of plain decoding"
    yield Finding(SPEED, speed.median, how)
    yield Finding(GREEDY, lossy / greedy, f"{lossy:.2f} for {greedy:.2f}")
    yield Finding(HOTTER, gain[_HOT] / gain[_WARM], hot)


CLAIM = Claim(
    "typical-acceptance",
    "Cai et al. 2024, Medusa, arXiv 2401.10774, section 2.3.1",
    "Keeping drafts that the model finds typical, where exact verification would reject some, makes drawing faster; lossy.",
    (TOKENS, SPEED, GREEDY, HOTTER, VARIATION),
    measure,
)
