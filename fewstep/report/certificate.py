"""The certificate of a drafter on a model: sampled output has the model's law, greedy output its very bits.

Written for the terminal and as JSON. How laws are tested is in `exactness`, with what sensitivity in `power`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, final

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fewstep.core.draft import Drafter
from fewstep.core.model import Target
from fewstep.core.recipe import parse, resolve
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.silent import Silent
from fewstep.decode.generate import Completion, decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.decode.text import drafter_config
from fewstep.decode.verification import VERIFICATIONS, TokenVerificationConfig, VerificationConfig
from fewstep.hub.heads import companion
from fewstep.models.model import Model
from fewstep.report.exactness import ExactnessConfig, Laws, certify, liveliest
from fewstep.report.prompts import Prompt, prompts_for, read_prompts

_LAST = 32  # tokens of a prompt that serve as a context: short ones are cheap to copy
_DEEPER = 10  # the share of draws that go through whole trees where those cost much more than their first level

SCOPE = (
    "Seen: drafted nodes not drawn as declared, wrong verification, a tree call that gives another law than plain decoding; at "
    "the contexts named, first and second tokens. Not seen: other contexts, deeper levels, differences among the tokens pooled "
    "beyond the 63 likeliest, and the sampling transform itself (temperature, top-p, ...), which both sides share."
)


@final
@dataclass(frozen=True, slots=True)
class Sameness:
    """Greedy decoding with a drafter beside plain decoding: of `prompts`, how many got the same tokens, and the same logits bit
    for bit; `difference` says where the first one differs ("": none)."""

    dtype: str
    prompts: int
    tokens: int
    logits: int
    difference: str

    @property
    def passed(self) -> bool:
        return self.tokens == self.logits == self.prompts


@final
@dataclass(frozen=True, slots=True)
class Certificate:
    """What was tested and found. `laws`: by the trees that were drawn; `contexts`: where, by name."""

    setting: Mapping[str, Any]
    config: ExactnessConfig
    contexts: tuple[str, ...]
    laws: Mapping[str, Laws]
    greedy: tuple[Sameness, ...]

    @property
    def passed(self) -> bool:
        return all(laws.passed(self.config) for laws in self.laws.values()) and all(same.passed for same in self.greedy)

    def as_dict(self) -> dict[str, Any]:
        """Every number in JSON values."""
        laws = {
            trees: {
                "evaluation": found.evaluation,
                "passed": found.passed(self.config),
                **{name: {**asdict(test), "detectable": self._seen(test)} for name, test in _tests(found)},
            }
            for trees, found in self.laws.items()
        }
        greedy = [{**asdict(same), "passed": same.passed} for same in self.greedy]
        facts = {"passed": self.passed, "setting": dict(self.setting), "config": self.config.model_dump(mode="json")}
        return {**facts, "contexts": list(self.contexts), "laws": laws, "greedy": greedy, "scope": SCOPE}

    def show(self, console: Console) -> None:
        """Two tables, the scope and the verdict."""
        alarm = self.config.alarm / self.config.tests
        sampled = Table(title=f"Sampled: {', '.join(self.contexts)}", box=SIMPLE_HEAD)
        for column in ("trees", "token", "draws", "chi-square", "p-value", f"sees TV ({100 * self.config.power:g}%)", ""):
            sampled.add_column(column, justify="left" if column == "trees" else "right")
        for trees, found in self.laws.items():
            for name, test in _tests(found):
                shown = f"{test.statistic:.0f} / {test.freedom}"
                verdict = "same law" if test.p_value > alarm else "DIFFERS"
                sampled.add_row(trees, name, str(test.draws), shown, f"{test.p_value:.2g}", f"{self._seen(test):.3f}", verdict)
        console.print(sampled)
        greedy = Table(title="Greedy, beside plain decoding", box=SIMPLE_HEAD)
        for column in ("dtype", "prompts", "same tokens", "same logits", "first difference"):
            greedy.add_column(column)
        for same in self.greedy:
            greedy.add_row(same.dtype, str(same.prompts), str(same.tokens), str(same.logits), same.difference or "none")
        console.print(greedy)
        console.print(SCOPE, highlight=False)
        console.print(f"False-alarm rate of the sampled tests together: {100 * self.config.alarm:g}%.", highlight=False)
        console.print("[bold green]exact[/]" if self.passed else "[bold red]NOT exact[/]")

    def write(self, path: Path) -> None:
        """Write the JSON form to `path`, its folder made if missing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1), encoding="utf-8")

    def _seen(self, test: Any) -> float:
        return float(test.detectable(self.config.alarm / self.config.tests, self.config.power))


def same_bits(
    target: Target, drafter: Drafter[Any], prompts: Mapping[str, Sequence[int]], settings: Settings, dtype: str
) -> Sameness:
    """Continue each of the named `prompts` greedily with `drafter` and without, and compare tokens and logits bit by bit."""
    tokens = logits = 0
    difference = ""
    settings = replace(settings, keep_logits=True)
    for name, prompt in prompts.items():
        (plain,), (drafted,) = (decode(target, one, [prompt], settings) for one in (Silent(), drafter))
        assert plain.logits is not None and drafted.logits is not None
        tokens += plain.tokens == drafted.tokens
        if plain.tokens == drafted.tokens and torch.equal(plain.logits, drafted.logits):
            logits += 1
        else:
            difference = difference or f"{name}: {_difference(plain, drafted)}"
    return Sameness(dtype, len(prompts), tokens, logits, difference)


def exactness(
    models: Sequence[Model],
    drafter: DrafterConfig,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    config: ExactnessConfig,
    judge: VerificationConfig = TokenVerificationConfig(),
    *,
    greedy_prompts: int = 16,
    new_tokens: int = 64,
) -> Certificate:
    """Certify `drafter` on a model given in one or more dtypes: laws on the first, bits on each.

    Trees whose drafter has levels (`branching`) are tested at full strength to their first level, and at a tenth of the draws as
    they are. Raises ValueError for a model without a tokenizer, or a drafter that does not fit it.
    """
    first = models[0]
    if first.tokenizer is None:
        raise ValueError("model: has no tokenizer to read prompts with; load it with its tokenizer.json")
    ids = {prompt.name: first.tokenizer.encode(prompt.prompt) for prompt in prompts}
    contexts = liveliest(first.network, {name: row[-_LAST:] for name, row in ids.items()}, sampling, config.contexts)
    if judge.kind != TokenVerificationConfig.kind:  # whether a first token is kept then depends on the second
        config = config.model_copy(update={"follow": 0})
    laws = {}
    for trees, stage, plan in _stages(drafter, config, first.network.vocab):
        built = stage.build(first.network, companion(first))
        laws[trees] = certify(first.network, built, list(contexts.values()), sampling, plan, judge.build())
    some = dict(list(ids.items())[:greedy_prompts])
    greedy = []
    for model in models:
        dtype = str(model.dtype).removeprefix("torch.")
        built, settings = drafter.build(model.network, companion(model)), Settings(new_tokens, verify=judge.build())
        greedy.append(same_bits(model.network, built, some, settings, dtype))
    setting = {
        "parameters": first.size,
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
        "drafter": drafter.model_dump(mode="json"),
        "verification": judge.model_dump(mode="json"),
        "sampling": sampling.model_dump(mode="json"),
        "threads": torch.get_num_threads(),
        "new_tokens": new_tokens,
        "torch": torch.__version__,
    }
    return Certificate(setting, config, tuple(contexts), laws, tuple(greedy))


def exactness_model(
    models: Sequence[Model],
    source: str,
    drafter: str,
    asked: Mapping[str, Mapping[str, object]],
    prompts: Path | None = None,
    *,
    count: int = 16,
    new_tokens: int = 64,
    console: Console | None = None,
) -> Certificate:
    """`exactness` as a command: prompts from a file or, without one, those of the model `source`, and the result printed.

    `asked`: fields by section, "drafting", "judging" (a verification and its fields), "sampling" and "promise". Raises ValueError
    for a bad field, and as `exactness` does.
    """
    console = console or Console()
    sampling = parse(SamplingConfig, asked["sampling"])
    config = parse(ExactnessConfig, asked["promise"], "test")
    judge = cast(VerificationConfig, resolve(asked["judging"], VERIFICATIONS, "verification"))
    chosen = drafter_config(models[0], drafter, asked["drafting"])
    held_out = read_prompts(prompts) if prompts else prompts_for(source, models[0], 2 * count)
    with console.status("drawing"):
        found = exactness(
            models, chosen, held_out[: 2 * count], sampling, config, judge, greedy_prompts=count, new_tokens=new_tokens
        )
    found.show(console)
    return found


def _stages(drafter: DrafterConfig, config: ExactnessConfig, vocab: int) -> Iterator[tuple[str, DrafterConfig, ExactnessConfig]]:
    """The trees to draw: by what they are called, which drafter makes them, and how many."""
    values = drafter.model_dump()
    drawn = values.get("mode") == "drawn" and "branching" in values
    if not drawn or len(values["branching"]) == 1:
        yield "whole", drafter, config
        return
    shape = tuple(values["branching"][:1]) or (1,)
    yield "first level", parse(type(drafter), {**values, "branching": shape}, "drafter"), config.model_copy(update={"follow": 0})
    total = config.planned(vocab) * config.contexts
    yield "whole", drafter, config.model_copy(update={"draws": -(-total // _DEEPER)})


def _tests(laws: Laws) -> list[tuple[str, Any]]:
    return [("first", laws.first), *([("second", laws.second)] if laws.second.freedom else [])]


def _difference(plain: Completion, drafted: Completion) -> str:
    assert plain.logits is not None and drafted.logits is not None
    for place, (one, other) in enumerate(zip(plain.tokens, drafted.tokens, strict=False)):
        if one != other:
            gap = float((plain.logits[place] - drafted.logits[place]).abs().max())
            return f"token {place} is {one}, drafted {other} (logits differ by up to {gap:.2g})"
        if not torch.equal(plain.logits[place], drafted.logits[place]):
            gap = float((plain.logits[place] - drafted.logits[place]).abs().max())
            return f"logits of token {place} differ by up to {gap:.2g}"
    return f"{len(plain.tokens)} tokens, drafted {len(drafted.tokens)}"
