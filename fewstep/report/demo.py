"""The demonstration: held-out code completed twice, plain and speculative; what was saved, the proof that nothing was lost, and
a short race with its page.

Run as `python -m fewstep.report.demo`. This file only shows; what it shows is measured by its neighbours.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fewstep.core.draft import Drafter
from fewstep.core.event import Cost
from fewstep.decode.generate import Completion
from fewstep.decode.text import Generation, GenerationConfig, pick_drafter
from fewstep.hub.heads import companion
from fewstep.hub.load import load
from fewstep.models.model import Model
from fewstep.report.console import COMPUTED, DRAFTED, styled
from fewstep.report.contest import RaceConfig
from fewstep.report.prompts import Prompt, prompts_for
from fewstep.report.race import PAGE, race_decode

_SHOWN, _TOKENS = 3, 64
_RACE = RaceConfig(count=6, max_new_tokens=48, rounds=2, peers=False)
_CONTEXT = 6  # lines of the prompt that are shown


def demonstrate(
    model: Model, prompts: Sequence[Prompt], directory: Path, name: str, console: Console, race: RaceConfig = _RACE
) -> bool:
    """Show everything, and whether every text came out identical. Writes the race into `directory`."""
    identical = completions(model, prompts[:_SHOWN], console)
    console.print(f"\nA short race over {min(race.count, len(prompts))} prompts ...")
    console.print(race_decode(model, prompts, race, directory, name=name, console=console).table())
    console.print(f"The charts: {(directory / PAGE).resolve()}", soft_wrap=True, highlight=False)
    return identical


def completions(model: Model, prompts: Sequence[Prompt], console: Console) -> bool:
    """Complete `prompts` side by side and say what it took; whether all texts came out identical."""
    drafters = {"plain": "silent", "speculative": "auto"}
    built = {title: pick_drafter(model, name, companion(model)) for title, name in drafters.items()}
    config = GenerationConfig(max_new_tokens=_TOKENS, ignore_eos=True)
    for drafter in built.values():  # warm up
        list(Generation(model, prompts[0].prompt, drafter, GenerationConfig(max_new_tokens=8)))
    if console.is_terminal:
        console.print(Text("drafted and accepted", style=DRAFTED), Text("computed", style=COMPUTED), sep=" | ")
    totals = dict.fromkeys(drafters, Cost())
    identical = True
    for prompt in prompts:
        rows = {title: _complete(model, prompt, drafter, config) for title, drafter in built.items()}
        _show(prompt, rows, console)
        identical &= _prove([done for _, done in rows.values()], console)
        totals = {title: totals[title] + done.cost for title, (_, done) in rows.items()}
    console.print(_savings(totals), highlight=False)
    return identical


def _complete(model: Model, prompt: Prompt, drafter: Drafter[Any], config: GenerationConfig) -> tuple[Text, Completion]:
    generation = Generation(model, prompt.prompt, drafter, config)
    text = Text()
    for piece in generation:
        text.append_text(styled(piece, stats=True))
    return text, generation.completions()[0]


def _show(prompt: Prompt, rows: dict[str, tuple[Text, Completion]], console: Console) -> None:
    table = Table(title=f"\n{prompt.name}", title_justify="left", expand=True)
    context = "".join(prompt.prompt.splitlines(keepends=True)[-_CONTEXT:])
    for title, (_, done) in rows.items():
        table.add_column(f"{title}: {done.cost.calls} calls, {done.cost.seconds:.2f} s", ratio=1, overflow="fold")
    table.add_row(*(Text.assemble((context, "dim"), text) for text, _ in rows.values()))
    console.print(table)


def _prove(rows: Sequence[Completion], console: Console) -> bool:
    """Compare token by token and by digest, and say so."""
    first, second = (row.tokens for row in rows)
    digests = [hashlib.sha256(json.dumps(row.tokens).encode()).hexdigest()[:16] for row in rows]
    same = sum(mine == theirs for mine, theirs in zip(first, second, strict=False))
    identical = first == second
    verdict = Text("identical", style="bold green") if identical else Text("NOT identical", style="bold red")
    console.print(verdict, f"{same} of {len(first)} tokens equal, sha256 {digests[0]} and {digests[1]}", highlight=False)
    return identical


def _savings(totals: dict[str, Cost]) -> str:
    plain, drafted = totals.values()
    calls = f"{plain.calls} calls plain, {drafted.calls} speculative ({1 - drafted.calls / plain.calls:.0%} saved)"
    seconds = f"{plain.seconds:.2f} s and {drafted.seconds:.2f} s ({plain.seconds / drafted.seconds:.2f}x as fast)"
    return f"\n{drafted.tokens} tokens: {calls}, {drafted.tokens_per_call:.2f} tokens per call; {seconds}"


def main(
    model: Annotated[str, typer.Argument(help="A shipped name, a model or run folder, or a hub id.")] = "code-nano",
    out: Annotated[Path, typer.Option(help="The folder for race.json and the page.")] = Path("runs/demo"),
) -> None:
    """Complete held-out code plain and speculatively, and race the drafters."""
    console = Console()
    loaded = load(model)
    console.print(f"{model}: {loaded.size / 1e6:.1f} M parameters, float32, {torch.get_num_threads()} threads", highlight=False)
    if not demonstrate(loaded, prompts_for(model, loaded), out, Path(model).name, console):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
