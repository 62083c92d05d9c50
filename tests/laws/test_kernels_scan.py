"""The selective scan against float64 loops, values and gradients, and the law that a channel depends on its own inputs alone."""

import pytest
import torch
from torch import Tensor

from fewstep.nn.kernels import selective_scan, selective_tree
from fewstep.nn.kernels.kernel import default_kernel
from fewstep.nn.kernels.scan import selective_blocks

pytest_plugins = ("kernel_paths",)

NAMES = ("u", "delta", "a", "b", "c", "start")
SIZES = [  # rows, tokens, channels, states
    (1, 1, 1, 1),
    (2, 70, 150, 16),
    (1, 33, 7, 5),
    (3, 32, 16, 4),
    (2, 64, 260, 16),
    (4, 9, 20, 17),
]


def drawn(sizes: tuple[int, int, int, int]) -> dict[str, Tensor]:
    batch, count, width, states = sizes
    return {
        "u": torch.randn(batch, count, width),
        "delta": torch.rand(batch, count, width) * 0.3,
        "a": -8 * torch.rand(states, width),
        "b": torch.randn(batch, count, states),
        "c": torch.randn(batch, count, states),
        "start": torch.randn(batch, states, width),
    }


def looped(inputs: dict[str, Tensor], parent: Tensor) -> tuple[Tensor, Tensor]:
    """y [B,T,D] and all states [B,T,N,D], token by token; `parent` as for trees."""
    u, delta, a, b, c, start = (inputs[name] for name in NAMES)
    rows, outputs = [], []
    for row in range(u.shape[0]):
        states: list[Tensor] = []
        for t, p in enumerate(parent[row].tolist()):
            before = states[p] if p >= 0 else start[row] if p == -1 else torch.zeros_like(start[row])
            decay, added = (delta[row, t] * a).exp(), torch.outer(b[row, t], delta[row, t] * u[row, t])
            states.append(decay * before + added)
        rows.append(torch.stack(states))
        outputs.append((c[row].unsqueeze(2) * rows[-1]).sum(1))
    return torch.stack(outputs), torch.stack(rows)


def chained(begins: Tensor) -> Tensor:
    """[B,T] the parents of packed chains."""
    order = torch.arange(-1, begins.shape[1] - 1).expand_as(begins)
    return torch.where(begins, -2, order)


def close(found: Tensor, wanted: Tensor) -> bool:
    """To float32's rounding of terms that are about 1, or as large as the largest sum of them."""
    return bool((found.double() - wanted).abs().max() <= 1e-5 * (1 + wanted.abs().max()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_float64_loops_and_so_do_the_gradients(kernel_path: str, sizes: tuple[int, int, int, int], packed: bool) -> None:
    inputs = drawn(sizes)
    begins = (torch.rand(sizes[:2]) < 0.1) if packed else torch.zeros(sizes[:2], dtype=torch.bool)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    y, last = selective_scan(*leaves.values(), begins if packed else None)
    weights = torch.randn_like(y), torch.randn_like(last)
    found = torch.autograd.grad((y, last), list(leaves.values()), weights)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    wide, states = looped(exact, chained(begins))
    weights = tuple(weight.double() for weight in weights)
    expected = torch.autograd.grad((wide, states[:, -1]), list(exact.values()), weights, materialize_grads=True)
    assert close(y, wide) and close(last, states[:, -1])
    for name, mine, wanted in zip(NAMES, found, expected, strict=True):
        assert close(mine, wanted), name
    with torch.no_grad():
        again = selective_scan(*inputs.values(), begins)
    assert torch.equal(again[0], y) and torch.equal(again[1], last)


@pytest.mark.parametrize("sizes", SIZES)
def test_trees_equal_float64_loops(kernel_path: str, sizes: tuple[int, int, int, int]) -> None:
    inputs = drawn(sizes)
    parent = torch.stack([torch.randint(-2, t, (sizes[0],)) for t in range(sizes[1])], 1)
    wide, _ = looped({name: x.double() for name, x in inputs.items()}, parent)
    with torch.no_grad():
        assert close(selective_tree(*inputs.values(), parent), wide)
    assert close(selective_tree(*(x.requires_grad_() for x in inputs.values()), parent).detach(), wide)  # the twin


def test_a_tree_of_one_branch_is_a_chain_to_the_bit(kernel_path: str) -> None:
    inputs = drawn((2, 40, 33, 16))
    parent = torch.arange(-1, 39).expand(2, -1)
    y, _ = selective_scan(*inputs.values())
    assert torch.equal(selective_tree(*inputs.values(), parent), y)


def test_rows_channels_tokens_and_threads_share_a_call_without_knowing(kernel_path: str, threads_restored: None) -> None:
    inputs = drawn((3, 130, 300, 16))
    whole, _ = selective_scan(*inputs.values())
    for count in (1, 2):
        torch.set_num_threads(count)
        for row in range(3):
            alone = {name: x if name == "a" else x[row : row + 1] for name, x in inputs.items()}
            assert torch.equal(selective_scan(*alone.values())[0][0], whole[row])
        few = {name: x[..., 17:90].contiguous() if name in ("u", "delta", "a", "start") else x for name, x in inputs.items()}
        assert torch.equal(selective_scan(*few.values())[0], whole[..., 17:90])
    pieces = [
        {name: x[:, part] for name, x in inputs.items() if name in ("u", "delta", "b", "c")}
        for part in (slice(47), slice(47, 130))
    ]
    first, state = selective_scan(**{**inputs, **pieces[0]})
    second, _ = selective_scan(**{**inputs, **pieces[1], "start": state})
    assert torch.equal(torch.cat([first, second], 1), whole)


def test_gradients_are_the_same_whatever_the_threads(kernel_path: str, threads_restored: None) -> None:
    leaves = [x.requires_grad_() for x in drawn((2, 70, 300, 16)).values()]
    weight, found = torch.randn(2, 70, 300), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(torch.autograd.grad((selective_scan(*leaves)[0] * weight).sum(), leaves))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_nan_stays_in_its_channel_and_after_its_token(kernel_path: str) -> None:
    inputs = drawn((2, 40, 20, 16))
    clean, _ = selective_scan(*inputs.values())
    inputs["u"][1, 30, 3] = torch.nan
    y, last = selective_scan(*inputs.values())
    assert bool(y[1, 30:, 3].isnan().all()) and bool(last[1, :, 3].isnan().all())
    y[1, 30:, 3] = clean[1, 30:, 3]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twin_takes_what_the_kernel_does_not(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_KERNELS", "off")
    default_kernel.cache_clear()
    try:
        inputs = {name: x.to(dtype) for name, x in drawn((2, 70, 12, 4)).items()}
        begins = torch.rand(2, 70) < 0.1
        wide, states = looped({name: x.double() for name, x in inputs.items()}, chained(begins))
        y, last = selective_scan(*inputs.values(), begins)
        assert y.dtype == dtype and close(y, wide) and close(last, states[:, -1])
    finally:
        default_kernel.cache_clear()


def test_gradients_of_the_twin(seed: int) -> None:
    """Over three blocks, the states of which are computed again in backward."""
    leaves = [x.double().requires_grad_() for x in drawn((2, 70, 3, 2)).values()]
    begins = torch.rand(2, 70) < 0.1
    assert torch.autograd.gradcheck(lambda *x: selective_blocks(*x, begins), leaves, fast_mode=True)
    parent = torch.stack([torch.randint(-2, t, (2,)) for t in range(70)], 1)
    assert torch.autograd.gradcheck(lambda *x: selective_tree(*x, parent), leaves, fast_mode=True)


def test_refusals_name_the_value_and_the_remedy(seed: int) -> None:
    inputs = drawn((2, 5, 8, 3))
    with pytest.raises(ValueError, match=r"shapes \(2, 5, 8\), .* expected [^\n]*$"):
        selective_scan(**{**inputs, "b": inputs["b"][..., 1:]})
    with pytest.raises(ValueError, match="shapes"):
        selective_tree(**{**inputs, "start": inputs["start"].mT}, parent=torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="shapes"):
        selective_scan(**{name: x[:, :0] if name in ("u", "delta", "b", "c") else x for name, x in inputs.items()})
    with pytest.raises(ValueError, match=r"torch.float64 on cpu.*expected one dtype"):
        selective_scan(**{**inputs, "c": inputs["c"].double()})
