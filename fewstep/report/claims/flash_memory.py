"""FlashAttention's memory: linear in the length, with and without a learned bias, for the same outputs and gradients.

Bytes are those of the tensors that a forward and a backward pass make and hold at once, beside the inputs; nothing is timed.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fewstep.core.mixer import Context
from fewstep.core.random import CounterRng
from fewstep.nn.flash import flash_attention
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.claims.counts import most_bytes

_LENGTHS, _WIDTH = (512, 1024, 2048, 4096), 64
_GROWN = _LENGTHS[-1] / _LENGTHS[0]
_PAPER = "arXiv 2205.14135"

LINEAR = Criterion(
    "linear",
    "memory is linear in the length: bytes for 4096 tokens over those for 512, forward and backward",
    f"{_PAPER}, theorem 1",
    "at most",
    _GROWN,
)
BIASED = Criterion(
    "linear-with-a-bias",
    "the same with a learned bias by distance, whose gradient is asked for",
    f"{_PAPER}, theorem 1; the bias is fewstep's own",
    "at most",
    _GROWN,
)
MIXER = Criterion(
    "linear-as-a-mixer",
    "the same of the attention mixer, which calls PyTorch's fused kernel",
    f"{_PAPER}, theorem 1",
    "at most",
    _GROWN,
)
QUADRATIC = Criterion(
    "the-formula-is-quadratic",
    "the same of attention as the formula says it, with all scores at once",
    f"{_PAPER}, section 2.2; the threshold is fewstep's own",
    "at least",
    0.75 * _GROWN**2,
)
SAVED = Criterion(
    "saved",
    "up to 20 times less memory than exact attention: the formula's bytes over FlashAttention's for 4096 tokens",
    f"{_PAPER}, section 4.3, recalled",
    "at least",
    20.0,
)
EXACT = Criterion(
    "exact",
    "nothing is approximated: largest difference of outputs and gradients over the largest of them, float64, 512 tokens",
    f"{_PAPER}, theorem 1; the threshold is fewstep's own",
    "at most",
    1e-10,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    rng = CounterRng.seeded([bench.effort.seed])
    how = f"one head of {_WIDTH} channels, causal, float32"
    flash = {length: bytes_of(flash_causal, drawn(rng, length)) for length in _LENGTHS}
    yield Finding(LINEAR, _growth(flash), f"{how}; {_each(flash)}", _named(flash))
    biased = {length: bytes_of(flash_biased, [*drawn(rng, length), bias(rng, length)]) for length in _LENGTHS}
    yield Finding(BIASED, _growth(biased), f"{how}; {_each(biased)}", _named(biased))
    mixer = {length: _bytes_of_mixer(rng, length) for length in _LENGTHS}
    yield Finding(MIXER, _growth(mixer), "its projections included, the kernel's own scratch not", _named(mixer))
    formula = {length: bytes_of(by_the_formula, drawn(rng, length)) for length in _LENGTHS}
    yield Finding(QUADRATIC, _growth(formula), how, _named(formula))
    longest = _LENGTHS[-1]
    saved = {length: formula[length] / flash[length] for length in _LENGTHS}
    told = (
        f"{saved[_LENGTHS[0]]:.2g} for {_LENGTHS[0]} tokens; {formula[longest] / 2**20:.0f} and {flash[longest] / 2**20:.1f} MiB"
    )
    yield Finding(SAVED, saved[longest], told, {str(length): ratio for length, ratio in saved.items()})
    yield Finding(
        EXACT,
        difference(drawn(rng, _LENGTHS[0], torch.float64)),
        "causal; outputs, and gradients of q, k and v; in PyTorch's operators, which take float64",
    )


def drawn(rng: CounterRng, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v [1,1,T,64] that ask for their gradients."""
    return [rng.split(name).normal(1, 1, length, _WIDTH)[0].to(dtype).requires_grad_() for name in "qkv"]


def bias(rng: CounterRng, length: int) -> Tensor:
    """[1,2T-1] by distance, float32."""
    return rng.split("bias").normal(1, 2 * length - 1)[0].float().requires_grad_()


def flash_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention's outputs."""
    return flash_attention(q, k, v, causal=True)[0]


def flash_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same with a bias by distance."""
    return flash_attention(q, k, v, bias, causal=True)[0]


def by_the_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(E)) v over the keys up to each query's own."""
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT * q.shape[3] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def bytes_of(attention: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """The most bytes that `attention` of `inputs` and its gradients take beside the inputs."""
    return most_bytes(lambda: torch.autograd.grad(attention(*inputs).sum(), inputs), inputs)


def difference(inputs: list[Tensor]) -> float:
    """Between the formula and FlashAttention: outputs and gradients, relative to the largest."""
    worst = 0.0
    upstream = torch.linspace(-1, 1, inputs[0].numel(), dtype=inputs[0].dtype).view_as(inputs[0])
    outputs = [attention(*inputs) for attention in (by_the_formula, flash_causal)]
    for wanted, found in zip(
        *([output.detach(), *torch.autograd.grad(output, inputs, upstream)] for output in outputs), strict=True
    ):
        worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max()))
    return worst


def _bytes_of_mixer(rng: CounterRng, length: int) -> int:
    with torch.random.fork_rng(devices=[]):
        mixer = AttentionConfig().build(width=_WIDTH, heads=1)
    x = drawn(rng, length)[0][0]
    positions = torch.arange(length).unsqueeze(0)
    wanted = [x, *mixer.parameters()]
    return most_bytes(lambda: torch.autograd.grad(mixer(x, Context(positions))[0].sum(), wanted), [*wanted, positions])


def _growth(found: dict[int, int]) -> float:
    return found[_LENGTHS[-1]] / found[_LENGTHS[0]]


def _each(found: dict[int, int]) -> str:
    return "bytes a token " + ", ".join(f"{size / length:.0f} for {length}" for length, size in found.items())


def _named(found: dict[int, int]) -> dict[str, int]:
    return {f"bytes, {length} tokens": size for length, size in found.items()}


CLAIM = Claim(
    "flash-memory",
    f"Dao et al. 2022, FlashAttention, {_PAPER}",
    "Exact attention tile by tile needs memory linear in the length, where the formula needs its square.",
    (LINEAR, BIASED, MIXER, QUADRATIC, SAVED, EXACT),
    measure,
)
