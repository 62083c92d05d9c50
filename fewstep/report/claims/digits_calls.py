"""How few calls the shipped model of digits needs for its own quality at 200, by solvers here and by schedulers of `diffusers`.

Both sides have the same weights and rows of noise. Each may choose its solver and grid, and the least number of calls over all of
them counts. A number of calls is enough if the Frechet distance of the samples is within 5% of that at 200, in the median over
seeds, and so it is with the next larger number and with every larger one that was tried.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import inf
from statistics import median
from typing import Any, cast, final

from torch import Tensor

from fewstep.core.random import CounterRng
from fewstep.diffusion.solvers.ode import DEISConfig
from fewstep.hub.arrays import load_arrays
from fewstep.models.denoiser import Denoiser
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.digits import TEACHER, Digits
from fewstep.report.claims.digits_entrants import KARRAS, Entrant, here, of_diffusers, sampled
from fewstep.report.contest import Spread

_MANY = 200  # calls, at which the model's own quality is taken, by DEIS-3 on a Karras grid
_ENOUGH = 1.05  # of its Frechet distance
_HOPELESS = 1.15  # beyond which a first seed is not asked again
_STATEMENT = "calls to come within 5% of the Frechet distance at 200, over those by the best scheduler of diffusers"
EQUAL = Criterion("calls", _STATEMENT, "fewstep's own aim", "at most", 1.0)
HALF = Criterion("half-the-calls", f"the same: {_STATEMENT}", "fewstep's own higher aim", "at most", 0.5)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    contest = Contest(bench, Digits(bench.effort.seed), cast(Denoiser, load_arrays(TEACHER).eval()))
    own, solver = contest.fewest(here())
    whole = Spread.of(contest.whole)
    told = f"{own} by {solver}, at {_MANY} {whole.median:.2f} [{whole.low:.2f}, {whole.high:.2f}]"
    peers = of_diffusers()
    if not peers:
        for criterion in (EQUAL, HALF):
            yield Finding(criterion, None, f"no peer: pip install diffusers; here {told}", contest.numbers)
        return
    theirs, scheduler = contest.fewest(peers)
    yield Finding(EQUAL, own / theirs, f"{theirs} by {scheduler}; here {told}", contest.numbers)
    yield Finding(HALF, own / theirs, f"{own} for {theirs}")


def least(within: Callable[[int], bool], counts: Sequence[int], below: float) -> int | None:
    """The least of the rising `counts` under `below` that is within, as the next larger one is and every larger one tried.

    None unless the largest under `below` is. Found by halving; `within` may be asked twice for a count.
    """

    def enough(place: int) -> bool:
        return all(within(count) for count in counts[place : place + 2])

    low, high = 0, bisect_left(counts, below) - 1
    if high < 0 or not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return counts[high]


@final
class Contest:
    """Entrants on the same rows of noise. `whole`: the Frechet distances at 200 calls, a seed each; `ratios`: those of an entrant
    over them, by its name and its calls."""

    def __init__(self, bench: Bench, digits: Digits, model: Denoiser) -> None:
        self._console, self._digits, self._model = bench.console, digits, model
        begin, count = bench.effort.seed, digits.count
        self._seeds = range(begin, begin + bench.effort.rounds * count, count)
        self._noise = [CounterRng.seeded(range(seed, seed + count)).normal(*model.shape).float() for seed in self._seeds]
        draw = partial(sampled, DEISConfig(), KARRAS)
        self.whole = [
            self._frechet(draw(model, noise, seed, _MANY)) for noise, seed in zip(self._noise, self._seeds, strict=True)
        ]
        self.ratios: dict[str, dict[int, list[float]]] = {}

    @property
    def numbers(self) -> dict[str, Any]:
        """All that was measured."""
        return {f"Frechet distance at {_MANY} calls": self.whole, "over it": self.ratios}

    def fewest(self, entrants: Sequence[Entrant]) -> tuple[int, str]:
        """The least number of calls that is enough for any of them, and for whom; 200 if none has enough with less."""
        calls, by = _MANY, "none of them"
        for entrant in entrants:
            found = least(partial(self.within, entrant), entrant.counts, calls)
            calls, by = (calls, by) if found is None else (found, entrant.name)
            self._console.print(f"{entrant.name}: {found or 'no less'}", highlight=False)
        return calls, by

    def within(self, entrant: Entrant, calls: int) -> bool:
        """Whether so many calls of an entrant are nearly as good as 200, in the median over seeds."""
        found = self.ratios.setdefault(entrant.name, {}).setdefault(calls, [])
        for whole, noise, seed in list(zip(self.whole, self._noise, self._seeds, strict=True))[len(found) :]:
            if found and found[0] > _HOPELESS:
                break
            found.append(self._frechet(entrant.draw(self._model, noise, seed, calls)) / whole)
        return median(found) <= _ENOUGH

    def _frechet(self, x_0: Tensor) -> float:
        """Infinite where a sample is not finite."""
        return self._digits.frechet(self._model.unnormed(x_0)) if bool(x_0.isfinite().all()) else inf


CLAIM = Claim(
    "digits-calls",
    "Karras et al. 2022, arXiv 2206.00364; Zhao et al. 2023, arXiv 2302.04867; Zhang and Chen 2023, arXiv 2204.13902",
    "With fewstep's best solver and grid a model of digits is as good as at 200 calls with no more calls than with the best "
    "scheduler of diffusers.",
    (EQUAL, HALF),
    measure,
)
