"""Masked diffusion trained on stratified counts of masks beside antithetic times: a quieter loss, and what it saves.

Counts spread evenly over the batch are published for evaluation only; as a way to train they are fewstep's own.
"""

from collections.abc import Iterator

from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.trained_text import bits_after

_SHARE = 0.7  # of the steps

FEWER = Criterion(
    "fewer-steps",
    f"bits per byte after {_SHARE:g}x the steps, less those of antithetic times after all of them: mean over seeds",
    "fewstep's own goal",
    "at most",
    0.0,
)
EQUAL = Criterion("equal-steps", "the same after as many steps: mean over seeds", "fewstep's own goal", "at most", 0.0)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria: `rounds` seeds of `steps` each."""
    effort = bench.effort
    seeds, fewer = range(effort.seed, effort.seed + effort.rounds), max(1, round(_SHARE * effort.steps))
    plain = {seed: bits_after(bench, "mdlm", effort.steps, seed) for seed in seeds}
    for criterion, steps in ((FEWER, fewer), (EQUAL, effort.steps)):
        found = {seed: bits_after(bench, "stratified", steps, seed) for seed in seeds}
        gaps = [found[seed]["bits"] - plain[seed]["bits"] for seed in seeds]
        numbers = {f"stratified, seed {seed}, {key}": value for seed in seeds for key, value in found[seed].items()}
        numbers |= {f"antithetic, seed {seed}, {key}": value for seed in seeds for key, value in plain[seed].items()}
        yield Finding(criterion, sum(gaps) / len(gaps), f"{effort.rounds} seeds, {steps} steps for {effort.steps}", numbers)


CLAIM = Claim(
    "stratified-count",
    "Nie et al. 2025, arXiv 2502.09992, appendix B.5 (evaluation); Sahoo et al. 2024, arXiv 2406.07524, section 3.5",
    "Training on stratified counts of masks reaches the bits of antithetic times in 0.7x the steps.",
    (FEWER, EQUAL),
    measure,
)
