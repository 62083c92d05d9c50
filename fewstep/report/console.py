"""Generation on a terminal: text as it is made, each token coloured by how it was obtained, and what it cost.

This file knows no technique. It prints; measuring and pages are its neighbours' work.
"""

from collections.abc import Mapping
from types import MappingProxyType

from rich.console import Console
from rich.text import Text

from fewstep.core.event import Cost
from fewstep.core.recipe import parse
from fewstep.decode.narrate import Piece
from fewstep.decode.text import Generation, GenerationConfig
from fewstep.hub.heads import companion
from fewstep.models.model import Model
from fewstep.report.tuned import choose

DRAFTED, COMPUTED = "green", "default"


_PICTURES = MappingProxyType({code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421})


def visible(text: str) -> str:
    """`text` with control characters as their pictures, since what a model writes must not steer a terminal."""
    return text.translate(_PICTURES | dict.fromkeys(range(128, 160), 65533))


def styled(piece: Piece, stats: bool) -> Text:
    """The text of a piece, coloured if it was drafted and accepted; control characters are shown, not sent."""
    return Text(visible(piece.text), style=DRAFTED if stats and piece.drafted else COMPUTED)


def cost_line(cost: Cost) -> str:
    """One line that says what a generation cost."""
    return (
        f"{cost.tokens} tokens in {cost.calls} calls ({cost.tokens_per_call:.2f} tokens per call), "
        f"{cost.draft_calls} draft calls, {cost.seconds:.2f} s ({cost.tokens / max(cost.seconds, 1e-9):.0f} tokens/s)"
    )


def print_generation(
    model: Model, prompt: str, drafter: str, drafting: Mapping[str, object], options: Mapping[str, object], *, stats: bool
) -> None:
    """Stream the continuation of `prompt` to standard output; with `stats`, colours there, drafter and cost on standard error.

    A lossy verification is named on standard error, asked for `stats` or not.

    Raises ValueError for a bad option, an unknown drafter, or a prompt that does not fit.
    """
    config = parse(GenerationConfig, options)
    chosen = choose(model, drafter, config.samples, config, companion(model), drafting)
    generation = Generation(model, prompt, chosen.drafter, config)
    out = Console(highlight=False, soft_wrap=True)
    if config.samples == 1:
        for piece in generation:
            if out.is_terminal:
                out.print(styled(piece, stats), end="")
            else:  # a file or a pipe gets the text as it is
                out.file.write(piece.text)
        out.print()
    else:
        for _ in generation:
            pass
        for i, row in enumerate(generation.completions()):
            out.print(f"[{i}]", row.text, markup=False)
    err = Console(stderr=True, highlight=False)
    if not config.judged.lossless:
        err.print(f"verification: {config.judged.label}: the text does not have the model's law")
    if stats:
        err.print(f"drafter: {chosen.why}", markup=False)
        err.print(Text("drafted and accepted", style=DRAFTED), Text("computed", style=COMPUTED), sep=" | ")
        err.print(cost_line(generation.cost))
