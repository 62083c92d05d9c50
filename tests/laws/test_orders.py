"""Orders against a joint that can be enumerated: one token a step with the exact denoiser samples it, whatever the order."""

from typing import Any

import pytest
import torch
from enumerated import Joint, run, variation
from scipy.stats import chi2
from torch import Tensor

from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.diffusion.corruptions import CORRUPTIONS, Interpolating
from fewstep.diffusion.orders import ORDERS
from fewstep.diffusion.orders.reverse import Reversing

ALARM = 1e-7  # a test of several orders and seeds
SINGLE: dict[str, dict[str, Any]] = {  # the settings under which each order reveals one token a step
    "random": {"per_step": 1},
    "confidence": {"per_step": 1},
    "margin": {"per_step": 1},
    "entropy": {"per_step": 1},
    "threshold": {"threshold": 1.0},
    "factor": {"factor": 1e-9},
    "entropy-bound": {"bound": 0.0},
    "editing": {"threshold": 1.0, "edit": 1.0},
    "first-hitting": {},
}
REVERSING = ("ancestral", "euler", "analytic", "remasking")


def order_of(kind: str, **fields: Any) -> Any:
    return parse(ORDERS[kind], fields).build()  # type: ignore[attr-defined]


def absorbing(joint: Joint) -> Interpolating:
    return CORRUPTIONS["absorbing"]().build(joint.vocab + 1, joint.vocab)  # type: ignore[attr-defined, no-any-return]


def uniform(joint: Joint) -> Interpolating:
    return CORRUPTIONS["uniform"]().build(joint.vocab)  # type: ignore[attr-defined, no-any-return]


def blank(joint: Joint, count: int) -> tuple[Tensor, Tensor]:
    x = torch.full((count, joint.length), joint.vocab)
    return x, torch.ones_like(x, dtype=torch.bool)


def grid(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def sample(joint: Joint, kind: str, fields: dict[str, Any], count: int, seed: int, steps: int = 6) -> tuple[Tensor, int]:
    """[S] the shares of what was sampled, and the steps it took."""
    corruption = absorbing(joint)
    x, free = blank(joint, count)
    y, taken = run(order_of(kind, **fields), corruption, grid(steps), x, free, joint.denoiser(corruption), seed)
    assert int(y.max()) < joint.vocab
    return joint.shares(y), taken


def implausible(shares: Tensor, law: Tensor, count: int) -> float:
    """The probability of a chi-square at least as large, cells of few expected draws taken together."""
    expected = law * count
    few = expected < 10
    cells = [(shares[~few] * count, expected[~few])]
    if bool(few.any()):
        cells.append((shares[few].sum(0, keepdim=True) * count, expected[few].sum(0, keepdim=True)))
    found, wanted = (torch.cat(parts) for parts in zip(*cells, strict=True))
    return float(chi2.sf(float(((found - wanted) ** 2 / wanted).sum()), len(found) - 1))


def test_every_order_is_enrolled() -> None:
    assert {*SINGLE, *REVERSING} == set(ORDERS)


@pytest.mark.parametrize("kind", SINGLE)
def test_one_token_a_step_samples_the_data(kind: str, seed: int) -> None:
    joint = Joint.drawn(3, 4, seed)
    shares, taken = sample(joint, kind, SINGLE[kind], 4000, seed)
    assert taken == 4 and implausible(shares, joint.law, 4000) > ALARM


@pytest.mark.parametrize("kind", ["confidence", "threshold"])
def test_ranking_by_the_sampled_token_does_not(kind: str, seed: int) -> None:
    """The published rule, as the option says, on the same draws: total variation about 0.5 where the other's is its noise."""
    joint = Joint.drawn(3, 4, seed)
    shares, _ = sample(joint, kind, {**SINGLE[kind], "rank_by": "sampled"}, 4000, seed)
    exact, _ = sample(joint, kind, SINGLE[kind], 4000, seed)
    assert variation(shares, joint.law) > 0.25 and variation(exact, joint.law) < 0.12
    assert implausible(shares, joint.law, 4000) < ALARM


def chain(joint: Joint, kind: str, corruption: Interpolating, steps: int, **fields: Any) -> Tensor:
    """[S] the law of what a reversing order samples along the grid, by matrices over all sequences; no draw is made."""
    order: Reversing = order_of(kind, **fields)
    masked = len(corruption.prior) > joint.vocab
    states, predict, times = joint.noisy(masked), joint.denoiser(corruption), grid(steps)
    start = torch.ones(len(states), dtype=torch.float64)
    for j in range(joint.length):
        start = start * corruption.prior[states[:, j]]
    law = start
    for i in range(steps):
        t, s = times[i].expand(len(states)), times[i + 1].expand(len(states))
        p_0 = predict(states, t).nan_to_num(0)
        each = corruption.posterior(states, p_0, t, s) if i + 1 == steps else order.law(corruption, states, p_0, t, s)
        each = each / each.sum(-1, keepdim=True)
        moves = torch.ones(len(states), len(states), dtype=torch.float64)
        for j in range(joint.length):
            moves = moves * each[:, j, states[:, j]]
        law = law @ moves
    assert float(law.sum()) == pytest.approx(1, abs=1e-9)
    final = torch.zeros_like(joint.law)
    clean = (states < joint.vocab).all(1)
    assert float(law[~clean].sum()) < 1e-9
    return final.index_add(0, joint.index(states[clean]), law[clean])


@pytest.mark.parametrize("kind", REVERSING)
@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_reversing_orders_converge_to_the_data(name: str, kind: str, seed: int) -> None:
    """The law itself, without a draw: its error falls with the step, at first order."""
    joint = Joint.drawn(3, 3, seed)
    corruption = {"absorbing": absorbing, "uniform": uniform}[name](joint)
    if (name, kind) == ("uniform", "remasking"):
        with pytest.raises(ValueError, match=r"^order='remasking': [^\n]*; choose [^\n]*$"):
            chain(joint, kind, corruption, 4)
        return
    far, near = (variation(chain(joint, kind, corruption, steps), joint.law) for steps in (32, 128))
    assert near < 0.01 and near < 0.5 * far


def test_analytic_steps_are_the_posterior_s(seed: int) -> None:
    """With scores of a law Tweedie's step is the ancestral one, under either corruption (arXiv 2406.03736)."""
    joint = Joint.drawn(3, 3, seed)
    for corruption in (absorbing(joint), uniform(joint)):
        ancestral, analytic = (chain(joint, kind, corruption, 8) for kind in ("ancestral", "analytic"))
        torch.testing.assert_close(ancestral, analytic, rtol=1e-6, atol=1e-9)


def test_without_remasking_it_is_ancestral(seed: int) -> None:
    joint = Joint.drawn(3, 3, seed)
    plain, capped = (
        chain(joint, kind, absorbing(joint), 8, **fields) for kind, fields in (("ancestral", {}), ("remasking", {"cap": 0}))
    )
    torch.testing.assert_close(plain, capped, rtol=1e-9, atol=1e-12)
    assert variation(plain, chain(joint, "remasking", absorbing(joint), 8, cap=0.5)) > 1e-4


@pytest.mark.parametrize("kind", ORDERS)
def test_given_tokens_stay_and_rows_draw_for_themselves(kind: str, seed: int) -> None:
    joint = Joint.drawn(3, 4, seed)
    corruption, count = absorbing(joint), 30
    x, free = torch.randint(3, (count, 4)), torch.rand(count, 4) < 0.5
    x = torch.where(free, joint.vocab, x)
    predict, order = joint.denoiser(corruption), order_of(kind)
    y, _ = run(order, corruption, grid(4), x, free, predict, seed)
    assert torch.equal(y[~free], x[~free]) and int(y.max()) < joint.vocab
    for row in (0, 17):
        alone, _ = run(order, corruption, grid(4), x[row : row + 1], free[row : row + 1], predict, seed + row)
        assert torch.equal(alone[0], y[row])


@pytest.mark.parametrize("kind", ["random", "confidence", "margin", "entropy"])
@pytest.mark.parametrize(("steps", "counts"), [(4, [2, 2, 2, 1]), (3, [3, 2, 2]), (1, [7]), (20, [1] * 7)])
def test_the_grid_says_how_many_are_revealed(kind: str, steps: int, counts: list[int], seed: int) -> None:
    corruption = CORRUPTIONS["absorbing"]().build(6, 5)  # type: ignore[attr-defined]
    law = torch.rand(1, 9, 6, dtype=torch.float64).index_fill(-1, torch.tensor([5]), 0)
    law = law / law.sum(-1, keepdim=True)
    x, free = torch.full((1, 9), 5), torch.tensor([[True] * 7 + [False] * 2])
    x[:, 7:] = 0
    order = order_of(kind)
    memory, found, seen = order.init(x, free, corruption, grid(steps)), [], []
    while not bool(memory.done.all()):
        before = int((x == 5).sum())
        x, memory = order.step(lambda x, t: seen.append(float(t)) or law, x, len(found), memory, CounterRng.seeded([seed]))  # type: ignore[func-returns-value]
        found.append(before - int((x == 5).sum()))
    assert found == counts and seen[0] == 1 and seen == sorted(seen, reverse=True)


def fixed(sure: list[float]) -> Tensor:
    """[1,L,3]: laws whose most probable token has these probabilities."""
    return torch.tensor([[[p, 1 - p, 0.0] for p in sure]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "fields", "sure", "chosen"),
    [
        ("threshold", {"threshold": 0.8}, [0.95, 0.7, 0.81, 0.6], [0, 2]),
        ("threshold", {"threshold": 0.99}, [0.95, 0.7, 0.96, 0.6], [2]),
        ("factor", {"factor": 1.0}, [0.8, 0.7, 0.76, 0.6], [0, 2]),  # 3 x 0.24 < 1, 4 x 0.3 > 1
        ("factor", {"factor": 0.1}, [0.8, 0.7, 0.76, 0.6], [0]),
        ("entropy-bound", {"bound": 0.4}, [0.99, 0.9, 0.6, 0.7], [0, 1, 3]),  # 0.056 + 0.325 < 0.4, + 0.611 > 0.4
        ("entropy-bound", {"bound": 0.0}, [0.99, 0.9, 0.6, 0.7], [0]),
        ("confidence", {"per_step": 2}, [0.6, 0.9, 0.7, 0.8], [1, 3]),
        ("margin", {"per_step": 3}, [0.6, 0.9, 0.7, 0.8], [1, 2, 3]),
        ("entropy", {"per_step": 1}, [0.6, 0.9, 0.7, 0.8], [1]),
    ],
)
def test_what_a_step_reveals(kind: str, fields: dict[str, Any], sure: list[float], chosen: list[int]) -> None:
    corruption = CORRUPTIONS["absorbing"]().build(3, 2)  # type: ignore[attr-defined]
    x = torch.full((1, len(sure)), 2)
    order = order_of(kind, **fields)
    memory = order.init(x, torch.ones_like(x, dtype=torch.bool), corruption, grid(4))
    y, _ = order.step(lambda x, t: fixed(sure), x, 0, memory, CounterRng.seeded([0]))
    assert (y[0] != 2).nonzero().squeeze(1).tolist() == chosen


def test_ranking_ignores_the_temperature(seed: int) -> None:
    """Greedy tokens in the order of the predicted law: cutting the law first would make all positions equally sure."""
    corruption = CORRUPTIONS["absorbing"]().build(3, 2)  # type: ignore[attr-defined]
    x = torch.full((1, 3), 2)
    order = order_of("confidence", per_step=1, temperature=0)
    memory = order.init(x, torch.ones_like(x, dtype=torch.bool), corruption, grid(3))
    y, _ = order.step(lambda x, t: fixed([0.6, 0.9, 0.7]), x, 0, memory, CounterRng.seeded([seed]))
    assert y.tolist() == [[2, 0, 2]]


def test_editing_changes_what_was_placed_and_ends_with_the_grid() -> None:
    corruption = CORRUPTIONS["absorbing"]().build(3, 2)  # type: ignore[attr-defined]
    order = order_of("editing", threshold=0.8, edit=0.9, temperature=0)
    x, free = torch.tensor([[1, 1, 2, 2]]), torch.tensor([[False, True, True, True]])
    memory = order.init(x, free, corruption, grid(2))
    x, memory = order.step(lambda x, t: fixed([0.95, 0.95, 0.85, 0.6]), x, 0, memory, CounterRng.seeded([0]))
    assert x.tolist() == [[1, 0, 0, 2]] and not bool(memory.done)
    x, memory = order.step(lambda x, t: fixed([0.95, 0.05, 0.15, 0.6]), x, 1, memory, CounterRng.seeded([0]))
    assert x.tolist() == [[1, 1, 0, 0]] and bool(memory.done)  # 0.95 is enough for an edit, 0.85 is not


@pytest.mark.parametrize("kind", [*SINGLE, "remasking"])
def test_what_needs_a_mask_refuses_uniform_noise(kind: str) -> None:
    joint = Joint.drawn(3, 3, 0)
    x = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"^order='{kind}': [^\n]*; choose ancestral, euler or analytic$"):
        run(order_of(kind), uniform(joint), grid(2), x, x == 0, joint.denoiser(uniform(joint)), 0)


@pytest.mark.parametrize("times", [[1.0], [1.0, 0.5], [0.0, 1.0], [1.5, 0.0], [1.0, 1.0, 0.0], [[1.0, 0.0]]])
@pytest.mark.parametrize("kind", ["random", "ancestral"])
def test_a_grid_that_does_not_fall_to_data_is_refused(kind: str, times: Any) -> None:
    joint = Joint.drawn(3, 3, 0)
    x, free = blank(joint, 1)
    with pytest.raises(ValueError, match=r"^grid: expected times [^\n]*; use torch.linspace[^\n]*$"):
        order_of(kind).init(x, free, absorbing(joint), torch.tensor(times))


@pytest.mark.claims
@pytest.mark.parametrize(("vocab", "length"), [(3, 4), (4, 4)])
@pytest.mark.parametrize("kind", SINGLE)
def test_twenty_thousand_draws_are_within_the_noise(kind: str, vocab: int, length: int) -> None:
    """Total variation at most 1.5 times that of as many draws of the data; at 2 and 4 tokens a step it is what it is."""
    joint, count = Joint.drawn(vocab, length, 1), 20_000
    drawn = torch.multinomial(joint.law, count, replacement=True, generator=torch.Generator().manual_seed(2))
    floor = variation(torch.bincount(drawn, minlength=len(joint.law)) / count, joint.law)
    one = variation(sample(joint, kind, SINGLE[kind], count, 3)[0], joint.law)
    print(f"{kind} on {vocab}^{length}: one token a step {one:.4f}, the noise of the draws {floor:.4f}")
    if kind in ("random", "confidence", "margin", "entropy"):
        several = [variation(sample(joint, kind, {"per_step": k}, count, 3)[0], joint.law) for k in (2, 4)]
        print(f"  at 2 and 4 tokens a step {several[0]:.3f} and {several[1]:.3f}")
    assert one < 1.5 * floor
