"""Whoever computes the attention of whole sequences, it is attention: values and gradients, and the rule for who does it."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.core.mixer import Causal, Context, Dense, Full, Mask, Window
from fewstep.nn.masks import allowed
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.mixers.attention_whole import flash_pays, whole_attention

SEGMENTS = torch.tensor([[0] * 30 + [1] * 50 + [-1] * 20, [0] * 90 + [2] * 10])
CASES: dict[str, tuple[Mask, bool, bool, int, bool]] = {  # mask, packed, biased, values' width, whether flash attention has it
    "plain": (Causal(), False, False, 8, False),
    "full": (Full(), False, False, 8, False),
    "biased": (Causal(), False, True, 8, True),
    "biased, full": (Full(), False, True, 8, True),
    "packed": (Causal(), True, False, 8, True),
    "packed, full, biased": (Full(), True, True, 8, True),
    "wide values": (Causal(), False, False, 20, True),
    "narrow values": (Full(), False, False, 4, True),
    "window": (Window(9), False, False, 4, False),
    "window, packed, biased": (Window(9), True, True, 20, False),
    "dense": (Dense(torch.rand(2, 100, 100, generator=torch.Generator().manual_seed(0)) < 0.5), True, False, 8, False),
}


def naive(inputs: list[Tensor], ctx: Context) -> Tensor:
    """The same with all scores at once."""
    q, k, v, *bias = inputs
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * 0.3 + (bias[0] if bias else 0.0)
    seen = allowed(ctx.mask, q.shape[2], ctx.segments, q.device)
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, dtype: torch.dtype) -> None:
    """Two rows, four query heads on two key heads, a learned bias for all rows."""
    mask, packed, biased, values, flash = CASES[case]
    ctx = Context(mask=mask, segments=SEGMENTS if packed else None)
    shapes = [(2, 4, 100, 8), (2, 2, 100, 8), (2, 2, 100, values), *([(1, 4, 100, 100)] if biased else [])]
    exact = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    q, k, v, *bias = inputs
    assert flash_pays(q, v, bias[0] if bias else None, ctx) == flash
    y, wanted = whole_attention(q, k, v, ctx, *bias, scale=0.3), naive(exact, ctx)
    real = (SEGMENTS >= 0 if packed else torch.ones(2, 100, dtype=torch.bool))[:, None, :, None]
    weight = torch.randn_like(wanted) * real
    found = [y * real, *torch.autograd.grad((y * weight.to(dtype)).sum(), inputs)]
    both = zip(found, [wanted * real, *torch.autograd.grad((wanted * weight).sum(), exact)], strict=True)
    close = 1e-10 if dtype == torch.float64 else 3e-5
    for mine, true in both:
        assert (mine.double() - true).abs().max() <= close * (1 + true.abs().max())


class Largest(TorchDispatchMode):
    """The largest tensor that any operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None) -> object:
        made = func(*args, **(kwargs or {}))  # type: ignore[operator, dict-item]
        self.numel = max(self.numel, made.numel() if isinstance(made, Tensor) else 0)
        return made


def test_packed_sequences_need_no_mask_of_numbers() -> None:
    """Training on them makes nothing as large as T x T."""
    mixer, count = AttentionConfig().build(width=8, heads=2), 512
    x, places = torch.randn(1, count, 8, requires_grad=True), torch.arange(count).unsqueeze(0) % 100
    with Largest() as made:
        y, _ = mixer(x, Context(places, segments=torch.arange(count).unsqueeze(0) // 100))
        y.sum().backward()
    assert made.numel < count**2 // 4


@pytest.mark.parametrize("count", [70, 100])
def test_prompts_are_attended_whole(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's cached call and the parallel form are one computation."""
    mixer, seen, whole = AttentionConfig().build(width=8, heads=2), [], whole_attention
    monkeypatch.setattr("fewstep.nn.mixers.attention.whole_attention", lambda *given: seen.append(given) or whole(*given))
    x, places = torch.randn(2, count, 8), torch.arange(count).expand(2, -1)
    with torch.inference_mode():
        y, _ = mixer(x, Context(places))
        z, _ = mixer.extend(x, Context(places), mixer.init_state(2, 128, device="cpu", dtype=torch.float32))
    assert len(seen) == 2
    torch.testing.assert_close(z, y)


def test_other_devices_keep_pytorchs() -> None:
    q = torch.zeros(1, 1, 4, 8, device="meta")
    assert not flash_pays(q, q, None, Context(segments=SEGMENTS))
