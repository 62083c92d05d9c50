"""Claims about cost: what is counted is what there is, where lines cross, and the whole of each claim at a small size."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from fewstep.core.mixer import Context
from fewstep.core.objective import Batch
from fewstep.nn.mixers import MIXERS
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.mixers.linear import LinearConfig
from fewstep.report.claims import CLAIMS, flash_memory, gau, linear_cost
from fewstep.report.claims.claim import Effort
from fewstep.report.claims.counts import most_bytes, multiply_adds
from fewstep.training.plan import Run


def test_bytes_are_those_that_live_at_once() -> None:
    x = torch.ones(100, dtype=torch.float64)

    def call() -> None:
        first = x + 1  # 800 bytes
        second = first[:50] * 2  # 400 more, while the view is of the same
        del first
        second.add_(1)
        _ = torch.cat([second, x[:25]])  # 600 where 400 are

    assert most_bytes(call, [x]) == 1200
    assert most_bytes(lambda: x.view(10, 10).mul_(1), [x]) == 0
    assert most_bytes(lambda: x.view(10, 10), []) == 800, "what is not known beforehand is counted when first met"


def test_multiply_adds_of_products_and_of_fused_attention() -> None:
    x, y = torch.ones(3, 5), torch.ones(5, 7)
    assert multiply_adds(lambda: x @ y) == 3 * 5 * 7
    q, k, v = (torch.randn(2, 3, length, 8) for length in (6, 10, 10))
    assert multiply_adds(lambda: scaled_dot_product_attention(q, k, v)) == 2 * 3 * 6 * 10 * (8 + 8)
    q = torch.randn(2, 3, 10, 8)
    assert multiply_adds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True)) == 2 * 3 * 55 * (8 + 8)


def test_where_costs_cross() -> None:
    """A token costs 100 with the one and its length with the other."""
    lengths = (16, 64, 256, 512)
    assert linear_cost.crossover({n: [100 * n, n * n] for n in lengths}) == pytest.approx(100)
    assert linear_cost.crossover({n: [10 * n, n * n] for n in lengths}) == 16
    assert linear_cost.crossover({n: [1000 * n, n * n] for n in lengths}) is None
    assert linear_cost.crossover({8: [8, 16], 16: [32, 16], 32: [32, 64]}) == pytest.approx(24)  # only the last one counts


def test_the_state_of_linear_attention_does_not_grow() -> None:
    linear, softmax = (config.build(width=256, heads=4) for config in (LinearConfig(), AttentionConfig()))
    assert linear_cost.bytes_of_state(linear, 3) == linear_cost.bytes_of_state(linear, 70) == 4 * 4 * 64 * 65
    assert linear_cost.bytes_of_state(softmax, 70) == 70 * 2 * 256 * 4


def test_the_claim_of_linear_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cost, "_LENGTHS", (64, 128, 512))
    monkeypatch.setattr(linear_cost, "_MIDDLE", 128)
    monkeypatch.setattr(linear_cost, "_LONG", 512)
    found = measured("linear-cost", Effort(rounds=1))
    assert found["state-is-constant"] == 1.0
    growing = AttentionConfig().build(width=256, heads=4)
    x, positions = torch.randn(1, 9, 256), torch.arange(9)[None]
    products = 4 * 256 * 256 * 9 + 45 * 2 * 256
    assert multiply_adds(lambda: growing(x, Context(positions))) == products


def test_the_claim_of_flash_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_memory, "_LENGTHS", (256, 1024))
    found = measured("flash-memory", Effort())
    tiled = [found[name] for name in ("linear", "linear-with-a-bias", "linear-as-a-mixer")]
    assert max(tiled) < 5 < 12 < found["the-formula-is-quadratic"], "four times the length"
    assert found["exact"] < 1e-10 and found["saved"] > 2


def test_units_and_blocks_have_as_many_parameters() -> None:
    units, blocks = gau.configs(2048)
    assert gau.size_of(units) == pytest.approx(gau.size_of(blocks), rel=2e-3)
    assert [mixer.kind for mixer in units.mixers] == ["gau"] and units.hidden == 0 and units.depth == 2 * blocks.depth
    assert [mixer.kind for mixer in blocks.mixers] == ["attention"] and blocks.hidden > 0


def test_the_claim_of_gau(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The units get the steps that cost as much as those of the blocks."""
    monkeypatch.setattr(gau, "_SIZES", Run(batch=2, length=16))

    class Text:
        def batch(self, step: int) -> Batch:
            return Batch(torch.arange(32).view(2, 16) % 7)

        def train(self, batch: int, length: int, seed: int) -> "Text":
            return self

        def validation(self, batch: int, length: int) -> list[Batch]:
            return [self.batch(0)] * 3

    monkeypatch.setattr(gau, "dataset_of", lambda bench: Text())
    found = list(CLAIMS["gau"].measure(bench_of(Effort(steps=5, count=2), tmp_path)))
    assert tuple(finding.criterion for finding in found) == CLAIMS["gau"].criteria
    units, blocks = found[0].numbers["gau"], found[0].numbers["attention and MLP"]
    spent = units["steps"] * units["multiply-adds a sequence"], blocks["steps"] * blocks["multiply-adds a sequence"]
    assert abs(spent[0] - spent[1]) <= units["multiply-adds a sequence"]
    assert found[0].value == units["loss"] - blocks["loss"] and found[1].verdict == "reproduced"


def test_the_claims_are_named_by_their_mixers() -> None:
    for claim, mixer in (("gau", "gau"), ("linear-cost", "linear"), ("flash-memory", "attention")):
        assert {kind for kind, config in MIXERS.items() if claim in config.claims} == {mixer}


def bench_of(effort: Effort, scratch: Path) -> Any:
    model = SimpleNamespace(network=SimpleNamespace(vocab=16))
    return SimpleNamespace(effort=effort, scratch=scratch, console=Console(quiet=True), model=model)


def measured(name: str, effort: Effort) -> dict[str, Any]:
    found = list(CLAIMS[name].measure(bench_of(effort, Path())))
    assert tuple(finding.criterion for finding in found) == CLAIMS[name].criteria
    return {finding.criterion.name: finding.value for finding in found}
