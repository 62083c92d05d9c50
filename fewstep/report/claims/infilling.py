"""Gaps of eight characters in source text, filled by a model that reads both sides and by one that reads the left alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import final

from fewstep.core.random import CounterRng
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.filling import FillConfig, Filling
from fewstep.decode.generate import decode
from fewstep.decode.stream import Settings
from fewstep.diffusion.orders.ranked import ConfidenceConfig
from fewstep.models.model import Model
from fewstep.report.claims.at_hand import at_hand, tokenizer_of
from fewstep.report.claims.claim import Bench, Claim, Criterion, Finding
from fewstep.text.tokenizer import Tokenizer

_CHARACTERS = 8
_LEFT, _RIGHT = 32, 32  # the tokens that a gap has on either side, at least

EXACT = Criterion(
    "exact",
    f"share of gaps of {_CHARACTERS} characters that the masked model fills exactly, given both sides, over that of the "
    "autoregressive model, which goes on greedily from the left one for as many tokens",
    "arXiv 2502.09992, section 2.4 (filling in any order); the threshold is fewstep's own",
    "at least",
    1.0,
)


@final
@dataclass(frozen=True, slots=True)
class Gap:
    """Tokens `first` .. `end` - 1 of a text of `tokens`, which spell `text`."""

    tokens: list[int]
    first: int
    end: int
    text: str

    @property
    def row(self) -> list[int | None]:
        """The tokens with the gap in place of its own."""
        return [*self.tokens[: self.first], *[None] * (self.end - self.first), *self.tokens[self.end :]]


def measure(bench: Bench) -> Iterator[Finding]:
    """The one finding of this claim."""
    found = at_hand(bench, "masked", "code-masked-from-nano")
    tokenizer = tokenizer_of(bench)
    texts = [prompt.prompt + prompt.reference for prompt in bench.prompts[: bench.effort.count]]
    gaps = chosen(tokenizer, texts, bench.effort.seed)
    wanted = [gap.text for gap in gaps]
    both = [_spelt(tokenizer, gap, tokens) for gap, tokens in zip(gaps, filled(found.model, gaps), strict=True)]
    left = [_spelt(tokenizer, gap, tokens) for gap, tokens in zip(gaps, went_on(bench.model, gaps), strict=True)]
    mine, theirs = ([text == true for text, true in zip(texts, wanted, strict=True)] for texts in (both, left))
    exact, beside = sum(mine) / len(gaps), sum(theirs) / len(gaps)
    numbers = {
        "gaps": len(gaps),
        "tokens a gap": sum(gap.end - gap.first for gap in gaps) / len(gaps),
        "masked, exact": exact,
        "masked, characters": characters(both, wanted),
        "autoregressive, exact": beside,
        "autoregressive, characters": characters(left, wanted),
        "only masked": sum(a and not b for a, b in zip(mine, theirs, strict=True)),
        "only autoregressive": sum(b and not a for a, b in zip(mine, theirs, strict=True)),
    }
    how = (
        f"{exact:.3f} for {beside:.3f}, characters right {numbers['masked, characters']:.3f} for "
        f"{numbers['autoregressive, characters']:.3f}; {len(gaps)} gaps of {numbers['tokens a gap']:.1f} tokens; {found.told}"
    )
    if not beside:
        how = f"the autoregressive model fills none; {how}"
    yield Finding(EXACT, exact / beside if beside else None, how, numbers)


def chosen(tokenizer: Tokenizer, texts: Sequence[str], seed: int) -> list[Gap]:
    """One gap a text, that begins and ends where tokens do, any such by `seed`; texts without one are passed over.

    Raises ValueError where no text has one.
    """
    draws = CounterRng.seeded([seed]).split("gaps").uniform(len(texts))[0].tolist()
    gaps = []
    for text, draw in zip(texts, draws, strict=True):
        ids = tokenizer.encode(text)
        places = _places(tokenizer, ids)
        if places:
            first, end = places[int(draw * len(places))]
            gaps.append(Gap(ids, first, end, _between(tokenizer, ids, first, end)))
    if not gaps:
        raise ValueError(f"prompts: none has a gap between {_LEFT} and {_RIGHT} tokens; give longer ones, with references")
    return gaps


def filled(model: Model, gaps: Sequence[Gap]) -> list[list[int]]:
    """The most probable token of every place of each gap, the surest first, one a step."""
    filling = Filling(model, [gap.row for gap in gaps], FillConfig(order=ConfidenceConfig(temperature=0, per_step=1)))
    for _ in filling.steps():
        pass
    return [result.tokens[gap.first : gap.end] for gap, result in zip(gaps, filling.results(), strict=True)]


def went_on(model: Model, gaps: Sequence[Gap]) -> list[list[int]]:
    """As many tokens as each gap has, the most probable after what stands on its left."""
    network = model.network
    settings = Settings(max_new_tokens=[gap.end - gap.first for gap in gaps])
    prompts = [gap.tokens[: gap.first] for gap in gaps]
    return [row.tokens for row in decode(network, SilentConfig().build(network, lambda path: network), prompts, settings)]


def characters(found: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of the characters wanted that stand in their places."""
    right = sum(a == b for one, other in zip(found, wanted, strict=True) for a, b in zip(one, other, strict=False))
    return right / sum(map(len, wanted))


def _places(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Every first and end between which tokens spell as many whole characters as a gap has."""
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    # the tokens before each place, by the characters they spell; one that completes none ends within a character
    places = {length: i for i, length in enumerate(accumulate(map(len, pieces)), 1) if pieces[i - 1]}
    pairs = ((first, places.get(length + _CHARACTERS, 0)) for length, first in places.items())
    return [(first, end) for first, end in pairs if _LEFT <= first < end <= len(ids) - _RIGHT]


def _between(tokenizer: Tokenizer, ids: Sequence[int], first: int, end: int) -> str:
    return tokenizer.decode(ids[:end])[len(tokenizer.decode(ids[:first])) :]


def _spelt(tokenizer: Tokenizer, gap: Gap, tokens: Sequence[int]) -> str:
    """What `tokens` spell in the gap, behind the text on its left."""
    ids = [*gap.tokens[: gap.first], *tokens]
    return _between(tokenizer, ids, gap.first, len(ids))


CLAIM = Claim(
    "infilling",
    "Nie et al. 2025, arXiv 2502.09992; Sahoo et al. 2024, arXiv 2406.07524",
    "A masked model, which reads both sides of a gap, fills it better than an autoregressive one that reads the left alone.",
    (EXACT,),
    measure,
)
