"""RWKV-4, RWKV-6 and RWKV-7 (arXiv 2305.13048, 2404.05892, 2503.14456): their recurrences by the book, token after token."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sequences import TIGHT, shaken
from torch import Tensor
from torch.nn.functional import silu

from fewstep.core.mixer import Context
from fewstep.nn.mixers.rwkv4 import Rwkv4, Rwkv4Config
from fewstep.nn.mixers.rwkv6 import Rwkv6, Rwkv6Config
from fewstep.nn.mixers.rwkv7 import Rwkv7, Rwkv7Config

WIDTH, HEADS, COUNT = 12, 3, 9


def lerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    return a + (b - a) * share


def normed(y: Tensor, layer: Any) -> Tensor:
    """LayerNorm of each head's outputs, then the gains of all channels."""
    heads = y.view(layer.heads, -1)
    heads = (heads - heads.mean(1, keepdim=True)) / (heads.var(1, keepdim=True, correction=0) + layer.config.eps).sqrt()
    return heads.flatten() * layer.norm_gain + layer.norm_bias


def rwkv4(layer: Rwkv4, x: Tensor) -> Tensor:
    """Time mixing; exponentials are summed as they are."""
    before, above, below = torch.zeros_like(x[0]), torch.zeros_like(x[0]), torch.zeros_like(x[0])
    outputs = []
    for now in x:
        r, k, v = (w(lerp(before, now, mix)) for w, mix in zip(layer.rkv, layer.mix, strict=True))
        new = (layer.bonus + k).exp()
        outputs.append(layer.out(r.sigmoid() * (above + new * v) / (below + new)))
        fade = (-layer.speed.exp()).exp()
        above, below, before = fade * above + k.exp() * v, fade * below + k.exp(), now
    return torch.stack(outputs)


def rwkv6(layer: Rwkv6, x: Tensor) -> Tensor:
    """Time mixing; the state lies as [key, value]."""
    before, outputs = torch.zeros_like(x[0]), []
    states = [x.new_zeros(WIDTH // HEADS, WIDTH // HEADS) for _ in range(HEADS)]
    for now in x:
        low = (lerp(now, before, layer.mix_first) @ layer.shift_down).tanh().view(5, -1)
        mixed = [lerp(now, before, layer.mix[i] + low[i] @ layer.shift_up[i]) for i in range(5)]
        fade = (-(layer.speed + (mixed[0] @ layer.decay_down).tanh() @ layer.decay_up).exp()).exp()
        r, k, v, g = (w(each) for w, each in zip(layer.rkvg, mixed[1:], strict=True))
        y = []
        for head, (r_h, k_h, v_h, w_h) in enumerate(zip(*(each.view(HEADS, -1) for each in (r, k, v, fade)), strict=True)):
            y.append(r_h @ (states[head] + torch.outer(layer.bonus[head] * k_h, v_h)))
            states[head] = torch.diag(w_h) @ states[head] + torch.outer(k_h, v_h)
        outputs.append(layer.out(silu(g) * normed(torch.stack(y), layer)))
        before = now
    return torch.stack(outputs)


def rwkv7(layer: Rwkv7, x: Tensor) -> Tensor:
    """Time mixing without the residual of values; the state lies as [value, key], as the paper has it."""
    before, outputs = torch.zeros_like(x[0]), []
    states = [x.new_zeros(WIDTH // HEADS, WIDTH // HEADS) for _ in range(HEADS)]
    for now in x:
        xr, xw, xk, xv, xa, xg = (lerp(now, before, mix) for mix in layer.mix)
        r, k, v = (w(each) for w, each in zip(layer.rkv, (xr, xk, xv), strict=True))
        d = layer.speed + (xw @ layer.decay_down).tanh() @ layer.decay_up
        w = torch.exp(-math.exp(-0.5) * d.sigmoid())
        a = (layer.rate + (xa @ layer.rate_down) @ layer.rate_up).sigmoid()
        g = (xg @ layer.gate_down).sigmoid() @ layer.gate_up
        kappa, replaced = k * layer.lookup, k * lerp(torch.ones_like(a), a, layer.rated)
        y, bonus = [], []
        for head, parts in enumerate(zip(*(each.view(HEADS, -1) for each in (r, w, replaced, v, kappa, a)), strict=True)):
            r_h, w_h, k_h, v_h, kappa_h, a_h = parts
            kappa_h = kappa_h / kappa_h.norm()
            states[head] = states[head] @ (torch.diag(w_h) - torch.outer(kappa_h, a_h * kappa_h)) + torch.outer(v_h, k_h)
            y.append(states[head] @ r_h)
            bonus.append((r_h * layer.bonus[head] * k_h).sum() * v_h)
        outputs.append(layer.out(g * (normed(torch.stack(y), layer) + torch.cat(bonus))))
        before = now
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("config", "book"),
    [
        (Rwkv4Config(), rwkv4),
        (Rwkv6Config(), rwkv6),
        (Rwkv6Config(shift_rank=2, decay_rank=3), rwkv6),
        (Rwkv7Config(), rwkv7),
        (Rwkv7Config(decay_rank=2, rate_rank=3, gate_rank=4), rwkv7),
    ],
    ids=["rwkv4", "rwkv6", "rwkv6-small", "rwkv7", "rwkv7-small"],
)
def test_the_recurrence_by_the_book(config: Any, book: Callable[[Any, Tensor], Tensor]) -> None:
    layer = shaken(config.build(width=WIDTH, heads=HEADS))
    layer.chunk = 4
    x = torch.randn(2, COUNT, WIDTH, dtype=torch.float64)
    y, _ = layer(x, Context(torch.arange(COUNT).expand(2, -1)))
    for row in range(2):
        torch.testing.assert_close(y[row], book(layer, x[row]), **TIGHT)


def test_sums_of_rwkv4_outlive_any_exponent() -> None:
    """Keys of a hundred overflow an exponential of float32; a mean of what they weigh does not."""
    layer = Rwkv4Config().build(width=8, heads=2)
    x = torch.randn(1, 40, 8)
    with torch.no_grad():
        layer.rkv[1].weight.mul_(300)
        y, _ = layer(x, Context(torch.arange(40)[None]))
        exact, _ = layer.double()(x.double(), Context(torch.arange(40)[None]))
        assert float(layer.rkv[1](x.double()).abs().max()) > 89
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)


def test_rwkv4_begins_as_the_authors_say() -> None:
    """Their first layer: decays from e^-5 to e^3, a zigzag bonus, shares that grow with the channel."""
    layer = Rwkv4Config().build(width=64, heads=2).requires_grad_(False)
    assert float(layer.speed[0]) == -5 and float(layer.speed[-1]) == pytest.approx(3)
    assert (layer.speed.diff() > 0).all()
    torch.testing.assert_close(layer.bonus[:3], math.log(0.3) + torch.tensor([0.0, 0.5, -0.5]))
    torch.testing.assert_close(layer.mix[1], torch.arange(64) / 64)


@pytest.mark.parametrize("config", [Rwkv6Config(), Rwkv7Config()])
def test_low_rank_maps_begin_as_nothing(config: Any) -> None:
    """So that what a token chooses begins as the constants do."""
    layer = config.build(width=32, heads=2)
    for name, parameter in layer.named_parameters():
        if name.endswith("_down"):
            assert not parameter.any()
        if name.endswith("_up"):
            assert parameter.any()


def test_decays_of_rwkv7_have_a_floor() -> None:
    """At least exp(-exp(-1/2)) = 0.545 a token."""
    layer = shaken(Rwkv7Config().build(width=8, heads=2))
    x = 100 * torch.randn(1, 50, 8, dtype=torch.float64)
    decay = layer.inputs(x, x.unsqueeze(2), torch.arange(50)[None])[5].exp()
    assert decay.min() >= math.exp(-math.exp(-0.5)) and decay.max() <= 1
