"""The command line. Commands import what they need when they run, so that `--help` answers at once."""

import gc
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
def systems(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    matrix: Annotated[bool, typer.Option("--matrix", help="Which position encoding goes with which mixer, and why not.")] = False,
    out: Annotated[Path, typer.Option(help="The JSON file that --matrix writes.")] = Path("runs/matrix.json"),
) -> None:
    """List the techniques: name, year, paper, file, recipe, last measured claim."""
    if matrix:
        from fewstep.report.matrix import encoding_matrix, text, write

        cells = encoding_matrix()
        write(cells, out)
        typer.echo(json.dumps(cells, indent=2) if as_json else f"{text(cells)}\n{out}")
        return
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
    verification: Annotated[str, typer.Option(help="token, block (chains only) or typical (lossy).")] = "token",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to emit at most.")] = 64,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    set_: Set = None,
    stats: Annotated[bool, typer.Option("--stats", help="Colour each token by how it was obtained, and print the cost.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Threads = 0,
) -> None:
    """Continue a prompt. --set takes drafter.FIELD, verification.FIELD and sampling fields, e.g. --set drafter.depth=4."""
    from fewstep.hub.load import load
    from fewstep.report.console import print_generation

    _use(threads)
    fields = _fields(set_)
    drafting, judging = _within("drafter", fields), {"kind": verification, **_within("verification", fields)}
    asked = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed, "verification": judging, **fields}
    text = sys.stdin.read() if prompt == "-" else prompt
    print_generation(load(model, device=device, dtype=dtype), text, drafter, drafting, asked, stats=stats)


@app.command()
def fill(
    model: ModelName,
    text: Annotated[
        list[str], typer.Argument(help="Texts with gaps: <gap:8> of 8 tokens, <gap> of --length; none: one at the end.")
    ],
    length: Annotated[int, typer.Option(help="Tokens of a gap that names no number.")] = 32,
    order: Annotated[str, typer.Option(help="Which gaps first: auto, or a name of `fewstep systems`, e.g. threshold.")] = "auto",
    temperature: Annotated[float, typer.Option(help="0: the most probable token.")] = 0.0,
    steps: Annotated[int | None, typer.Option(help="Steps for each block; default: one a position.")] = None,
    block: Annotated[int | None, typer.Option(help="Positions filled together; default: as the model attends.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    set_: Set = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print what each text cost.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Threads = 0,
) -> None:
    """Fill gaps in any order with a masked or block diffusion model. --set takes order.FIELD, guidance, attends, ..."""
    from fewstep.hub.load import load
    from fewstep.report.filled import print_filling

    _use(threads)
    fields = _fields(set_)
    ordering = {"kind": order, "temperature": temperature, **_within("order", fields)}
    asked = {"steps": steps, "block": block, "seed": seed, **fields}
    texts = [sys.stdin.read() if each == "-" else each for each in text]
    print_filling(load(model, device=device, dtype=dtype), texts, length, ordering, asked, stats=stats)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model or run folder of arrays: a denoiser or a flow.")],
    count: Annotated[int, typer.Option("--count", "-n", help="Samples to make.")] = 64,
    solver: Annotated[str | None, typer.Option(help="A name of `fewstep systems`; default: what suits the model.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the grid; default: 18, or 1 for models made for one call.")] = None,
    label: Annotated[list[int] | None, typer.Option(help="The class of all samples; repeated: of each.")] = None,
    guidance: Annotated[float, typer.Option(help="How much more a class counts; 1: as it was learnt.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same samples.")] = 0,
    set_: Set = None,
    out: Annotated[Path, typer.Option(help="The folder for samples.safetensors, samples.json and the pictures.")] = Path(
        "runs/sample"
    ),
    animation: Annotated[str, typer.Option(help="How the way from noise to data is written: gif or webp.")] = "gif",
    threads: Threads = 0,
) -> None:
    """Sample images or points. --set takes grid, process and the other fields, e.g. --set process=vp, --set grid.rho=5."""
    from fewstep.report.sampled import sample_here

    _use(threads)
    fields = _fields(set_)
    kinds = {"solver": solver, "grid": fields.pop("grid", "karras"), "process": fields.pop("process", None)}
    parts = {name: {"kind": kind, **_within(name, fields)} for name, kind in kinds.items() if kind}
    asked = {"count": count, "label": tuple(label or ()), "guidance": guidance, "seed": seed, **parts, **fields}
    sample_here(model, asked if steps is None else {**asked, "steps": steps}, out, animation=animation)


@app.command()
def exactness(
    model: ModelName,
    drafter: Annotated[str, typer.Option(help="auto, a name of `fewstep systems`, or NAME=PATH.")] = "auto",
    verification: Annotated[str, typer.Option(help="token, block (chains only) or typical (lossy, so it fails).")] = "token",
    temperature: Annotated[float, typer.Option(help="Of the sampled tests; above 0.")] = 1.0,
    prompts: Annotated[Path | None, typer.Option(help="JSONL with a field `prompt`; default: held-out ones.")] = None,
    count: Annotated[int, typer.Option(help="Prompts continued greedily; contexts are picked among twice as many.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of every greedy continuation.")] = 64,
    set_: Set = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated; default: bfloat16 and float32.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("runs/exactness.json"),
    threads: Threads = 0,
) -> None:
    """Certify that a drafter leaves a model's output as it is: sampled laws and greedy bits. Exit code 1 if it does not."""
    from fewstep.hub.load import load
    from fewstep.report.certificate import exactness_model

    _use(threads)
    fields = _fields(set_)
    drafting, judging = _within("drafter", fields), {"kind": verification, **_within("verification", fields)}
    promise, sampling = _within("test", fields), {"temperature": temperature, **fields}
    models = [load(model, device=device, dtype=one) for one in dtype or ("bfloat16", "float32")]
    asked = {"drafting": drafting, "judging": judging, "sampling": sampling, "promise": promise}
    certificate = exactness_model(models, model, drafter, asked, prompts, count=count, new_tokens=max_new_tokens)
    certificate.write(out)
    typer.echo(str(out))
    if not certificate.passed:
        raise typer.Exit(1)


@app.command()
def tune(
    model: ModelName,
    drafter: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated. Default: all it can run with.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy; what is found serves any temperature above 0.")] = 0.0,
    batch: Annotated[int, typer.Option(help="Prompts decoded together.")] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes of a drafted tree, its root included, at most.")] = 16,
    prompts: Annotated[Path | None, typer.Option(help="JSONL with a field `prompt`; default: held-out ones.")] = None,
    set_: Set = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = 0,
) -> None:
    """Measure this machine and choose draft length and tree, or silence; `generate` uses it. --set takes drafter.FIELD."""
    from fewstep.hub.load import load
    from fewstep.report.tune import tune_model

    _use(threads)
    fields = _fields(set_)
    drafting = _within("drafter", fields)
    asked = {"temperature": temperature, "batch": batch, "nodes": nodes, **fields}
    for path in tune_model(load(model, device=device, dtype=dtype), model, drafter or (), drafting, asked, prompts):
        typer.echo(str(path))


@app.command()
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, heads for one, or a .pt or .bin file of weights.")],
    to: Annotated[
        str,
        typer.Option(
            help="The layout to write: hf, fewstep, safetensors, medusa, medusa-vllm, eagle, eagle3, speculators, mtp, mtp-qwen."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    target: Annotated[str | None, typer.Option(help="The model that heads serve; default: the one they name.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
) -> None:
    """Write a model, or heads for one, in another layout."""
    from fewstep.hub.convert import convert as run

    run(model, to, out, target=target, dtype=dtype)
    typer.echo(str(out))


@app.command()
def corpus(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="The folder to write; draft from it with --drafter retrieval=FOLDER.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILES", help="Texts, JSONL, Parquet or folders; none: the standard library, if it trained the model."
        ),
    ] = None,
    pattern: Annotated[str, typer.Option(help="The files to take in folders.")] = "**/*.txt",
) -> None:
    """Write texts as a corpus that the retrieval drafter looks in, in the model's tokens."""
    from fewstep.hub.load import load
    from fewstep.recipes.corpus import write_texts

    write_texts(load(model, packed=False), files or (), out, pattern=pattern)
    typer.echo(str(out))


@race_app.command("decode")
def race_decode(
    model: ModelName,
    prompts: Annotated[Path | None, typer.Option(help="JSONL with a field `prompt`; default: held-out ones.")] = None,
    drafter: Annotated[list[str] | None, typer.Option(help="Only these drafters; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to emit at most.")] = 64,
    verification: Annotated[str, typer.Option(help="Run each drafter judged this way too: block or typical (lossy).")] = "token",
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
    from fewstep.core.recipe import parse
    from fewstep.hub.load import load
    from fewstep.report.contest import RaceConfig
    from fewstep.report.race import race_decode_model

    _use(threads)
    asked = {"drafters": tuple(drafter or ()), "max_new_tokens": max_new_tokens, "verification": verification}
    equal = {"temperature": temperature, "rounds": rounds, "count": count, "batch": batch, "peers": peers}
    config = parse(RaceConfig, {**asked, **equal})
    race_decode_model(load(model, dtype=dtype), config, out, prompts, source=model)


@race_app.command("mixers")
def race_mixers(
    mixer: Annotated[list[str] | None, typer.Option(help="Only these mixers; may be repeated.")] = None,
    length: Annotated[int, typer.Option(help="The longest sequence; lengths double from 128 up to it.")] = 4096,
    width: Annotated[int, typer.Option(help="Channels of a layer.")] = 256,
    heads: Annotated[int, typer.Option(help="Heads of a layer.")] = 4,
    rounds: Annotated[int, typer.Option(help="Turns that everybody has; the order alternates.")] = 3,
    limit: Annotated[float, typer.Option(help="Seconds for one mixer, work and length; what takes longer is left out.")] = 20.0,
    quality: Annotated[bool, typer.Option(help="Train small decoders on recall tasks, too.")] = True,
    steps: Annotated[int, typer.Option(help="Steps of each training.")] = 200,
    seed: Annotated[int, typer.Option(help="Of weights, activations and texts.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder for race.json and the page.")] = Path("runs/race-mixers"),
    threads: Threads = 0,
) -> None:
    """Race the sequence mixers: seconds and bytes against length beside PyTorch's softmax attention, and what they recall."""
    from fewstep.core.recipe import parse
    from fewstep.report.mixers import MixerRaceConfig, race_mixers_here

    _use(threads)
    equal = {"mixers": tuple(mixer or ()), "length": length, "width": width, "heads": heads, "rounds": rounds, "limit": limit}
    race_mixers_here(parse(MixerRaceConfig, {**equal, "quality": quality, "steps": steps, "seed": seed}), out)


@race_app.command("images")
def race_images(
    method: Annotated[list[str] | None, typer.Option(help="Only these methods, e.g. edm-heun; may be repeated.")] = None,
    ground: Annotated[list[str] | None, typer.Option(help="Only these data: ring, moons, checkerboard, digits.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the training and fewer samples: 15 minutes.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, data and samples.")] = 0,
    set_: Set = None,
    out: Annotated[Path, typer.Option(help="The folder for race.json, the page, networks and pictures.")] = Path(
        "runs/race-images"
    ),
) -> None:
    """Race models of points and images: likelihood, distance from data, calls and seconds. --set takes minutes, seeds, ..."""
    from fewstep.core.recipe import parse
    from fewstep.report.images_race import QUICK, ImageRaceConfig, race_images_here

    asked = {"methods": tuple(method or ()), "grounds": tuple(ground or ()), "seed": seed}
    race_images_here(parse(ImageRaceConfig, {**asked, **(QUICK if quick else {}), **_fields(set_)}), out)


@race_app.command("text")
def race_text(
    method: Annotated[list[str] | None, typer.Option(help="Only these methods, e.g. block-4; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the training, fewer texts and fewer ways to write.")] = False,
    judge: Annotated[str, typer.Option(help="The autoregressive model that judges what was written.")] = "code-nano",
    seed: Annotated[int, typer.Option(help="Of weights, batches and texts.")] = 0,
    set_: Set = None,
    out: Annotated[Path, typer.Option(help="The folder for race.json, the page and the networks.")] = Path("runs/race-text"),
    threads: Threads = 0,
) -> None:
    """Race models of text after equal training: bits, quality, calls and seconds. --set takes tokens, seconds, width, ..."""
    from fewstep.core.recipe import parse
    from fewstep.report.text_methods import TextRaceConfig
    from fewstep.report.text_race import QUICK, race_text_here

    _use(threads)
    asked = {"methods": tuple(method or ()), "judge": judge, "seed": seed}
    race_text_here(parse(TextRaceConfig, {**asked, **(QUICK if quick else {}), **_fields(set_)}), out)


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


def _within(section: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The SECTION.FIELD among `fields` by field, taken out of them."""
    found = [key for key in fields if key.startswith(f"{section}.")]
    return {key.removeprefix(f"{section}."): fields.pop(key) for key in found}


def _use(threads: int) -> None:
    import torch

    if threads < 0:
        raise ValueError(f"threads={threads}: below 0; give 0 for PyTorch's own choice")
    if threads:
        torch.set_num_threads(threads)
    gc.freeze()  # what was imported stays: looking it through again and again costs decoding some 4%


if __name__ == "__main__":
    main()
