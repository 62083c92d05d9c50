"""The command line. Commands import what they need when they run, so that `--help` answers at once."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Generative models in fewer, cheaper steps."
)
race_app = typer.Typer(no_args_is_help=True, help="Quality against calls and seconds, every technique on the same chart.")
app.add_typer(race_app, name="race")

Set = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a field; may be repeated.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A shipped name, a model or run folder, or a hub id.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: as many as PyTorch takes.")]


def main() -> None:
    """Run the command line; a bad input ends it with one line and exit code 2."""
    try:
        app(standalone_mode=True)
    except ValueError as error:
        typer.echo(f"fewstep: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("fewstep: interrupted", err=True)
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from fewstep import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def systems(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the techniques: name, year, paper, file, recipe, last measured claim."""
    from fewstep.report.systems import show, systems_table

    rows = systems_table()
    typer.echo(json.dumps(rows, indent=2)) if as_json else show(rows)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a .toml or .json file.")],
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; default runs/RECIPE.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run folder.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train what a recipe describes."""
    from fewstep.recipes.run import train as run

    trained = run(recipe, _fields(set_), directory=out, resume=resume, device=device)
    typer.echo(f"{trained.summary.checkpoint}")


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    drafter: Annotated[str, typer.Option(help="auto, a name of `fewstep systems`, or NAME=PATH.")] = "auto",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to emit at most.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    set_: Set = None,
    stats: Annotated[bool, typer.Option("--stats", help="Colour each token by how it was obtained, and print the cost.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Threads = 0,
) -> None:
    """Continue a prompt. --set takes drafter.FIELD and sampling fields, e.g. --set top_p=0.9 --set drafter.branching=[2,1,1]."""
    from fewstep.hub.load import load
    from fewstep.report.console import print_generation

    _use(threads)
    fields = _fields(set_)
    drafting = {key.removeprefix("drafter."): value for key, value in fields.items() if key.startswith("drafter.")}
    sampling = {key: value for key, value in fields.items() if not key.startswith("drafter.")}
    asked = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed, **sampling}
    text = sys.stdin.read() if prompt == "-" else prompt
    print_generation(load(model, device=device, dtype=dtype), text, drafter, drafting, asked, stats=stats)


@app.command()
def convert(
    model: ModelName,
    to: Annotated[str, typer.Option(help="The layout to write: hf or fewstep.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
) -> None:
    """Write a model in another layout."""
    from fewstep.hub.load import load
    from fewstep.hub.save import save_hf

    if to not in ("hf", "fewstep"):
        raise ValueError(f"to={to!r}: not known; choose hf or fewstep")
    loaded = load(model, dtype=dtype or "auto", packed=False)
    save_hf(loaded, out) if to == "hf" else loaded.save(out)
    typer.echo(str(out))


@race_app.command("decode")
def race_decode(
    model: ModelName,
    prompts: Annotated[Path | None, typer.Option(help="JSONL with a field `prompt`; default: held-out ones.")] = None,
    drafter: Annotated[list[str] | None, typer.Option(help="Only these drafters; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to emit at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    rounds: Annotated[int, typer.Option(help="Times each entrant runs; the order alternates.")] = 3,
    count: Annotated[int, typer.Option(help="Prompts to use.")] = 16,
    batch: Annotated[int, typer.Option(help="Prompts decoded together.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    peers: Annotated[bool, typer.Option(help="Run transformers on the same weights too, where it is installed.")] = True,
    out: Annotated[Path, typer.Option(help="The folder for race.json and the page.")] = Path("runs/race-decode"),
    threads: Threads = 0,
) -> None:
    """Race the drafters over held-out prompts: same weights, dtype, threads and prompts, in alternating order."""
    from fewstep.hub.load import load
    from fewstep.report.contest import RaceConfig
    from fewstep.report.race import race_decode_model

    _use(threads)
    config = RaceConfig(
        drafters=tuple(drafter or ()),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        rounds=rounds,
        count=count,
        batch=batch,
        peers=peers,
    )
    race_decode_model(load(model, dtype=dtype), config, out, prompts, source=model)


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(help="A claim; see `fewstep systems`.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Measure every claim.")] = False,
    out: Annotated[Path, typer.Option(help="The folder for the JSON reports.")] = Path("runs/reproduce"),
    set_: Set = None,
) -> None:
    """Measure a paper's claim and print claim, measured value, threshold and verdict."""
    from fewstep.report.reproduce import CLAIMS
    from fewstep.report.reproduce import reproduce as measure

    if every == (name is not None):
        raise ValueError("name: give one claim, or --all for every one")
    for claim in CLAIMS if every else [str(name)]:
        measure(claim, _fields(set_), directory=out)


def _fields(pairs: list[str] | None) -> dict[str, Any]:
    """FIELD=VALUE pairs; a value is JSON where it parses as such, else text."""
    fields: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair!r}: expected FIELD=VALUE, e.g. --set optim.lr=3e-4")
        try:
            fields[key] = json.loads(value)
        except ValueError:
            fields[key] = value
    return fields


def _use(threads: int) -> None:
    import torch

    if threads < 0:
        raise ValueError(f"threads={threads}: below 0; give 0 for PyTorch's own choice")
    if threads:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
