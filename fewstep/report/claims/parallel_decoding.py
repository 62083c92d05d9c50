"""Parallel decoding by a confidence threshold: how many tokens a call reveals, and what that costs the text.

A lower threshold reveals more at once, as if they were independent; text that repeats itself is easy to be sure of. So tokens per
call count only where the entropy of the text is near that of an autoregressive model's.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.filling import FillConfig, Filling
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.diffusion.orders.adaptive import ThresholdConfig
from fewstep.models.model import Model
from fewstep.report.claims.at_hand import at_hand, encoded
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.text_cells import judged

_THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_ENTROPY = 0.8


def _pays(name: str, temperature: float) -> Criterion:
    return Criterion(
        name,
        f"the most tokens per call at thresholds {_THRESHOLDS[0]:g} to {_THRESHOLDS[-1]:g} that keep the text's entropy at "
        f"{_ENTROPY:g} times that of the autoregressive model's or more, temperature {temperature:g}",
        "arXiv 2505.22618, section 3.3 (the rule); the thresholds are fewstep's own",
        "at least",
        2.0,
    )


PAYS: Mapping[float, Criterion] = MappingProxyType({1.0: _pays("tokens-per-call", 1), 0.0: _pays("greedy-tokens-per-call", 0)})


def measure(bench: Bench) -> Iterator[Finding]:
    """Of each temperature, the whole curve; the bench's model is the judge of all texts, its own too."""
    ids = encoded(bench)
    found = at_hand(bench, "block", "code-block-distilled")
    for temperature, criterion in PAYS.items():
        autoregressive, curve = curve_of(bench, found.model, ids, temperature)
        best = best_of(curve)
        told = f"{len(ids)} prompts, {bench.effort.max_new_tokens} tokens each; {found.told}"
        how = f"no threshold keeps the entropy; {told}" if best is None else f"threshold {best['threshold']:g}; {told}"
        numbers = {"curve": curve, "autoregressive": autoregressive}
        yield Finding(criterion, 0.0 if best is None else best["tokens_per_call"], how, numbers)


def curve_of(
    bench: Bench, model: Model, prompts: Sequence[Sequence[int]], temperature: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How good the text of the bench's own model is, and that of `model` at every threshold, with its tokens per call."""
    effort, network = bench.effort, bench.model.network
    silent, sampling = SilentConfig().build(network, lambda path: network), SamplingConfig(temperature=temperature)
    seeds, settings = range(effort.seed, effort.seed + len(prompts)), Settings(max_new_tokens=effort.max_new_tokens)
    rows = decode(network, silent, prompts, settings, sampling=sampling, seed=seeds)
    autoregressive = judged(bench.model, bench.model, prompts, [row.tokens for row in rows])
    curve = []
    for threshold in _THRESHOLDS:
        order = ThresholdConfig(threshold=threshold, temperature=temperature)
        tokens, per_call = written(model, prompts, effort.max_new_tokens, order, seeds)
        quality = judged(bench.model, model, prompts, tokens)
        ratio = quality["entropy"] / autoregressive["entropy"]
        curve.append({"threshold": threshold, "tokens_per_call": per_call, "entropy_ratio": ratio, **quality})
        told = f"temperature {temperature:g}, threshold {threshold:g}: {per_call:.2f} tokens a call, entropy x {ratio:.2f}"
        bench.console.print(told, highlight=False)
    return autoregressive, curve


def written(
    model: Model, prompts: Sequence[Sequence[int]], new: int, order: ThresholdConfig, seeds: Sequence[int]
) -> tuple[list[list[int]], float]:
    """What a block model writes behind each prompt, `new` tokens, and the tokens per call; calls that only read are left out."""
    rows = [[*prompt, *[None] * new] for prompt in prompts]
    filling = Filling(model, rows, FillConfig(order=order, seed=tuple(seeds), ignore_eos=True))
    calls = [int(event.payload.calls.sum()) for event in filling.steps()]
    calls[0] = len(rows)  # in the first step a row may have read its prompt by calls of their own
    tokens = [result.tokens[len(prompt) :] for prompt, result in zip(prompts, filling.results(), strict=True)]
    return tokens, sum(map(len, tokens)) / sum(calls)


def best_of(curve: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The point of most tokens per call among those that keep the entropy; None where none does."""
    kept = [point for point in curve if point["entropy_ratio"] >= _ENTROPY]
    return max(kept, key=lambda point: float(point["tokens_per_call"]), default=None)


CLAIM = Claim(
    "parallel-decoding",
    "Wu et al. 2025, arXiv 2505.22618 (Fast-dLLM); Arriola et al. 2025, arXiv 2503.09573",
    "A block diffusion model that is trained enough reveals two tokens a call by confidence, and the text stays as varied.",
    tuple(PAYS.values()),
    measure,
)
