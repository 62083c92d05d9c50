"""The table of techniques, read from the registries and nothing else, with the last measured claim of each."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.table import Table

from fewstep.core.recipe import Config
from fewstep.decode.drafters import DRAFTERS
from fewstep.decode.verification import VERIFICATIONS
from fewstep.diffusion.corruptions import CORRUPTIONS
from fewstep.diffusion.grids import GRIDS
from fewstep.diffusion.orders import ORDERS
from fewstep.diffusion.parameterisations import PARAMETERISATIONS
from fewstep.diffusion.processes import PROCESSES
from fewstep.diffusion.solvers import SOLVERS
from fewstep.nn.backbones import BACKBONES
from fewstep.nn.bijections import BIJECTIONS
from fewstep.nn.heads import HEADS
from fewstep.nn.mixers import MIXERS
from fewstep.nn.position import POSITIONS
from fewstep.recipes import SECTIONS, shipped

ROOMS: Mapping[str, Mapping[str, type[Config]]] = MappingProxyType(
    {
        "drafter": DRAFTERS,
        "verification": VERIFICATIONS,
        "heads": HEADS,
        "mixer": MIXERS,
        "position": POSITIONS,
        "process": PROCESSES,
        "parameterisation": PARAMETERISATIONS,
        "grid": GRIDS,
        "solver": SOLVERS,
        "bijection": BIJECTIONS,
        "backbone": BACKBONES,
        "corruption": CORRUPTIONS,
        "order": ORDERS,
        **{section: SECTIONS[section] for section in ("objective", "optim", "precision", "schedule")},
    }
)

UNDOCUMENTED = ("optim", "precision", "schedule")
DOCUMENTED = tuple(room for room in ROOMS if room not in UNDOCUMENTED)
_ROOT = Path(__file__).parents[1]
_YEAR = re.compile(r"\b(19|20)\d\d\b(?!\.)")
_ARXIV = re.compile(r"\b(\d\d)(\d\d)\.\d{4,5}\b")


def systems_table() -> list[dict[str, str]]:
    """One row per registered technique: room, name, year, paper, file, recipes that use it, last measured claim."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in shipped().items()}
    measured = _measured()
    rows = []
    for room, registry in ROOMS.items():
        for name, config in registry.items():
            uses = [recipe for recipe, text in texts.items() if f'kind = "{name}"' in text]
            claims = [f"{claim}: {measured.get(claim, 'not measured')}" for claim in config.claims]
            rows.append(
                {
                    "room": room,
                    "name": name,
                    "year": _year(config.source),
                    "paper": config.source,
                    "file": _file(config),
                    "recipe": ", ".join(uses),
                    "claim": "; ".join(claims),
                }
            )
    return rows


def show(rows: Sequence[Mapping[str, str]]) -> None:
    """Print the table."""
    table = Table(*rows[0], header_style="bold", show_lines=False)
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


def markdown(rows: Sequence[Mapping[str, str]], rooms: Sequence[str] = DOCUMENTED) -> str:
    """The table of `docs/techniques.md`: the techniques of some `rooms`, where they come from and where they are."""
    lines = [f"| {row['room']} | {row['name']} | {row['paper']} | `{row['file']}` |" for row in rows if row["room"] in rooms]
    return "\n".join(["| room | name | paper | file |", "|---|---|---|---|", *lines])


def names(rows: Sequence[Mapping[str, str]], rooms: Sequence[str] = DOCUMENTED) -> str:
    """The README's short form of it: the names of each room."""
    listed = {room: ", ".join(f"`{row['name']}`" for row in rows if row["room"] == room) for room in rooms}
    return "\n".join(["| room | names |", "|---|---|", *(f"| {room} | {text} |" for room, text in listed.items())])


def _year(source: str) -> str:
    if year := _YEAR.search(source):
        return year.group()
    return f"20{found.group(1)}" if (found := _ARXIV.search(source)) else ""


def _file(config: type[Config]) -> str:
    path = inspect.getsourcefile(config)
    return Path(path).relative_to(_ROOT.parent).as_posix() if path else ""


def _measured() -> dict[str, str]:
    """The verdict that ships with the package, by claim."""
    folder = files("fewstep.report") / "measured"
    if not folder.is_dir():
        return {}
    reports = (json.loads(file.read_text(encoding="utf-8")) for file in folder.iterdir() if file.name.endswith(".json"))
    return {report["name"]: report["summary"] for report in reports}
