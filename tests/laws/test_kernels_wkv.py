"""RWKV-4's weighted mean against float64 loops, values and gradients; channels depend on their own inputs alone."""

import pytest
import torch
from torch import Tensor

from fewstep.nn.kernels import wkv, wkv_after, wkv_empty, wkv_tree
from fewstep.nn.kernels.kernel import default_kernel
from fewstep.nn.kernels.wkv import Sums, wkv_blocks

pytest_plugins = ("kernel_paths",)

SIZES = [(1, 1, 1), (2, 70, 150), (1, 33, 7), (3, 32, 16), (2, 64, 260)]  # rows, tokens, channels
NAMES = ("k", "v", "fading", "bonus", "above", "below", "most")


def drawn(sizes: tuple[int, int, int]) -> list[Tensor]:
    batch, _, width = sizes
    k, v = torch.randn(2, *sizes).unbind()
    above, below, most = torch.randn(batch, width), 0.1 + torch.rand(batch, width), torch.randn(batch, width)
    return [k, v, 0.1 + 2 * torch.rand(width), torch.randn(width), above, below, most]


def looped(inputs: list[Tensor], begins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y and the sums behind the last token, exponentials summed as they are, token by token."""
    k, v, fading, bonus, above, below, most = inputs
    above, below, outputs = above * most.exp(), below * most.exp(), []
    for t in range(k.shape[1]):
        above, below = (torch.where(begins[:, t : t + 1], 0, x) for x in (above, below))
        own = (bonus + k[:, t]).exp()
        outputs.append((above + own * v[:, t]) / (below + own))
        above, below = (-fading).exp() * above + k[:, t].exp() * v[:, t], (-fading).exp() * below + k[:, t].exp()
    return torch.stack(outputs, 1), above, below


def plain(y: Tensor, last: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Sums that no longer depend on how they are written."""
    return y, last[0] * last[2].exp(), last[1] * last[2].exp()


def close(found: Tensor, wanted: Tensor) -> bool:
    """To float32's rounding of terms that are about 1, or as large as the largest sum of them."""
    return bool((found.double() - wanted).abs().max() <= 3e-5 * (1 + wanted.abs().max()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_float64_loops_and_so_do_the_gradients(kernel_path: str, sizes: tuple[int, int, int], packed: bool) -> None:
    inputs = drawn(sizes)
    begins = torch.rand(sizes[:2]) < (0.1 if packed else 0.0)
    leaves, exact = ([x.to(dtype).requires_grad_() for x in inputs[:6]] for dtype in (torch.float32, torch.float64))
    found = plain(*wkv(*leaves[:4], (leaves[4], leaves[5], inputs[6]), begins if packed else None))
    wanted = looped([*exact, inputs[6].double()], begins)
    weights = [torch.randn_like(x) for x in found]
    mine = torch.autograd.grad(found, leaves, weights)
    theirs = torch.autograd.grad(wanted, exact, [x.double() for x in weights], materialize_grads=True)
    assert all(close(one, two) for one, two in zip(found, wanted, strict=True))
    for name, one, two in zip(NAMES, mine, theirs, strict=False):
        assert close(one, two), name
    with torch.no_grad():
        again = plain(*wkv(*inputs[:4], (inputs[4], inputs[5], inputs[6]), begins))
    assert all(torch.equal(one, two) for one, two in zip(again, found, strict=True))


def test_keys_of_any_size_do_not_overflow(kernel_path: str) -> None:
    """Whole numbers up to a thousand, which float32 adds without rounding: exponentials would end at 88."""
    _, v, *_ = drawn((2, 100, 40))
    k, fading, bonus = (300 * torch.randn(2, 100, 40)).round(), torch.full((40,), 2.0), torch.randint(-3, 4, (40,)).float()
    k[:, 50] = 1000
    leaves = [k.requires_grad_(), v.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    y, _ = wkv(*leaves, fading, bonus, wkv_empty(2, 40, v))
    wide, _ = wkv_blocks(*exact, fading.double(), bonus.double(), wkv_empty(2, 40, v.double()), None)
    weight = torch.randn_like(y)
    found = y, *torch.autograd.grad(y, leaves, weight)
    wanted = wide, *torch.autograd.grad(wide, exact, weight.double())
    assert all(close(one, two) for one, two in zip(found, wanted, strict=True))


def test_rows_channels_tokens_and_threads_share_a_call_without_knowing(kernel_path: str, threads_restored: None) -> None:
    k, v, fading, bonus, *start = drawn((3, 130, 300))
    whole, _ = wkv(k, v, fading, bonus, (start[0], start[1], start[2]))
    some = slice(17, 90)
    for count in (1, 2):
        torch.set_num_threads(count)
        for row in range(3):
            a, b, m = (x[row : row + 1] for x in start)
            assert torch.equal(wkv(k[row : row + 1], v[row : row + 1], fading, bonus, (a, b, m))[0][0], whole[row])
        a, b, m = (x[:, some] for x in start)
        assert torch.equal(wkv(k[..., some], v[..., some], fading[some], bonus[some], (a, b, m))[0], whole[..., some])
    first, state = wkv(k[:, :47], v[:, :47], fading, bonus, (start[0], start[1], start[2]))
    second, _ = wkv(k[:, 47:], v[:, 47:], fading, bonus, state)
    assert torch.equal(torch.cat([first, second], 1), whole)


def test_gradients_are_the_same_whatever_the_threads(kernel_path: str, threads_restored: None) -> None:
    leaves = [x.requires_grad_() for x in drawn((2, 70, 300))]
    weight, found = torch.randn(2, 70, 300), []
    for count in (1, 2):
        torch.set_num_threads(count)
        y, _ = wkv(*leaves[:4], (leaves[4], leaves[5], leaves[6].detach()))
        found.append(torch.autograd.grad(y, leaves[:6], weight))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_gradients_of_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over three blocks, packed; over trees; over chains with gaps."""
    leaves = [x.double().requires_grad_() for x in drawn((2, 37, 3))]
    begins, most = torch.rand(2, 37) < 0.1, leaves[6].detach()
    assert torch.autograd.gradcheck(lambda *x: plain(*wkv_blocks(*x[:4], (x[4], x[5], most), begins)), leaves[:6], fast_mode=True)
    few = [x[:, :6].detach().requires_grad_() if x.ndim == 3 else x for x in leaves]
    sees = torch.eye(6, dtype=torch.bool).expand(2, -1, -1).clone()
    sees[:, 3, 0] = sees[:, 5, 3] = sees[:, 5, 0] = True
    fresh = torch.tensor([[False, True, False, False, True, False]] * 2)
    assert torch.autograd.gradcheck(lambda *x: wkv_tree(*x[:4], (x[4], x[5], most), sees, fresh), few[:6], fast_mode=True)
    real = torch.tensor([[True, False, True, True, False, True]] * 2)

    def after(k: Tensor, v: Tensor, fading: Tensor, above: Tensor, below: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return plain(above, wkv_after(k, v, fading, (above, below, most), real))

    assert torch.autograd.gradcheck(after, (*few[:3], *few[4:6]), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twin_takes_what_the_kernel_does_not(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_KERNELS", "off")
    default_kernel.cache_clear()
    try:
        inputs = [x.to(dtype) for x in drawn((2, 70, 12))]
        begins = torch.rand(2, 70) < 0.1
        found = plain(*wkv(*inputs[:4], (inputs[4], inputs[5], inputs[6]), begins))
        wanted = looped([x.double() for x in inputs], begins)
        assert found[0].dtype == dtype and all(close(one, two) for one, two in zip(found, wanted, strict=True))
    finally:
        default_kernel.cache_clear()


def test_refusals_name_the_value_and_the_remedy() -> None:
    k, v, fading, bonus, *start = drawn((2, 5, 8))
    sums = (start[0], start[1], start[2])
    with pytest.raises(ValueError, match=r"shapes \(2, 5, 8\), .* expected [^\n]*$"):
        wkv(k, v[..., 1:], fading, bonus, sums)
    with pytest.raises(ValueError, match="shapes"):
        wkv(k[:, :0], v[:, :0], fading, bonus, sums)
    with pytest.raises(ValueError, match=r"torch.float64 on cpu.*expected one dtype"):
        wkv(k, v, fading, bonus.double(), sums)
