"""The order of objectives after equal steps: autoregressive, block diffusion of 4 and of 16, masked diffusion; and score entropy.

The papers' models are a hundred times larger and train a thousand times longer. Equal steps are not equal time: seconds are told.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.trained_text import bits_after

_BD3, _MDLM = "arXiv 2503.09573, tables 3 and 4", "arXiv 2406.07524, table 1"
_NAMES = ("ar", "block-4", "block-16", "mdlm", "sedd")


def _gap(name: str, less: str, more: str, origin: str) -> Criterion:
    return Criterion(name, f"bits per byte of {more} less those of {less}: the least over seeds", origin, "at least", 0.0)


GAPS: Mapping[tuple[str, str], Criterion] = MappingProxyType(
    {
        ("ar", "block-4"): _gap("ar-block-4", "an autoregressive model", "block diffusion of 4", _BD3),
        ("block-4", "block-16"): _gap("block-4-block-16", "block diffusion of 4", "block diffusion of 16", _BD3),
        ("block-16", "mdlm"): _gap("block-16-mdlm", "block diffusion of 16", "MDLM", _BD3),
    }
)
SEDD = Criterion(
    "sedd-mdlm",
    "bits per byte of SEDD and of MDLM, how far apart in the mean over seeds",
    f"{_MDLM}; the threshold is fewstep's own",
    "at most",
    0.1,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria: `rounds` seeds of `steps` each."""
    effort = bench.effort
    seeds = range(effort.seed, effort.seed + effort.rounds)
    found = {(name, seed): bits_after(bench, name, effort.steps, seed) for seed in seeds for name in _NAMES}
    how = f"{effort.rounds} seeds, {effort.steps} steps"
    for (less, more), criterion in GAPS.items():
        gaps = {f"seed {seed}": found[more, seed]["bits"] - found[less, seed]["bits"] for seed in seeds}
        pairs = [(name, seed) for name in (less, more) for seed in seeds]
        numbers = gaps | {f"{name}, seed {seed}, {key}": v for name, seed in pairs for key, v in found[name, seed].items()}
        yield Finding(criterion, min(gaps.values()), how, numbers)
    apart = {f"seed {seed}": found["sedd", seed]["bits"] - found["mdlm", seed]["bits"] for seed in seeds}
    yield Finding(
        SEDD, abs(sum(apart.values()) / len(apart)), how, apart | {"sedd, seconds": found["sedd", effort.seed]["seconds"]}
    )


CLAIM = Claim(
    "diffusion-order",
    "Arriola et al. 2025, arXiv 2503.09573; Sahoo et al. 2024, arXiv 2406.07524; Lou et al. 2024, arXiv 2310.16834",
    "After equal steps the bits rise from autoregressive models over block diffusion, the longer the block the more, to masked "
    "diffusion, which score entropy with an absorbing state equals.",
    (*GAPS.values(), SEDD),
    measure,
)
