"""The command line as users have learned it: a change of any command, option, default or help text shows up here.

After a change that is meant, `python tests/house/test_cli_frozen.py` writes the record anew: review its diff and the changelog.
"""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from fewstep import cli

RECORD = Path(__file__).with_name("cli.txt")


def commands(app: typer.Typer, name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every command by the words that call it, groups after the commands beside them."""
    if app.registered_callback and app.registered_callback.callback:
        yield name, app.registered_callback.callback
    for command in app.registered_commands:
        assert command.callback
        yield f"{name} {command.name or command.callback.__name__}", command.callback
    for group in app.registered_groups:
        yield from commands(group.typer_instance, f"{name} {group.name}")


def parameter(given: inspect.Parameter) -> str:
    """One line: what users type, its type, its default and its help."""
    kind, info = given.annotation.__origin__, given.annotation.__metadata__[0]
    flags = [flag for flag in (info.default, *(info.param_decls or ())) if isinstance(flag, str)]  # typer keeps the first apart
    if not flags:
        option = isinstance(info, typer.models.OptionInfo)
        flags = [f"--{given.name.replace('_', '-')}" if option else info.metavar or given.name.upper()]
    default = "required" if given.default is given.empty else f"default {given.default}"
    return f"    {', '.join(flags)} ({inspect.formatannotation(kind)}, {default}): {info.help or ''}".rstrip()


def described() -> str:
    """The whole command line as text, without the layout that a terminal gives it."""
    blocks = []
    for name, callback in commands(cli.app, "fewstep"):
        lines = [parameter(given) for given in inspect.signature(callback).parameters.values()]
        blocks.append("\n".join([f"{name}: {inspect.getdoc(callback) or ''}".rstrip(), *lines]))
    return "\n\n".join(blocks) + "\n"


def test_the_command_line_is_as_recorded():
    assert described() == RECORD.read_text(encoding="utf-8"), f"if this is meant, run python {Path(__file__).name}"


def test_every_command_and_option_says_what_it_is_for():
    silent = [line.strip() for line in described().splitlines() if line.endswith(":") and line != "fewstep:"]
    assert not silent, "\n".join(["", *silent])


if __name__ == "__main__":
    RECORD.write_text(described(), encoding="utf-8")
