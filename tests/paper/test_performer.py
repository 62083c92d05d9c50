"""Performer (arXiv 2009.14794): features whose products have the stated mean and variance, and attention by the book."""

import math

import pytest
import torch
from sequences import TIGHT, Book, Sublayer, random_parents, shaken
from torch import Tensor

from fewstep.core.mixer import Context
from fewstep.core.random import CounterRng
from fewstep.nn.mixers.performer import Kernel, Performer, PerformerConfig, projections, random_features


def estimates(q: Tensor, k: Tensor, drawn: Tensor, kernel: Kernel) -> Tensor:
    """[N] single-draw estimates of exp(q k), one for each of `drawn` [N,E]."""
    (of_q, scale_q), (of_k, scale_k) = (random_features(x, drawn, kernel) for x in (q, k))
    products = of_q * of_k * (scale_q + scale_k).exp()
    return products if kernel == "positive" else products.view(2, -1).sum(0)


@pytest.mark.parametrize("kernel", ["positive", "trigonometric"])
def test_one_draw_has_the_stated_mean_and_variance(kernel: Kernel, seed: int) -> None:
    """Lemma 2, for independent projections: the mean is e^(qk) and, with z = |q + k|^2 and d = |q - k|^2, the variance
    e^(2 qk) (e^z - 1) for positive features and e^(-2 qk) e^z (1 - e^-d)^2 / 2 for trigonometric ones."""
    q, k = 0.5 * torch.nn.functional.normalize(torch.randn(2, 4, dtype=torch.float64), dim=-1)
    drawn = projections(400_000, 4, CounterRng.seeded([seed]), orthogonal=False)
    found = estimates(q, k, drawn, kernel)
    exact, z, d = float((q @ k).exp()), float((q + k).square().sum()), float((q - k).square().sum())
    variance = exact**2 * math.expm1(z) if kernel == "positive" else math.exp(z) * (math.expm1(-d) / exact) ** 2 / 2
    assert float(found.mean()) == pytest.approx(exact, abs=6 * math.sqrt(variance / len(found)))
    assert float(found.var()) == pytest.approx(variance, rel=0.15)


def test_projections_are_orthogonal_in_blocks_and_gaussian_alone(seed: int) -> None:
    drawn = projections(6_000, 6, CounterRng.seeded([seed]), orthogonal=True)
    blocks = drawn.view(-1, 6, 6)
    corners = blocks @ blocks.mT
    torch.testing.assert_close(corners, torch.diag_embed(corners.diagonal(dim1=1, dim2=2)), **TIGHT)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.03)
    assert float(drawn.square().sum(1).mean()) == pytest.approx(6, abs=0.3)
    assert float(drawn.square().sum(1).var()) == pytest.approx(12, rel=0.3)


def test_blocks_that_do_not_fill_up_are_cut(seed: int) -> None:
    rng = CounterRng.seeded([seed])
    torch.testing.assert_close(
        projections(7, 3, rng, orthogonal=True), projections(12, 3, rng, orthogonal=True)[:7], rtol=0, atol=0
    )


def attention_by_the_book(layer: Performer, x: Tensor) -> Tensor:
    """Masked products of features with no stabiliser at all, for one sequence [T,D]."""
    count, width = layer.projection.shape
    q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(0, 1) for part in layer.qkv(x).chunk(3, -1))
    q, k = q / width**0.25, k / width**0.25
    if layer.config.kernel == "positive":
        q, k = ((each @ layer.projection.T - each.square().sum(-1, keepdim=True) / 2).exp() for each in (q, k))
        q, k = (each + layer.config.eps * each.amax(-1, keepdim=True) for each in (q, k))
    else:
        q, k = (
            torch.cat([(each @ layer.projection.T).sin(), (each @ layer.projection.T).cos()], -1)
            * (each.square().sum(-1, keepdim=True) / 2).exp()
            for each in (q, k)
        )
    scores = torch.tril(q @ k.mT) / count
    return layer.out(((scores @ v) / scores.sum(-1, keepdim=True)).transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    "fields", [{}, {"count": 64}, {"count": 512, "kernel": "trigonometric"}, {"count": 3, "orthogonal": False}]
)
def test_attention_by_the_book(fields: dict[str, object]) -> None:
    layer = PerformerConfig(**fields).build(width=12, heads=3).double()
    layer.chunk = 4
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    y, _ = layer(x, Context(torch.arange(9).expand(2, -1)))
    for row in range(2):
        torch.testing.assert_close(y[row], attention_by_the_book(layer, x[row]), rtol=1e-8, atol=1e-8)


def test_many_features_give_softmax_attention() -> None:
    layer = PerformerConfig(count=60_000).build(width=8, heads=2).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    mine, _ = layer(x, Context(torch.arange(7)[None]))
    torch.testing.assert_close(mine, layer.out(wanted), rtol=0, atol=0.05)


def test_keys_of_any_length_give_numbers() -> None:
    """Features that underflow or overflow on their own, in float32 and over chunks."""
    layer = PerformerConfig(count=32).build(width=16, heads=2)
    layer.chunk = 4
    with torch.no_grad():
        layer.qkv.weight.mul_(40)
        y, _ = layer(torch.randn(1, 30, 16), Context(torch.arange(30)[None]))
    assert y.isfinite().all() and y.abs().max() > 0


def test_trigonometric_features_in_trees_and_commits() -> None:
    """So many of them that no denominator comes near zero."""
    module = shaken(PerformerConfig(count=4096, kernel="trigonometric").build(width=16, heads=4))
    with torch.no_grad():
        module.qkv.weight.mul_(0.3)
    book = Book.open(Sublayer(module, module.masks, module.modes), 2, 32)
    for count in (5, 4, 1, 3):
        book.extend(book.subject.inputs(2, count), random_parents(2, count, book.parents()))
        if count % 2:
            book.commit_any()


def test_projections_are_saved_and_drawn_anew_on_request(seed: int) -> None:
    one, other = (PerformerConfig().build(width=16, heads=2) for _ in range(2))
    assert not torch.equal(one.projection, other.projection)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other.projection, one.projection, rtol=0, atol=0)
    other.redraw(CounterRng.seeded([seed]))
    assert not torch.equal(one.projection, other.projection)
    one.redraw(CounterRng.seeded([seed]))
    torch.testing.assert_close(other.projection, one.projection, rtol=0, atol=0)
