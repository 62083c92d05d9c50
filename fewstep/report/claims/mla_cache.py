"""Multi-head latent attention: what a token leaves in the cache, counted in real states, and that reading it changes nothing."""

from collections.abc import Iterator

import torch

from fewstep.core.mixer import Context
from fewstep.core.position import NoPosition
from fewstep.core.recipe import Config
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.mixers.mla import MLAConfig
from fewstep.nn.position import RopeConfig
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding

_PAPER = "arXiv 2405.04434"
_WIDTH, _HEADS, _HEAD_WIDTH = 5120, 128, 128
_DEEPSEEK = MLAConfig(latent=512, query_latent=1536, content_width=128, rotary_width=64, value_width=128)
_CAPACITY = 64  # tokens of the states that are counted

SHARE = Criterion(
    "share-of-multi-head",
    "bytes of cache a token over those of multi-head attention with the same heads, at DeepSeek-V2's proportions",
    f"{_PAPER}, table 1; the threshold is fewstep's own",
    "at most",
    1 / 8,
)
GROUPS = Criterion(
    "groups",
    "its cache is that of grouped-query attention with so many groups",
    f"{_PAPER}, section 2.1.4 and table 1",
    "at most",
    2.25,
)
EQUAL = Criterion(
    "absorbed-is-materialised",
    "absorbing the up-projections changes no output: largest difference in float64 over the largest output, like proportions",
    f"{_PAPER}, section 2.1.2",
    "at most",
    1e-10,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The findings of this claim, in the order of its criteria."""
    latent, full = _bytes_per_token(_DEEPSEEK), _bytes_per_token(AttentionConfig(head_width=_HEAD_WIDTH))
    numbers = {"mla": latent, "multi-head": full, "default sizes": _default_share()}
    how = f"{latent:g} of {full:g} bytes in bfloat16; with fewstep's sizes for 4 heads of 64: {numbers['default sizes']:.3g}"
    yield Finding(SHARE, latent / full, how, numbers)
    group = _bytes_per_token(AttentionConfig(head_width=_HEAD_WIDTH, kv_heads=1))
    yield Finding(GROUPS, latent / group, f"one group takes {group:g} bytes", {"group": group})
    with torch.random.fork_rng():
        torch.manual_seed(bench.effort.seed)
        yield Finding(EQUAL, _difference(), "8 heads, latent of 4 and rotary key of half their width, 40 tokens then 3 more")


def _bytes_per_token(config: Config, width: int = _WIDTH, heads: int = _HEADS) -> float:
    """Counted in a state that is really there; the weights are not."""
    with torch.device("meta"):
        mixer = config.build(width=width, heads=heads)  # type: ignore[attr-defined]
    return float(mixer.init_state(1, _CAPACITY, device="cpu", dtype=torch.bfloat16).nbytes()) / _CAPACITY


def _default_share() -> float:
    return _bytes_per_token(MLAConfig(), 256, 4) / _bytes_per_token(AttentionConfig(), 256, 4)


def _difference() -> float:
    """Between the parallel form of a sequence and its end decoded in the latents."""
    config = MLAConfig(latent=64, query_latent=48, content_width=16, rotary_width=8, value_width=16)
    position: NoPosition = RopeConfig().build(head_width=8)
    mixer = config.build(width=128, heads=8, position=position).double()
    x, positions = torch.randn(1, 43, 128, dtype=torch.float64), torch.arange(43).unsqueeze(0)
    with torch.no_grad():
        whole, _ = mixer(x, Context(positions))
        state = mixer.init_state(1, 43, device="cpu", dtype=torch.float64)
        _, state = mixer.extend(x[:, :40], Context(), state)
        assert mixer.absorbs(3), "else nothing is compared"
        end, _ = mixer.extend(x[:, 40:], Context(), state)
        return float((end - whole[:, 40:]).abs().max() / whole.abs().max())


CLAIM = Claim(
    "mla-cache",
    "DeepSeek-AI 2024, DeepSeek-V2, arXiv 2405.04434",
    "a fraction of multi-head attention's cache, and the same outputs whether keys are materialised or absorbed",
    (SHARE, GROUPS, EQUAL),
    measure,
)
