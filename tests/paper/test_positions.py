"""Position encodings by the book: each formula against a reference of loops and scalars, and the identities the papers state.

Rotary positions over whole heads are in `test_rope.py`.
"""

import math
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from fewstep.core.mixer import Causal, Context, Full
from fewstep.nn.mixers.attention import Attention, AttentionConfig
from fewstep.nn.position import POSITIONS

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH, HEADS, TOKENS = 12, 3, 7
HEAD = WIDTH // HEADS


def encoding(kind: str, head_width: int = HEAD, **fields: Any) -> Any:
    """A float64 module, everything learned away from its start."""
    config: Any = POSITIONS[kind](**fields)
    made = config.build(head_width=head_width, width=HEADS * head_width, heads=HEADS).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def pairs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys [1,H,T,E] and places [1,T]."""
    q, k = torch.randn(2, 1, HEADS, TOKENS, HEAD, dtype=torch.float64)
    return q, k, torch.arange(TOKENS).unsqueeze(0)


def scores_of(position: Any, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """[H,Q,K] all that enters the softmax."""
    q, k = position.rotate(q, k, q_pos, k_pos, {})
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    bias = position.bias(q, k, q_pos, k_pos)
    return (scores if bias is None else scores + bias)[0].detach()


RELATIVE = {
    "alibi": {},
    "t5": {"buckets": 8, "farthest": 12},
    "shaw": {"reach": 3},
    "transformer_xl": {},
    "deberta": {"reach": 4},
    "rope_partial": {"share": 0.5},
    "ntk": {},
    "yarn": {"base": 50.0, "trained_length": 32},
}


@pytest.mark.parametrize("kind", RELATIVE)
def test_scores_depend_on_differences_alone(kind: str) -> None:
    position, (q, k, places) = encoding(kind, **RELATIVE[kind]), pairs()
    here = scores_of(position, q, k, places, places)
    torch.testing.assert_close(scores_of(position, q, k, places + 91, places + 91), here, **TIGHT)
    assert (scores_of(position, q, k, places + 1, places) - here).abs().max() > 1e-3


def test_alibi_slopes() -> None:
    """Section 3: for 8 heads 1/2, 1/4 ... 1/256; for 16 also those between; the authors' code goes on so for other numbers."""
    assert alibi(8).slopes == pytest.approx([2.0**-h for h in range(1, 9)])
    assert alibi(16).slopes == pytest.approx([2.0 ** (-h / 2) for h in range(1, 17)])
    assert alibi(12).slopes == pytest.approx([2.0**-h for h in range(1, 9)] + [2.0**-h for h in (0.5, 1.5, 2.5, 3.5)])


def alibi(heads: int) -> Any:
    config: Any = POSITIONS["alibi"]()
    return config.build(head_width=4, heads=heads)


def test_alibi() -> None:
    position, (q, k, places) = encoding("alibi"), pairs()
    found = position.bias(q, k, places, places)
    for h in range(HEADS):
        for i in range(TOKENS):
            for j in range(i + 1):
                assert found[0, h, i, j] == pytest.approx(-alibi(HEADS).slopes[h] * (i - j))


def bucket(distance: int, buckets: int, farthest: int, bidirectional: bool) -> int:
    """T5, section 2.1 and its released code: i - j -> bucket."""
    first = 0
    if bidirectional:
        buckets //= 2
        if distance < 0:
            first, distance = buckets, -distance
    distance = max(distance, 0)
    if distance < buckets // 2:
        return first + distance
    share = math.log(distance / (buckets // 2)) / math.log(farthest / (buckets // 2))
    return first + min(buckets - 1, buckets // 2 + int(share * (buckets - buckets // 2)))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5(bidirectional: bool) -> None:
    position, (q, k, _) = encoding("t5", bidirectional=bidirectional), pairs()
    distances = range(-300, 300)
    wanted = [bucket(distance, 32, 128, bidirectional) for distance in distances]
    assert position.bucket(torch.tensor(list(distances))).tolist() == wanted
    assert len(set(wanted)) == (32 if not bidirectional else 31)  # no key stands behind its query at distance 0
    q_pos, k_pos = torch.randint(300, (1, TOKENS)), torch.randint(300, (1, TOKENS))
    found = position.bias(q, k, q_pos, k_pos)
    for i in range(TOKENS):
        for j in range(TOKENS):
            row = bucket(int(q_pos[0, i] - k_pos[0, j]), 32, 128, bidirectional)
            torch.testing.assert_close(found[0, :, i, j], position.embedding[row], **TIGHT)


def attention(position: Any) -> Attention:
    return AttentionConfig().build(width=WIDTH, heads=HEADS, position=position).double()


@pytest.mark.parametrize("mask", [Causal(), Full()])
def test_shaw(mask: Any) -> None:
    """Equations 3 and 4, with a_ij = w_clip(j - i, k)."""
    reach = 2
    layer = attention(encoding("shaw", reach=reach))
    a_key, a_value = layer.position.embedding.detach()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    q, k, v = layer.qkv(x)[0].detach().unflatten(-1, (3, HEADS, HEAD)).unbind(1)
    z = torch.zeros(TOKENS, HEADS, HEAD, dtype=torch.float64)
    for h in range(HEADS):
        for i in range(TOKENS):
            seen = range(TOKENS if isinstance(mask, Full) else i + 1)
            near = [max(-reach, min(reach, j - i)) + reach for j in seen]
            e = torch.stack([q[i, h] @ (k[j, h] + a_key[near[j]]) / math.sqrt(HEAD) for j in seen])
            z[i, h] = sum(w * (v[j, h] + a_value[near[j]]) for w, j in zip(e.softmax(0), seen, strict=True))
    found, _ = layer(x, Context(torch.arange(TOKENS).unsqueeze(0), mask=mask))
    torch.testing.assert_close(found[0], layer.out(z.flatten(1)), **TIGHT)


@pytest.mark.parametrize("queries", [2, TOKENS])
def test_transformer_xl(queries: int) -> None:
    """Section 3.3, the four terms (a) to (d); few queries take the other order of multiplication."""
    position, (q, k, places) = encoding("transformer_xl"), pairs()
    q, q_pos = q[:, :, -queries:], places[:, -queries:]
    u, v = (vector.detach().view(HEADS, HEAD) for vector in (position.content_bias, position.distance_bias))
    w = position.distance.weight.detach().view(HEADS, HEAD, WIDTH)
    found = scores_of(position, q, k, q_pos, places)
    for h in range(HEADS):
        for i in range(queries):
            for j in range(TOKENS):
                far = int(q_pos[0, i]) - j
                r = [wave(far / 10000 ** (2 * n / WIDTH)) for wave in (math.sin, math.cos) for n in range(WIDTH // 2)]
                distance = w[h] @ torch.tensor(r, dtype=torch.float64)
                terms = q[0, h, i] @ k[0, h, j], q[0, h, i] @ distance, u[h] @ k[0, h, j], v[h] @ distance
                assert float(found[h, i, j]) == pytest.approx(float(sum(terms)) / math.sqrt(HEAD))


def test_deberta() -> None:
    """Equation 4, scaled by 1/sqrt(3d), delta of equation 3; the position's query at delta(i, j), as released."""
    reach = 2
    position, (q, k, places) = encoding("deberta", reach=reach), pairs()
    kr, qr = (part(position.embedding).detach().view(-1, HEADS, HEAD) for part in (position.key, position.query))
    found = scores_of(position, q, k, places, places)
    for h in range(HEADS):
        for i in range(TOKENS):
            for j in range(TOKENS):
                delta = 0 if i - j <= -reach else 2 * reach - 1 if i - j >= reach else i - j + reach
                terms = q[0, h, i] @ k[0, h, j], q[0, h, i] @ kr[delta, h], k[0, h, j] @ qr[delta, h]
                assert float(found[h, i, j]) == pytest.approx(float(sum(terms)) / math.sqrt(3 * HEAD))


def test_sinusoidal() -> None:
    position, x = encoding("sinusoidal"), torch.randn(1, 4, WIDTH, dtype=torch.float64)
    places = torch.tensor([[0, 1, 17, 900]])
    found = position.embed(x, places) - x
    for t, place in enumerate(places[0].tolist()):
        for i in range(0, WIDTH, 2):
            angle = place / 10000 ** (i / WIDTH)
            assert found[0, t, i : i + 2].tolist() == pytest.approx([math.sin(angle), math.cos(angle)])


def test_a_shift_of_sinusoids_is_linear() -> None:
    """Section 3.5: PE(pos + k) is a linear function of PE(pos), the same for all pos."""
    position, zero = encoding("sinusoidal"), torch.zeros(1, 40, WIDTH, dtype=torch.float64)
    here, there = (position.embed(zero, torch.arange(40).unsqueeze(0) + shift)[0] for shift in (0, 5))
    shift = torch.linalg.lstsq(here[:20], there[:20]).solution
    torch.testing.assert_close(here[20:] @ shift, there[20:], rtol=1e-6, atol=1e-6)


def test_tables() -> None:
    x, places = torch.randn(1, 3, WIDTH, dtype=torch.float64), torch.tensor([[4, 0, 4]])
    added, multiplied = encoding("trainable", length=5), encoding("multiplicative", length=5)
    torch.testing.assert_close(added.embed(x, places), x + added.embedding[[4, 0, 4]], **TIGHT)
    torch.testing.assert_close(multiplied.embed(x, places), x * (1 + multiplied.embedding[[4, 0, 4]]), **TIGHT)


def test_complex_words_are_waves() -> None:
    """r e^(i (w pos + theta)); and the property that leads to it: the step from pos to pos + n is the same wherever pos is."""
    position, places = encoding("complex"), torch.randint(500, (1, TOKENS))
    r, theta = torch.rand(2, 1, TOKENS, WIDTH // 2, dtype=torch.float64) * 3
    word = torch.polar(r, theta)
    waves = torch.polar(r, position.frequencies.detach() * places.unsqueeze(-1) + theta)
    found = position.embed(torch.cat([word.real, word.imag], -1), places)
    torch.testing.assert_close(found, torch.cat([waves.real, waves.imag], -1), **TIGHT)
    later = position.embed(torch.cat([waves.real, waves.imag], -1), torch.full_like(places, 9))
    torch.testing.assert_close(later, position.embed(torch.cat([word.real, word.imag], -1), places + 9), **TIGHT)


def test_recursive_positions_solve_their_equation() -> None:
    """dp/dt = h(t, p), against an adaptive solver; and half the step divides the error by 16, for the solver is of order 4."""
    position = encoding("recursive", hidden=6)
    inner, bias, outer = (value.detach().numpy() for value in (position.inner, position.inner_bias, position.outer))

    def slope(t: float, p: Any) -> Any:
        return outer @ numpy.tanh(inner @ numpy.append(p, t) + bias)

    exact = solve_ivp(slope, (0, 2.4), position.start.detach().numpy(), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    errors = []
    for position.step in (0.2, 0.1):
        places = torch.tensor([[0, round(2.4 / position.step)]])
        first, last = position.embed(torch.zeros(1, 2, WIDTH, dtype=torch.float64), places)[0].detach()
        torch.testing.assert_close(first, position.start.detach(), **TIGHT)
        assert (first - last).abs().max() > 1e-2
        errors.append(float(numpy.linalg.norm(last.numpy() - exact)))
    assert errors[1] < errors[0] / 7 < 1e-2


@pytest.mark.parametrize("side", ["causal", "both"])
def test_convolution(side: str) -> None:
    position, x = encoding("convolution", reach=2, side=side), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    taps = position.taps.detach().view(-1, WIDTH)
    found = position.embed(x, torch.arange(9).unsqueeze(0))[0]
    for t in range(9):
        offsets = range(0 if side == "causal" else -2, 3)
        near = [w * x[0, t - s] for w, s in zip(taps, offsets, strict=True) if 0 <= t - s < 9]
        torch.testing.assert_close(found[t], x[0, t] + sum(near), **TIGHT)


def test_zero_padding_tells_where_a_text_begins() -> None:
    """arXiv 2001.08248: equal inputs differ near the edge, and there alone."""
    position = encoding("convolution", reach=3)
    found = position.embed(torch.ones(1, 9, WIDTH, dtype=torch.float64), torch.arange(9).unsqueeze(0))[0]
    assert all((found[t] - found[t + 1]).abs().max() > 1e-6 for t in range(3))
    torch.testing.assert_close(found[3:], found[3:4].expand(6, -1), **TIGHT)


def rotated(position: Any, x: Tensor, places: Tensor) -> Tensor:
    y, _ = position.rotate(x, x, places, places, {})
    return y.detach()


def test_adjacent_pairs_are_complex_numbers() -> None:
    """arXiv 2104.09864: channels 2i and 2i + 1 turn by m theta_i; the others pass."""
    x, places = torch.randn(2, HEADS, 5, 8, dtype=torch.float64), torch.randint(999, (2, 5))
    found = rotated(encoding("rope_partial", 8, share=0.75), x, places)
    theta = torch.tensor([10000 ** (-2 * i / 6) for i in range(3)], dtype=torch.float64)
    turned = torch.view_as_complex(x[..., :6].unflatten(-1, (3, 2))) * torch.polar(
        torch.ones(1, dtype=torch.float64), places[:, None, :, None] * theta
    )
    torch.testing.assert_close(found, torch.cat([torch.view_as_real(turned).flatten(-2), x[..., 6:]], -1), **TIGHT)


def test_layouts_are_one_encoding_up_to_the_order_of_channels() -> None:
    x, places = torch.randn(1, HEADS, 5, 8, dtype=torch.float64), torch.randint(99, (1, 5))
    rope = {"kind": "yarn", "base": 50.0, "trained_length": 64}
    adjacent, half = (encoding("rope_partial", 8, share=1.0, layout=layout, rope=rope) for layout in ("adjacent", "half"))
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    torch.testing.assert_close(rotated(adjacent, x, places)[..., order], rotated(half, x[..., order], places), **TIGHT)
    inner: Any = POSITIONS["yarn"](base=50.0, trained_length=64)
    torch.testing.assert_close(rotated(half, x, places), rotated(inner.build(head_width=8), x, places), **TIGHT)


def test_a_plane_has_two_axes() -> None:
    """arXiv 2403.13298: half of the channels is RoPE of the row, half of the column; places may be raster order."""
    x = torch.randn(1, HEADS, 6, 8, dtype=torch.float64)
    plane, line = encoding("rope_2d", 8, columns=4), POSITIONS["rope"](base=100.0)
    places = torch.tensor([[0, 3, 4, 9, 11, 14]])
    rows, columns = places // 4, places % 4
    found = rotated(plane, x, torch.stack([rows, columns], -1))
    torch.testing.assert_close(rotated(plane, x, places), found, **TIGHT)
    one_axis: Any = line
    axis = one_axis.build(head_width=4)
    for channels, axis_places in (([0, 1, 4, 5], rows), ([2, 3, 6, 7], columns)):
        torch.testing.assert_close(found[..., channels], rotated(axis, x[..., channels], axis_places), **TIGHT)


@pytest.mark.parametrize("kind", ["rope_2d", "rope_mixed"])
def test_scores_on_a_plane_depend_on_differences_of_both_axes(kind: str) -> None:
    position, places = encoding(kind, 8), torch.randint(30, (1, TOKENS, 2))
    q, k = torch.randn(2, 1, HEADS, TOKENS, 8, dtype=torch.float64)
    here = scores_of(position, q, k, places, places)
    torch.testing.assert_close(
        scores_of(position, q, k, places + torch.tensor([5, 9]), places + torch.tensor([5, 9])), here, **TIGHT
    )
    for axis in ([1, 0], [0, 1]):
        assert (scores_of(position, q, k, places + torch.tensor(axis), places) - here).abs().max() > 1e-3


def test_mixed_frequencies_turn_by_row_and_column_together() -> None:
    """arXiv 2403.13298, RoPE-Mixed: R = e^(i (theta_x p_x + theta_y p_y))."""
    position, x = encoding("rope_mixed", 8), torch.randn(1, HEADS, 5, 8, dtype=torch.float64)
    places = torch.randint(30, (1, 5, 2))
    f, g = position.frequencies.detach().view(2, 4)
    angles = places[..., :1] * f + places[..., 1:] * g
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    torch.testing.assert_close(rotated(position, x, places), torch.cat([turned.real, turned.imag], -1), **TIGHT)


def frequencies(kind: str, width: int, **fields: Any) -> list[float]:
    config: Any = POSITIONS[kind](**fields)
    return config.build(head_width=width).frequencies(torch.device("cpu"), torch.float64).tolist()


def test_ntk_leaves_the_fastest_pair_and_interpolates_the_slowest() -> None:
    plain, scaled = frequencies("rope", 32), frequencies("ntk", 32, factor=8.0)
    assert scaled[0] == pytest.approx(plain[0]) and scaled[-1] == pytest.approx(plain[-1] / 8)
    assert all(plain[i] / 8 < scaled[i] < plain[i] for i in range(1, 15))


def test_yarn_ramps_by_rotations() -> None:
    """arXiv 2309.00071 section 3.2: r rotations over the trained context; r < 1 interpolated, r > 32 as it was."""
    trained, factor = 2048, 16.0
    plain, scaled = frequencies("rope", 64), frequencies("yarn", 64, factor=factor, trained_length=trained)
    kinds = set()
    for before, after in zip(plain, scaled, strict=True):
        rotations = trained * before / (2 * math.pi)
        kinds.add("slow" if rotations < 1 else "fast" if rotations > 32 else "between")
        if rotations < 1:
            assert after == pytest.approx(before / factor)
        elif rotations > 32:
            assert after == pytest.approx(before)
        else:
            assert before / factor - 1e-12 <= after <= before + 1e-12
    assert kinds == {"slow", "fast", "between"}
    assert all(a > b for a, b in pairwise(scaled))


def test_yarns_attention_factor_is_on_both_sides() -> None:
    """Section 3.4: 1/sqrt(t) = 0.1 ln s + 1 on queries and keys, so that logits grow with its square."""
    x, places = torch.randn(1, 1, 4, 8, dtype=torch.float64), torch.randint(99, (1, 4))
    with_factor, without = (encoding("yarn", 8, factor=4.0, attention=attention) for attention in (None, 1.0))
    scale = 0.1 * math.log(4) + 1
    torch.testing.assert_close(rotated(with_factor, x, places), scale * rotated(without, x, places), **TIGHT)


def test_dynamic_ntk_is_rope_within_the_trained_length_and_ntk_at_each_length_beyond() -> None:
    position, (q, k, places) = encoding("dynamic_ntk", base=100.0, factor=2.0, trained_length=4), pairs()
    plain: Any = POSITIONS["rope"](base=100.0)
    found = scores_of(position, q, k, places, places)
    within = scores_of(plain.build(head_width=HEAD), q, k, places, places)
    torch.testing.assert_close(found[:, :4], within[:, :4], **TIGHT)
    for i in range(4, TOKENS):
        stretch = 2.0 * (i + 1) / 4 - 1
        ntk: Any = POSITIONS["rope"](base=100.0 * stretch ** (HEAD / (HEAD - 2)))
        alone = scores_of(ntk.build(head_width=HEAD), q, k, places, places)
        torch.testing.assert_close(found[:, i], alone[:, i], **TIGHT)
        assert (found[:, i] - within[:, i]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["rope_partial", "rope_2d", "rope_mixed", "ntk", "dynamic_ntk", "complex"])
def test_widths_that_do_not_pair_are_refused(kind: str) -> None:
    config: Any = POSITIONS[kind](**({"share": 1.0} if kind == "rope_partial" else {}))
    with pytest.raises(ValueError, match=r"^(head_width|width|share)=[^\n]*; [^\n]*$"):
        config.build(head_width=3)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("yarn", {"slow": 32.0, "fast": 2.0}, r"slow=32.0: must be below fast=2.0; lower it"),
        ("yarn", {"base": 1.0}, r"base=1.0: must be above 1[^\n]*; raise it"),
        ("t5", {"buckets": 32, "farthest": 16}, r"farthest=16: must be above the 16 distances[^\n]*; raise it"),
        ("ntk", {"factor": 0.5}, r"greater than or equal to 1"),
    ],
)
def test_ramps_that_are_none_are_refused(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        POSITIONS[kind](**fields)
