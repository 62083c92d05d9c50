"""Generation as users ask for it: a model and prompts in, text out. Everything else is the loop's.

This file picks the drafter and knows how text becomes tokens. It knows no file format: models are handed in.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, final

from pydantic import Field
from torch import Tensor

from fewstep.core.draft import Drafter
from fewstep.core.event import Cost, Event
from fewstep.core.recipe import choice, lookup, parse
from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.generate import Completion, Transcripts, requests
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.narrate import Narrator, Piece
from fewstep.decode.stream import Settings
from fewstep.decode.verification import VERIFICATIONS, TokenVerificationConfig, VerificationConfig
from fewstep.models.model import Model

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | Tensor


@final
class GenerationConfig(SamplingConfig):
    """How a text goes on: the sampling law, and how much of it.

    `max_new_tokens` per row; `stop` strings end a text and are no part of it; `samples` continuations per prompt; `budget`: nodes
    of a drafted tree, its root included; `ignore_eos` goes on past end-of-text (to compare speeds); `keep_logits` returns them.
    `verification`: "token", "block" (for drafted chains), or "typical", which is lossy: the text does not have the
    model's law.
    """

    max_new_tokens: int = Field(64, ge=1)
    stop: tuple[str, ...] = ()
    samples: int = Field(1, ge=1)
    seed: int = 0
    budget: int = Field(16, ge=1)
    ignore_eos: bool = False
    keep_logits: bool = False
    verification: choice(lambda: VERIFICATIONS, "verification") = TokenVerificationConfig()  # type: ignore[valid-type]

    @property
    def judged(self) -> VerificationConfig:
        """How drafts are judged."""
        return cast(VerificationConfig, self.verification)


def drafter_config(model: Model, drafter: str, fields: Mapping[str, object]) -> DrafterConfig:
    """The config that a name stands for, with the values `fields` names.

    "auto" is the checkpoint's own heads where it has some, else prompt lookup; "NAME=PATH" sets the path of a second model.
    Raises ValueError for an unknown name or value.
    """
    name, _, path = drafter.partition("=")
    if name == "auto":
        name = next((head for head in model.network.heads if head in DRAFTERS), "ngram")
    return parse(lookup(DRAFTERS, name, "drafter"), {**({"path": path} if path else {}), **fields}, "drafter")


def pick_drafter(
    model: Model, drafter: str | DrafterConfig | Drafter[Any], load: Load, fields: Mapping[str, object] | None = None
) -> Drafter[Any]:
    """The drafter that a name (as `drafter_config` reads it, with `fields`), a config or a drafter stands for.

    Raises ValueError for an unknown name or one that does not fit the model.
    """
    if isinstance(drafter, str):
        drafter = drafter_config(model, drafter, fields or {})
    return drafter.build(model.network, load) if isinstance(drafter, DrafterConfig) else drafter


@final
class Generation:
    """One request under way: iterate for text as it becomes certain, then ask for the completions and the cost.

    `prompts` are texts or token ids. Raises ValueError for an empty prompt, one that exceeds the context, or text for a model
    without a tokenizer.
    """

    def __init__(
        self, model: Model, prompts: Prompts, drafter: Drafter[Any], config: GenerationConfig = GenerationConfig()
    ) -> None:
        ids = _encoded(model, prompts)
        rows = len(ids) * config.samples
        if config.stop and model.tokenizer is None:
            raise ValueError(
                f"stop={config.stop!r}: the model has no tokenizer to find text with; load it with its tokenizer.json"
            )
        self.cost = Cost()
        self._narrator = None if model.tokenizer is None else Narrator(model.tokenizer, rows, config.stop)
        self._transcripts, self._rows = Transcripts(rows), rows
        settings = Settings(
            max_new_tokens=config.max_new_tokens,
            eos=() if config.ignore_eos else model.eos_ids,
            budget=config.budget,
            keep_logits=config.keep_logits,
            verify=config.judged.build(),
        )
        self._events = requests(
            model.network,
            drafter,
            ids,
            settings,
            sampling=config,
            seed=config.seed,
            samples=config.samples,
            review=self._narrator,
        )

    def __iter__(self) -> Iterator[Piece]:
        for event in self._events:
            self._transcripts.take(event)
            self.cost = event.cost
            if self._narrator is not None:
                yield from self._narrator.pieces()

    def steps(self) -> Iterator[Event[Any]]:
        """The loop's own events instead of text, for measurements."""
        for event in self._events:
            self._transcripts.take(event)
            self.cost = event.cost
            yield event

    def completions(self) -> list[Completion]:
        """What each row got so far: samples of one prompt side by side."""
        done = self._transcripts.completions()
        if self._narrator is None:
            return done
        return [replace(row, text=self._narrator.text(i)) for i, row in enumerate(done)]


def generate(
    model: Model, prompts: Prompts, drafter: Drafter[Any], config: GenerationConfig = GenerationConfig()
) -> list[Completion]:
    """`Generation` run to its end: one completion per prompt and sample."""
    generation = Generation(model, prompts, drafter, config)
    for _ in generation:
        pass
    return generation.completions()


def _encoded(model: Model, prompts: Prompts) -> list[list[int]]:
    if isinstance(prompts, Tensor):
        return prompts.reshape(-1, prompts.shape[-1]).tolist()
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not isinstance(texts[0], str):
        return [[int(token) for token in cast(Sequence[int], row)] for row in texts]
    if model.tokenizer is None:
        raise ValueError("prompt: text, but the model has no tokenizer; give token ids, or load it with its tokenizer.json")
    encoded = [model.tokenizer.encode(str(text)) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise ValueError(f"prompt={text!r}: no token in it; write at least one character")
    return encoded
