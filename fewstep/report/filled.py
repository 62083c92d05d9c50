"""Filled gaps on a terminal: text as it becomes certain, what stood in a gap in colour, and what it cost.

This file prints; it knows no technique and no text.
"""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from fewstep.core.recipe import parse
from fewstep.decode.filling import FillConfig, Filling, gapped, manner_of
from fewstep.diffusion.corruptions import absorber
from fewstep.models.model import Model
from fewstep.report.console import visible

FILLED = "green"


def print_filling(
    model: Model, texts: Sequence[str], length: int, order: Mapping[str, object], options: Mapping[str, object], *, stats: bool
) -> None:
    """Print `texts` with their gaps filled; with `stats`, the cost of each, and what else bears on it, on standard error.

    `order`: its kind and fields; "auto" is confidence, or analytic where nothing is masked. One text is streamed block by block,
    several are printed when all are done. Raises ValueError for a bad option, or a text that does not fit.
    """
    manner = manner_of(model)
    if order.get("kind") == "auto":
        order = {**order, "kind": "analytic" if absorber(manner.corruption) is None else "confidence"}
    config = parse(FillConfig, {**options, "order": order})
    filling = Filling(model, [gapped(model, text, length) for text in texts], config)
    out = Console(highlight=False, soft_wrap=True)
    for patch in filling:
        if len(texts) > 1:
            continue
        if out.is_terminal:
            out.print(Text(visible(patch.text), style=FILLED if patch.filled else "default"), end="")
        else:  # a file or a pipe gets the text as it is
            out.file.write(patch.text)
    results = filling.results()
    for i, result in enumerate(results if len(texts) > 1 else ()):
        out.print(f"[{i}]", visible(result.text), markup=False)
    if len(texts) == 1:
        out.print()
    err = Console(stderr=True, highlight=False)
    for i, result in enumerate(results if stats else ()):
        cost = result.cost
        told = f"{cost.tokens} tokens in {cost.calls} calls ({cost.tokens_per_call:.2f} tokens per call), {cost.seconds:.2f} s"
        err.print(f"[{i}] {told}, ended by {result.finish}", markup=False)
    if stats and filling.deviation is not None:
        err.print(f"cache {config.cached}: laws {filling.deviation:.3g} from exact ones in total variation")
