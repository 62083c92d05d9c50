"""Performer's random features: how far their products are from the exponentials they estimate, and which kind wins where.

Errors are known in closed form for independent projections, so the theory is checked first and the comparison made after. Vectors
have 16 channels; attention is over 64 keys.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fewstep.core.random import CounterRng
from fewstep.nn.mixers.performer import Kernel, projections, random_features
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding

_WIDTH, _KEYS, _PAIRS = 16, 64, 32  # channels, keys of an attention, pairs whose kernel is estimated
_COUNTS, _NORMS = (16, 64, 256, 1024), (1.0, 2.0)
_PAPER = "arXiv 2009.14794"

POSITIVE = Criterion(
    "positive-follows-theory",
    "m times the relative square error of positive features is exp(|q + k|^2) - 1: largest relative deviation, |q| = |k| = 1",
    f"{_PAPER}, lemma 2",
    "at most",
    0.15,
)
TRIGONOMETRIC = Criterion(
    "trigonometric-follows-theory",
    "of trigonometric ones exp(|q + k|^2 - 4 q k) (1 - exp(-|q - k|^2))^2 / 2: largest relative deviation, |q| = |k| = 1",
    f"{_PAPER}, lemma 2",
    "at most",
    0.15,
)
ORTHOGONAL = Criterion(
    "orthogonality-helps",
    "square error of positive features with orthogonal projections over that with independent ones, as many as channels",
    f"{_PAPER}, theorem 2",
    "at most",
    1.0,
)
FAR = Criterion(
    "positive-wins-with-few-features",
    "square error of attention's output with trigonometric features over that with positive ones, |q| = |k| = 2, 16 features",
    f"{_PAPER}, section 4.2 and figure 4",
    "at least",
    1.0,
)
ALWAYS = Criterion(
    "positive-wins-everywhere",
    "the same, the smallest over norms 1 and 2 and 16 to 1024 features",
    f"{_PAPER}, figure 4, read as a rule",
    "at least",
    1.0,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    effort = bench.effort
    rng = CounterRng.seeded([effort.seed])
    kernels: tuple[tuple[Criterion, Kernel], ...] = ((POSITIVE, "positive"), (TRIGONOMETRIC, "trigonometric"))
    for criterion, kernel in kernels:
        ratios = {f"{count} features": _over_theory(rng, kernel, count, effort.draws) for count in _COUNTS}
        worst = max(abs(ratio - 1) for ratio in ratios.values())
        how = f"{_PAIRS} random pairs, {effort.draws} draws of 16 features and as many fewer of more"
        yield Finding(criterion, worst, how, {"measured over theory": ratios})
    q, k = _sphere(rng.split("pairs"), 1.0)
    errors = [
        float(errors_of(q, k, rng.split("orthogonal"), _WIDTH, effort.draws, "positive", orthogonal=kind).mean())
        for kind in (True, False)
    ]
    yield Finding(ORTHOGONAL, errors[0] / errors[1], f"{_WIDTH} features", {"orthogonal": errors[0], "independent": errors[1]})
    outputs = {
        f"norm {norm:g}, {count} features": _outputs(rng, norm, count, effort.draws) for norm in _NORMS for count in _COUNTS
    }
    yield Finding(FAR, outputs["norm 2, 16 features"], "medians over draws of the projections", outputs)
    wins = "; ".join(name for name, ratio in outputs.items() if ratio < 1) or "nowhere"
    yield Finding(ALWAYS, min(outputs.values()), f"trigonometric features win at: {wins}", outputs)


def errors_of(q: Tensor, k: Tensor, rng: CounterRng, count: int, draws: int, kernel: Kernel, *, orthogonal: bool) -> Tensor:
    """[N] the mean square error, relative to exp(q k), of estimates for pairs q, k [N,E] over `draws` draws of projections."""
    exact = (q * k).sum(-1)
    total, size = torch.zeros_like(exact), max(1, 2**16 // count)
    for start in range(0, draws, size):
        rows = min(size, draws - start)
        blocks = -(-count // q.shape[1]) * q.shape[1]  # whole blocks of orthogonal vectors for each draw
        drawn = projections(rows * blocks, q.shape[1], rng.at(start), orthogonal=orthogonal).view(rows, blocks, -1)[:, :count]
        (of_q, scale_q), (of_k, scale_k) = (random_features(x, drawn, kernel) for x in (q, k))
        found = (of_q * of_k).sum(-1) / count * (scale_q + scale_k - exact).exp()
        total += (found - 1).square().sum(0)
    return total / draws


def theory(q: Tensor, k: Tensor, kernel: Kernel) -> Tensor:
    """[N] the relative mean square error of one independent feature (one sine and cosine) for pairs q, k [N,E]."""
    together, apart = (q + k).square().sum(-1), (q - k).square().sum(-1)
    if kernel == "positive":
        return together.expm1()
    return (together - 4 * (q * k).sum(-1)).exp() * apart.neg().expm1().square() / 2


def _over_theory(rng: CounterRng, kernel: Kernel, count: int, draws: int) -> float:
    """The measured error over that of theory, the mean over pairs of unit vectors."""
    q, k = _sphere(rng.split("pairs"), 1.0)
    fewer = max(200, draws * _COUNTS[0] // count)
    measured = errors_of(q, k, rng.split(f"{kernel} {count}"), count, fewer, kernel, orthogonal=False)
    return float((count * measured / theory(q, k, kernel)).mean())


def _outputs(rng: CounterRng, norm: float, count: int, draws: int) -> float:
    """The error of attention's output with trigonometric features over that with positive ones: medians over draws."""
    rng = rng.split(f"outputs {norm} {count}")
    q, k = ((norm * normalize(rng.split(name).normal(_KEYS, _WIDTH)[0], dim=-1)) for name in "qk")
    v = rng.split("v").normal(_KEYS, _WIDTH)[0]
    exact = (q @ k.mT).softmax(-1) @ v
    errors: dict[Kernel, list[float]] = {"positive": [], "trigonometric": []}
    for draw in range(max(16, draws // 500)):
        drawn = projections(count, _WIDTH, rng.at(draw), orthogonal=True)
        for kernel, found in errors.items():
            (of_q, _), (of_k, scale) = (random_features(x, drawn, kernel) for x in (q, k))
            weights = (of_q @ of_k.mT) * (scale - scale.max()).exp()
            output = weights @ v / weights.sum(-1, keepdim=True)
            found.append(float((output - exact).square().mean()))
    positive, trigonometric = (torch.tensor(found).median() for found in errors.values())
    return float(trigonometric / positive)


def _sphere(rng: CounterRng, norm: float) -> tuple[Tensor, Tensor]:
    """Two lots of random vectors of that norm, [N,E]."""
    q, k = (norm * normalize(rng.split(name).normal(_PAIRS, _WIDTH)[0], dim=-1) for name in "qk")
    return q, k


CLAIM = Claim(
    "performer",
    "Choromanski et al. 2020, Rethinking Attention with Performers, arXiv 2009.14794",
    "Positive random features estimate softmax attention with an error that theory gives; orthogonal ones with less, "
    "trigonometric ones with more.",
    (POSITIVE, TRIGONOMETRIC, ORTHOGONAL, FAR, ALWAYS),
    measure,
)
