"""What a claim is: a paper's numbers with thresholds fixed beforehand, how they are measured, and the verdict.

This file knows no paper.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from pydantic import Field
from rich.console import Console
from rich.table import Table

from fewstep.core.recipe import Config
from fewstep.models.model import Model
from fewstep.report.prompts import Prompt

Verdict = Literal["reproduced", "not reproduced", "not measured"]


@final
class Effort(Config):
    """How much a reproduction may spend: prompts and tokens of each, rounds of timing, draws of the tests of laws, seconds of
    training for each network that is not at hand, steps for those that are compared after as many. `model` and `draft`: names,
    directories or hub ids; `dtype` their weights'. `heads`: a folder with the heads for the model by kind, medusa in
    heads/medusa, as `fewstep train medusa --out heads/medusa` leaves them, and with whole models made of it (block, masked,
    block-quarter, convert10); those that are missing are trained there.
    """

    model: str = "code-nano"
    draft: str = ""
    heads: str = ""
    dtype: str = "float32"
    count: int = Field(default=24, ge=1)
    max_new_tokens: int = Field(default=64, ge=2)
    rounds: int = Field(default=3, ge=1)
    draws: int = Field(default=20_000, ge=1000)
    seconds: float = Field(default=120.0, gt=0)
    steps: int = Field(default=1000, ge=1)
    seed: int = 0


@final
@dataclass(frozen=True, slots=True)
class Bench:
    """What claims are measured on: the model, a draft model of it if at hand, held-out prompts, a folder for scratch, and one
    that stays, if any, where a killed run finds again what it measured."""

    model: Model
    draft: Model | None
    prompts: Sequence[Prompt]
    effort: Effort
    scratch: Path
    console: Console
    kept: Path | None = None


@final
@dataclass(frozen=True, slots=True)
class Criterion:
    """One number, stated before it is measured.

    `statement`: what is claimed. `origin`: where, "recalled" when the wording was not checked against the paper. The measured
    value must be `rule` ("at least", "at most") `threshold`.
    """

    name: str
    statement: str
    origin: str
    rule: Literal["at least", "at most"]
    threshold: float

    def met(self, value: float) -> bool:
        """Whether `value` keeps the threshold; no number never does."""
        return value >= self.threshold if self.rule == "at least" else value <= self.threshold


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """A criterion with its measured `value` (None: not measured, `how` says why) and the `numbers` behind it."""

    criterion: Criterion
    value: float | None
    how: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        if self.value is None:
            return "not measured"
        return "reproduced" if self.criterion.met(self.value) else "not reproduced"


Measure = Callable[[Bench], Iterator[Finding]]


@final
@dataclass(frozen=True, slots=True)
class Claim:
    """A paper's claim: `criteria` in the order in which `measure` yields their findings."""

    name: str
    source: str
    statement: str
    criteria: tuple[Criterion, ...]
    measure: Measure


@final
@dataclass(frozen=True, slots=True)
class Report:
    """A claim and what was found. It is reproduced when every criterion that could be measured is."""

    claim: Claim
    findings: tuple[Finding, ...]
    setting: Mapping[str, Any]

    @property
    def verdict(self) -> Verdict:
        found = {finding.verdict for finding in self.findings} - {"not measured"}
        if not found:
            return "not measured"
        return "reproduced" if found == {"reproduced"} else "not reproduced"

    @property
    def summary(self) -> str:
        """One line: how many criteria are met, and the first of them with its value."""
        met = sum(finding.verdict == "reproduced" for finding in self.findings)
        first = next((finding for finding in self.findings if finding.value is not None), None)
        told = f"; {first.criterion.name} {first.value:.3g}" if first else ""
        return f"{met} of {len(self.claim.criteria)} criteria met{told}"

    def as_dict(self) -> dict[str, Any]:
        """Everything, for `reproduce-NAME.json`."""
        claim = self.claim
        findings = [
            {
                **asdict(finding.criterion),
                "measured": finding.value,
                "verdict": finding.verdict,
                "how": finding.how,
                "numbers": dict(finding.numbers),
            }
            for finding in self.findings
        ]
        head = {"name": claim.name, "source": claim.source, "statement": claim.statement, "verdict": self.verdict}
        return {**head, "summary": self.summary, "findings": findings, "setting": dict(self.setting)}

    def table(self) -> Table:
        """Claim, threshold, measured value and verdict for a terminal."""
        table = Table(title=f"{self.claim.name}: {self.claim.source}", caption=f"{self.verdict}: {self.summary}", show_lines=True)
        for column in ("claim", "threshold", "measured", "verdict"):
            table.add_column(column, justify="right" if column in ("threshold", "measured") else "left")
        for finding in self.findings:
            criterion, value = finding.criterion, finding.value
            style = {"reproduced": "green", "not reproduced": "red", "not measured": "dim"}[finding.verdict]
            table.add_row(
                f"{criterion.name}: {criterion.statement} [{criterion.origin}]".replace("[", r"\["),
                f"{criterion.rule} {criterion.threshold:g}",
                "-" if value is None else f"{value:.4g}",
                f"[{style}]{finding.verdict}[/]\n{finding.how}",
            )
        return table
