"""TransNormer's bounded gradients: a norm in the place of linear attention's denominator, where scores vanish and in training."""

import json
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import elu, rms_norm

from fewstep.core.random import CounterRng
from fewstep.core.recipe import Config
from fewstep.nn.mixers.linear import LinearConfig
from fewstep.nn.mixers.transnormer import TransNormerConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.recall import Lists, decoder
from fewstep.report.claims.tasks import trained

_TOKENS, _WIDTH, _EPS = 32, 16, 1e-6
_SCALES = tuple(10.0**-power for power in range(0, 13, 2))  # of the scores
_SMALL = 1e-6
_PAPER = "arXiv 2210.10340"

UNBOUNDED = Criterion(
    "a-denominator-has-no-bound",
    "linear attention's largest gradient of a score, scores being a millionth, over the same with scores as they are",
    f"{_PAPER}, section 3, recalled; the threshold is fewstep's own",
    "at least",
    1e5,
)
BOUNDED = Criterion(
    "a-norm-has-one",
    "NormAttention's largest gradient of a score over 3 c1 c2 d / (2 sqrt(eps)), scores from 1 to 1e-12 of what they are",
    f"{_PAPER}, proposition on the gradients of NormAttention, recalled",
    "at most",
    1.0,
)
STEADY = Criterion(
    "steadier-training",
    "the relative deviation of gradient norms over a training with linear attention, over that with NormAttention",
    f"{_PAPER}, table 1, recalled",
    "at least",
    1.0,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    scores, values, upstream = _drawn(bench.effort.seed)
    linear = {scale: largest_gradient(scores * scale, values, upstream, norm=False) for scale in _SCALES}
    how = f"{_TOKENS} tokens of {_WIDTH} channels, float64, without the eps that implementations add to the denominator"
    yield Finding(UNBOUNDED, linear[_SMALL] / linear[1.0], how, _named(linear))
    normed = {scale: largest_gradient(scores * scale, values, upstream, norm=True) for scale in _SCALES}
    bound = 1.5 * float(upstream.abs().max() * values.abs().max()) * _WIDTH * _EPS**-0.5
    how = f"the bound is {bound:.3g} and comes from eps = {_EPS:g} alone: where sums are larger, gradients grow as without a norm"
    yield Finding(BOUNDED, max(normed.values()) / bound, how, _named(normed))
    spread = {config.kind: _spread(bench, config) for config in (LinearConfig(), TransNormerConfig())}
    how = f"{bench.effort.steps} steps of training on associative recall, the first tenth of the steps left out"
    yield Finding(STEADY, spread["linear"] / spread["transnormer"], how, spread)


def largest_gradient(scores: Tensor, values: Tensor, upstream: Tensor, *, norm: bool) -> float:
    """max |dL / ds_ij| of causal scores [T,T] through an attention with a norm or a denominator; `upstream` is dL / do [T,E]."""
    scores = scores.clone().requires_grad_()
    seen = scores.tril()
    output = rms_norm(seen @ values, values.shape[1:], eps=_EPS) if norm else seen @ values / seen.sum(1, keepdim=True)
    (gradient,) = torch.autograd.grad(output, scores, upstream)
    return float(gradient.tril().abs().max())


def _drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of features elu + 1, values, and the gradient of a loss by the outputs."""
    rng = CounterRng.seeded([seed])
    q, k, values, upstream = (rng.split(name).normal(_TOKENS, _WIDTH)[0] for name in ("q", "k", "v", "o"))
    return (elu(q) + 1) @ (elu(k) + 1).mT, values, upstream


def _spread(bench: Bench, mixer: Config) -> float:
    """The standard deviation of the gradient norms of a training over their mean."""
    trained(bench, decoder(mixer), Lists(bench.effort.seed), mixer.kind)
    lines = (bench.scratch / mixer.kind / "log.jsonl").read_text(encoding="utf-8").splitlines()
    norms = torch.tensor([record["grad_norm"] for line in lines if "grad_norm" in (record := json.loads(line))])
    norms = norms[len(norms) // 10 :]
    return float(norms.std() / norms.mean())


def _named(gradients: dict[float, float]) -> dict[str, float]:
    return {f"scores times {scale:g}": gradient for scale, gradient in gradients.items()}


CLAIM = Claim(
    "transnormer",
    "Qin et al. 2022, The Devil in Linear Transformer, arXiv 2210.10340",
    "Linear attention's denominator gives gradients without a bound; a norm in its place bounds them and steadies training.",
    (UNBOUNDED, BOUNDED, STEADY),
    measure,
)
