"""Who races in `race text`: trainings (networks) and methods (ways to generate with one), a line each.

All networks have one backbone, one tokenizer and one text. This file trains and measures nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, final

from pydantic import Field, field_validator, model_validator

from fewstep.core.recipe import Config, Recipe, choice, lookup
from fewstep.recipes import SECTIONS
from fewstep.training.data import DATA, StdlibConfig

Family = Literal["ar", "masked", "score", "block"]


@final
@dataclass(frozen=True, slots=True)
class Training:
    """A network. `title` for people, `family` for its colour; `objective`: what it minimises; `model`: what sets it apart.

    `weight`: the time a token of training takes, that of an autoregressive model being 1.
    """

    title: str
    family: Family
    objective: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    weight: float = 1.0

    @property
    def fills(self) -> bool:
        """Whether it fills gaps in place of going on from left to right."""
        return self.family != "ar"


_HEADS: Mapping[str, Any] = MappingProxyType({"heads": [{"kind": "mtp_sequential", "depth": 3}]})
_NOISY: Mapping[str, Any] = MappingProxyType({"noisy": True})
_UNIFORM: Mapping[str, Any] = MappingProxyType({"kind": "uniform", "noise": "geometric"})

TRAININGS: Mapping[str, Training] = MappingProxyType(
    {
        "ar": Training("Autoregressive", "ar", {"kind": "next_token"}),
        "mtp": Training("Multi-token prediction", "ar", {"kind": "mtp", "weight": 0.6}, _HEADS, 3.0),
        "mdlm": Training("MDLM", "masked", {"kind": "masked", "estimator": "antithetic-time"}),
        "llada": Training(
            "LLaDA",
            "masked",
            {"kind": "masked", "estimator": "iid-time", "noise": {"kind": "log-linear", "least": 0.0}},
        ),
        "stratified": Training("Stratified count", "masked", {"kind": "masked", "estimator": "stratified-count"}),
        "sedd": Training("SEDD, absorbing", "score", {"kind": "score_entropy", "corruption": "absorbing"}, _NOISY, 6.0),
        "sedd-uniform": Training("SEDD, uniform", "score", {"kind": "score_entropy", "corruption": _UNIFORM}, _NOISY, 6.0),
        "block-1": Training("Block of 1", "block", {"kind": "block", "size": 1, "estimator": "iid-count"}, weight=2.5),
        "block-4": Training("Block of 4", "block", {"kind": "block", "size": 4}, weight=2.5),
        "block-16": Training("Block of 16", "block", {"kind": "block", "size": 16}, weight=2.5),
    }
)


@final
@dataclass(frozen=True, slots=True)
class Method:
    """A way to generate with the network of `training`, once at each of `rungs`, which are, as `by` says, tokens revealed a step,
    the probability from which a token is revealed, or tokens drafted a call. `order`: of those that fill gaps."""

    title: str
    training: str
    by: Literal["tokens a step", "probability", "drafted"]
    rungs: tuple[float, ...]
    order: str = ""

    def ordering(self, rung: float) -> dict[str, Any]:
        """The fields of the order at a rung; tokens are drawn from the model's own law."""
        return {"kind": self.order, "temperature": 1.0, **({"threshold": rung} if self.by == "probability" else {})}

    def steps(self, rung: float, width: int) -> int:
        """Of the grid, for `width` positions that are filled together."""
        return max(1, round(width / rung)) if self.by == "tokens a step" else width


_ALL, _SURE = (1.0, 2.0, 4.0, 8.0), (0.9, 0.7, 0.5)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ar": Method("Autoregressive", "ar", "drafted", (0,)),
        "mtp": Method("Multi-token prediction", "mtp", "drafted", (1, 2, 3)),
        "mdlm": Method("MDLM, ancestral", "mdlm", "tokens a step", _ALL, "ancestral"),
        "mdlm-sure": Method("MDLM, threshold", "mdlm", "probability", _SURE, "threshold"),
        "llada": Method("LLaDA, confidence", "llada", "tokens a step", _ALL, "confidence"),
        "stratified": Method("Stratified count, ancestral", "stratified", "tokens a step", _ALL, "ancestral"),
        "sedd": Method("SEDD, analytic", "sedd", "tokens a step", _ALL, "analytic"),
        "sedd-uniform": Method("SEDD uniform, analytic", "sedd-uniform", "tokens a step", _ALL, "analytic"),
        "block-1": Method("Block of 1", "block-1", "tokens a step", (1.0,), "random"),
        "block-4": Method("Block of 4", "block-4", "tokens a step", (1.0, 2.0, 4.0), "random"),
        "block-4-sure": Method("Block of 4, threshold", "block-4", "probability", _SURE, "threshold"),
        "block-16": Method("Block of 16", "block-16", "tokens a step", _ALL, "random"),
    }
)


@final
class TextRaceConfig(Config):
    """What a race of language models holds equal for everybody.

    `methods`: names of the table; (): all. Networks of `width` and `depth` are trained on `tokens` each, or for `seconds` where
    these are given, in batches of `batch` rows of `length` tokens. Their bits are taken of `windows` held-out rows, by `draws`
    patterns of noise, `repeats` times over. Each method continues `count` held-out prompts of `prompt` tokens to the full length,
    `together` at a time, at the first `rungs` of its own; `judge` is the autoregressive model that reads what they wrote.
    """

    methods: tuple[str, ...] = ()
    data: choice(lambda: DATA, "data") = StdlibConfig()  # type: ignore[valid-type]
    vocab: int = Field(default=2048, ge=257)
    width: int = Field(default=96, ge=32, multiple_of=32)
    depth: int = Field(default=3, ge=1)
    tokens: int = Field(default=4_000_000, ge=1)
    seconds: float | None = Field(default=None, gt=0)
    batch: int = Field(default=16, ge=1)
    length: int = Field(default=128, ge=16, multiple_of=16)
    windows: int = Field(default=64, ge=1)
    draws: int = Field(default=8, ge=1)
    repeats: int = Field(default=8, ge=2)
    judge: str = "code-nano"
    count: int = Field(default=32, ge=1)
    prompt: int = Field(default=32, ge=1)
    together: int = Field(default=8, ge=1)
    rungs: int = Field(default=4, ge=1)
    seed: int = 0

    @field_validator("methods")
    @classmethod
    def _are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            lookup(METHODS, name, "methods")
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _leaves_room(self) -> "TextRaceConfig":
        if self.prompt >= self.length or self.prompt % 16:
            raise ValueError(f"prompt={self.prompt}: must be a multiple of 16 below length={self.length}; lower it")
        return self

    @property
    def entrants(self) -> list[str]:
        """The methods that race."""
        return [name for name in METHODS if name in (self.methods or METHODS)]

    @property
    def trained(self) -> list[str]:
        """The networks that they need."""
        return [name for name in TRAININGS if name in {METHODS[entrant].training for entrant in self.entrants}]


def recipe_of(config: TextRaceConfig, training: str) -> Recipe:
    """How the network of `training` is trained: the same for all but what is predicted from what."""
    row = TRAININGS[training]
    masked = {"vocab": config.vocab + 1, "mask_token": config.vocab} if row.fills else {"vocab": config.vocab}
    budget = {"tokens": config.tokens} if config.seconds is None else {"seconds": config.seconds}
    values = {
        "model": {
            "kind": "decoder",
            **masked,
            "width": config.width,
            "depth": config.depth,
            "query_heads": config.width // 32,
            "hidden": 8 * config.width // 3,
            "mixers": [{"kind": "attention", "kv_heads": 1, "head_width": 32}],
            "tied": False,
            "embed_std": 1.0,
            **row.model,
        },
        "tokenizer": {"kind": "bpe", "vocab": config.vocab},
        "data": config.data.model_dump(mode="json"),
        "objective": dict(row.objective),
        "optim": {"kind": "muon", "lr": 6e-3, "weight_decay": 0.05},
        "schedule": {"kind": "wsd"},
        "precision": {"kind": "fp32"},
        "budget": budget,
        "run": {
            "batch": config.batch,
            "length": config.length,
            "seed": config.seed,
            "validate_every": 0,
            "checkpoint_steps": 0,
            "checkpoint_seconds": 60.0,
        },
    }
    return Recipe.from_values(f"race-text-{training}", values, registries=SECTIONS)
