"""Rotary positions (arXiv 2104.09864) and their scalings: the published identities, and an implementation in complex numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.mixer import Context
from fewstep.nn.mixers.linear import LinearConfig
from fewstep.nn.position import POSITIONS, RopeConfig

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "base": {"base": 500000.0},
    "linear": {"scaling": "linear", "factor": 4.0},
    "llama3": {"base": 500000.0, "scaling": "llama3", "factor": 8.0},
    "llama3.2": {"base": 500000.0, "scaling": "llama3", "factor": 32.0},
    "llama3-short": {"scaling": "llama3", "factor": 2.0, "low_frequency": 2.0, "high_frequency": 3.0, "trained_length": 64},
    "dynamic": {"scaling": "dynamic", "factor": 4.0, "trained_length": 10_000},  # and no further
}
SETTINGS = pytest.mark.parametrize("fields", SCALINGS.values(), ids=SCALINGS)


def rotated(fields: dict[str, Any], x: Tensor, positions: Tensor) -> Tensor:
    q, _ = RopeConfig(**fields).build(head_width=x.shape[-1]).rotate(x, x, positions, positions, {})
    return q


def frequencies(fields: dict[str, Any], width: int) -> list[float]:
    """[width / 2] radians per position, each from the definition: theta_i = base^(-2i/d), then the scaling."""
    config = RopeConfig(**fields)
    found = []
    for i in range(width // 2):
        theta = config.base ** (-2 * i / width)
        if config.scaling == "linear":  # arXiv 2306.15595: position m becomes m / factor
            theta /= config.factor
        if config.scaling == "llama3":  # Llama 3.1: by wavelength against the trained context
            wavelength = 2 * math.pi / theta
            longest = config.trained_length / config.low_frequency
            shortest = config.trained_length / config.high_frequency
            if wavelength > longest:
                theta /= config.factor
            elif wavelength >= shortest:
                ramp = config.trained_length / wavelength - config.low_frequency
                smooth = ramp / (config.high_frequency - config.low_frequency)
                theta = (1 - smooth) * theta / config.factor + smooth * theta
        found.append(theta)
    return found


@SETTINGS
def test_is_a_rotation_of_complex_pairs(fields: dict[str, Any]) -> None:
    """Channels i and i + d/2 are one complex number, turned by m theta_i (eq. 34 in the half-split layout)."""
    x, positions = torch.randn(2, 3, 5, 32, dtype=torch.float64), torch.randint(4096, (2, 5))
    pairs = torch.complex(x[..., :16], x[..., 16:])
    angles = positions[:, None, :, None] * torch.tensor(frequencies(fields, 32), dtype=torch.float64)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotated(fields, x, positions), torch.cat([turned.real, turned.imag], -1), **TIGHT)


@SETTINGS
def test_scores_depend_on_the_distance_alone(fields: dict[str, Any]) -> None:
    """<R_m q, R_n k> = <R_(m+s) q, R_(n+s) k> (eq. 16), and does depend on m - n."""
    q, k = torch.randn(2, 1, 2, 7, 16, dtype=torch.float64)
    positions = torch.randint(200, (1, 7))

    def scores(shift_q: int, shift_k: int) -> Tensor:
        return rotated(fields, q, positions + shift_q) @ rotated(fields, k, positions + shift_k).mT

    torch.testing.assert_close(scores(37, 37), scores(0, 0), **TIGHT)
    assert (scores(1, 0) - scores(0, 0)).abs().max() > 1e-3


@SETTINGS
def test_keeps_lengths_and_the_origin(fields: dict[str, Any]) -> None:
    x, positions = torch.randn(2, 3, 5, 16, dtype=torch.float64), torch.randint(10_000, (2, 5))
    torch.testing.assert_close(rotated(fields, x, positions).norm(dim=-1), x.norm(dim=-1), **TIGHT)
    torch.testing.assert_close(rotated(fields, x, torch.zeros_like(positions)), x, **TIGHT)


def test_far_scores_of_equal_vectors_decay() -> None:
    """Section 3.4.3: the mean of cos(m theta_i) over channels, which bounds the score, shrinks with the distance."""
    ones = torch.ones(1, 1, 2048, 128, dtype=torch.float64)
    turned = rotated({}, ones, torch.arange(2048)[None])[0, 0]
    scores = turned @ turned[0] / 128
    assert scores[0] == pytest.approx(1)
    assert scores[1:64].mean() > scores[256:512].mean() > scores[1024:].mean() > 0


def test_queries_and_keys_may_stand_apart() -> None:
    q, k = torch.randn(1, 4, 3, 8, dtype=torch.float64), torch.randn(1, 2, 5, 8, dtype=torch.float64)
    rope, q_pos, k_pos = RopeConfig().build(head_width=8), torch.randint(99, (1, 3)), torch.randint(99, (1, 5))
    turned_q, turned_k = rope.rotate(q, k, q_pos, k_pos, {})
    torch.testing.assert_close(turned_q, rotated({}, q, q_pos), **TIGHT)
    torch.testing.assert_close(turned_k, rotated({}, k, k_pos), **TIGHT)


def test_two_encodings_of_one_call_do_not_share_a_table() -> None:
    """Layers may rotate differently; the tables of a call are kept per encoding."""
    x, positions, shared = torch.randn(1, 1, 4, 8, dtype=torch.float64), torch.arange(4)[None], {}
    for fields in SCALINGS.values():
        q, _ = RopeConfig(**fields).build(head_width=8).rotate(x, x, positions, positions, shared)
        torch.testing.assert_close(q, rotated(fields, x, positions), **TIGHT)


def test_low_precision_keeps_far_positions_apart() -> None:
    """The angles are computed in float32 at least, whatever the activations are."""
    positions = torch.tensor([[100_000, 100_001]])
    x = torch.ones(1, 1, 2, 64)
    exact, low = rotated({}, x.double(), positions), rotated({}, x.bfloat16(), positions).double()
    assert (exact - low).abs().max() < 0.03
    assert (exact[:, :, 0] - exact[:, :, 1]).abs().max() > 0.5


@pytest.mark.parametrize("kind", ["rope", "rope_partial", "rope_2d", "yarn"])
def test_linear_attention_turns_its_numerator_alone(kind: str) -> None:
    """y_m = sum_n (R_m f(q_m)) (R_n f(k_n)) v_n / sum_n f(q_m) f(k_n) over n <= m, f = elu + 1 (eq. 19)."""
    encoding: Any = POSITIONS[kind]().build(head_width=8)
    mixer = LinearConfig(eps=1e-12).build(width=16, heads=2, position=encoding).double()
    x, positions = torch.randn(1, 6, 16, dtype=torch.float64), torch.arange(3, 9)[None]
    y = []
    for head in range(2):
        q, k, v = (x[0] @ mixer.qkv.weight[16 * part + 8 * head :][:8].T for part in range(3))
        q, k = (torch.where(part > 0, part + 1, part.exp()) for part in (q, k))
        turned_q, turned_k = encoding.rotate(q[None, None], k[None, None], positions, positions, {})
        rows = []
        for m in range(6):
            above = sum((turned_q[0, 0, m] @ turned_k[0, 0, n]) * v[n] for n in range(m + 1))
            rows.append(above / sum(q[m] @ k[n] for n in range(m + 1)))
        y.append(torch.stack(rows))
    got, _ = mixer(x, Context(positions))
    torch.testing.assert_close(got[0], torch.cat(y, -1) @ mixer.out.weight.T, **TIGHT)


def test_dynamic_scaling_ends_where_it_would_stretch() -> None:
    x = torch.randn(1, 1, 1, 8)
    rotated({"scaling": "dynamic", "trained_length": 64}, x, torch.tensor([[63]]))
    with pytest.raises(
        ValueError, match=r"^positions: 64 is beyond trained_length=64, [^\n]*; shorten the text or choose dynamic_ntk$"
    ):
        rotated({"scaling": "dynamic", "trained_length": 64}, x, torch.tensor([[64]]))


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^head_width=7: [^\n]*even[^\n]*$"):
        RopeConfig().build(head_width=7)


def test_no_encoding_is_neutral() -> None:
    none: Any = POSITIONS["none"]()
    x, positions = torch.randn(1, 2, 3, 8), torch.arange(3)[None]
    encoding = none.build(head_width=8)
    assert encoding.embed(x, positions) is x
    assert encoding.rotate(x, x, positions, positions, {}) == (x, x)
    assert encoding.bias(x, x, positions, positions) is None
    assert encoding.value(x, positions, positions) is None
