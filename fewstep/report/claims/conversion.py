"""An autoregressive model turned into a block diffusion one with a tenth of its training: what that costs in bits.

The bits of the same checkpoint read from left to right are told beside: it was not trained to be read so any more.
"""

from collections.abc import Iterator

import torch

from fewstep.core.objective import Batch
from fewstep.core.recipe import parse
from fewstep.report.claims.at_hand import at_hand, data_of, tokenizer_of
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.report.likelihood_bound import nats_bound
from fewstep.report.text_cells import Setup, exact
from fewstep.report.text_methods import TextRaceConfig

_TRAINED = 2_712_576  # tokens that code-nano has seen
_TOKENS, _BATCH = 271_000, 8 * 384  # a tenth of them; a run ends with the batch that reaches it
_LENGTH, _DRAWS, _REPEATS = 128, 8, 4

BITS = Criterion(
    "bits",
    "bits per byte of held-out text by the block model, a bound, over those of code-nano, which it was made from with "
    f"{_TOKENS:,} tokens, a tenth of code-nano's own",
    "fewstep's own goal; arXiv 2410.17891 and 2509.26328 (conversion)",
    "at most",
    1.10,
)


def measure(bench: Bench) -> Iterator[Finding]:
    """The one finding of this claim: `count` rows of held-out text, the same for all, each but for its first token."""
    effort, tokenizer = bench.effort, tokenizer_of(bench)
    found = at_hand(bench, "convert10", "code-block-from-nano", tokens=_TOKENS)
    if found.tokens is None or found.tokens >= _TOKENS + _BATCH:
        yield Finding(BITS, None, f"{found.path}: {found.told}, {_TOKENS:,} are claimed; give the folder of such a run, or none")
        return
    sizes = {"length": _LENGTH, "prompt": 16, "windows": effort.count, "count": 1, "seed": effort.seed}
    config = parse(TextRaceConfig, {**sizes, "data": data_of(bench)})
    rows = Setup(config, bench.scratch, bench.console).held_out(tokenizer)
    tokens = torch.tensor(rows)
    scored = torch.ones_like(tokens, dtype=torch.bool)
    scored[:, 0] = False
    batch, size = Batch(tokens, None, {"scored": scored}), sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)
    bound = nats_bound(found.model.network, batch, block=found.block, draws=_DRAWS, repeats=_REPEATS, seed=effort.seed)
    (value, error), (own, _), (left, _) = (
        each.bits(size) for each in (bound, exact(bench.model.network, batch), exact(found.model.network, batch))
    )
    numbers = {
        "block": value,
        "block, error": error,
        "autoregressive": own,
        "left to right, the same checkpoint": left,
        "tokens": found.tokens,
        "share of tokens": found.tokens / _TRAINED,
    }
    how = (
        f"{value:.3f} +- {error:.3f} for {own:.3f}, {len(rows)} rows, blocks of {found.block}; {found.tokens / _TRAINED:.2%} "
        f"of the tokens; the same checkpoint from left to right {left:.3f}"
    )
    yield Finding(BITS, value / own, how, numbers)


CLAIM = Claim(
    "conversion",
    "Gong et al. 2024, arXiv 2410.17891 (DiffuLLaMA); Fast-dLLM v2, arXiv 2509.26328",
    "An autoregressive model becomes a block diffusion one with a tenth of its training, and loses a tenth of its bits at most.",
    (BITS,),
    measure,
)
