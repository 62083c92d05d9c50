"""Muon against PyTorch's, Newton-Schulz against its definition, and who gets which optimizer."""

import math

import pytest
import torch
from torch import Tensor, nn

from fewstep.training.optim import AdamWConfig, BatchedMuon, MuonConfig, orthogonalise

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SHAPES = ((8, 16), (8, 16), (24, 8), (8, 24), (24, 8))  # none square: bf16 loses the smallest singular values of those


def _weights(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in _SHAPES]


def _set_gradients(weights: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_batched_muon_follows_torchs_muon(scale: str, nesterov: bool, seed: int) -> None:
    """Five steps on matrices of several shapes; torch iterates in bf16, hence the tolerance on the total update."""
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov, "adjust_lr_fn": scale}
    ours, theirs, start = _weights(seed), _weights(seed), _weights(seed)
    one, other = BatchedMuon(ours, **settings), torch.optim.Muon(theirs, **settings)  # type: ignore[arg-type]
    for step in range(5):
        _set_gradients(ours, seed + step)
        _set_gradients(theirs, seed + step)
        one.step(), other.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.03 * (b - s).norm()
        torch.testing.assert_close(one.state[a]["momentum_buffer"], other.state[b]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(3, 6, 6), (2, 5, 20), (2, 20, 5)])
def test_newton_schulz_acts_on_singular_values_alone(
    shape: tuple[int, int, int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """U S V^T becomes U p(S) V^T with p = five times a s + b s^3 + c s^5, here in fp32 against float64 by SVD."""
    monkeypatch.setattr("fewstep.training.optim.arithmetic", lambda dtype, device: False)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = _COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ vh
    torch.testing.assert_close(orthogonalise(matrices, _COEFFICIENTS, 5, 1e-7).double(), expected, rtol=1e-3, atol=1e-4)


def test_five_iterations_bring_singular_values_near_one() -> None:
    """The post's claim: from [0.01, 1] (after normalisation) into about [0.7, 1.2]."""
    s = torch.linspace(0.01, 1, 1000, dtype=torch.float64)
    a, b, c = _COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert float(s.min()) > 0.65 and float(s.max()) < 1.25


def test_scales_of_the_update(seed: int) -> None:
    """match_rms_adamw (arXiv:2502.16982, equation 4): an update of RMS about 0.2; original: sqrt(max(1, rows / columns))."""
    for shape in ((16, 64), (64, 16)):
        moved = {}
        for scale in ("original", "match_rms_adamw"):
            weight = nn.Parameter(torch.zeros(shape))
            weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            BatchedMuon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn=scale).step()
            moved[scale] = weight.detach()
        rms = float(moved["match_rms_adamw"].square().mean().sqrt())
        assert 0.2 * 0.65 < rms < 0.2 * 1.25
        ratio = 0.2 * math.sqrt(64) / math.sqrt(max(1, shape[0] / shape[1]))
        torch.testing.assert_close(moved["match_rms_adamw"], moved["original"] * ratio, rtol=1e-5, atol=1e-6)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.positions = nn.Embedding(5, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.extra = nn.ModuleDict({"head": nn.Linear(8, 8, bias=False)})
        self.head = nn.Linear(8, 11, bias=False)


def _groups(optimizers: object) -> list[tuple[str, float, list[Tensor]]]:
    members = optimizers._members  # type: ignore[attr-defined]
    return [
        (type(member).__name__, group["weight_decay"], group["params"]) for member in members for group in member.param_groups
    ]


def test_hidden_matrices_go_to_muon_the_rest_to_adamw() -> None:
    model = _Model()
    names = {id(param): name for name, param in model.named_parameters()}
    groups = [(kind, decay, {names[id(p)] for p in params}) for kind, decay, params in _groups(MuonConfig().build(model))]
    assert groups == [
        ("BatchedMuon", 0.1, {"up.weight"}),
        ("AdamW", 0.1, {"embedding.weight", "positions.weight", "extra.head.weight", "head.weight"}),
        ("AdamW", 0.0, {"norm.weight", "norm.bias", "up.bias"}),
    ]
    groups = [(kind, decay, {names[id(p)] for p in params}) for kind, decay, params in _groups(AdamWConfig().build(model))]
    assert [(kind, decay, len(members)) for kind, decay, members in groups] == [("AdamW", 0.1, 5), ("AdamW", 0.0, 3)]


def test_adamw_is_torchs(seed: int) -> None:
    """The plain (unfused) reference, three steps at half the peak rate."""
    torch.manual_seed(seed)
    ours, theirs = nn.Linear(6, 5), nn.Linear(6, 5)
    theirs.load_state_dict(ours.state_dict())
    one = AdamWConfig(lr=0.02).build(ours)
    settings = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    other = torch.optim.AdamW(settings, lr=0.01, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    x = torch.randn(7, 6)
    for _ in range(3):
        for model, step in ((ours, lambda: one.step(0.5)), (theirs, other.step)):
            model.zero_grad()
            model(x).square().mean().backward()
            step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_state_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer state 'gone\.weight/exp_avg': the model has no such trained parameter"):
        AdamWConfig().build(_Model()).load({"gone.weight/exp_avg": torch.ones(1)})
