"""Held-out prompts: what races, reproductions and the demo continue.

They are read from the `prompts.jsonl` beside a model, or cut from the documents its recipe holds out. This file knows corpora
and tokenizers; it knows no network.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import cast, final

import torch

from fewstep.core.random import CounterRng
from fewstep.core.recipe import resolve
from fewstep.hub.load import shipped
from fewstep.models.model import Model
from fewstep.text.tokenizer import Tokenizer
from fewstep.training.data import DATA
from fewstep.training.data.grouping import Document
from fewstep.training.data.sources import PARTS, Corpus, DataConfig

PROMPTS, FILES = "prompts.jsonl", "files.json"

_SHORTEST, _LONGEST, _REFERENCE = 100, 160, 128  # tokens


@final
@dataclass(frozen=True, slots=True)
class Prompt:
    """A piece of a held-out document, its place `name` ("json/decoder.py:120"), and the `reference` text that follows."""

    name: str
    prompt: str
    reference: str


def prompts_for(source: Path | str, model: Model, count: int = 200, seed: int = 0) -> list[Prompt]:
    """`count` prompts for the model that `source` (a directory or a shipped name) was loaded as `model` from.

    Those beside it if there are any, else cut from what its recipe holds out. Raises ValueError if neither is to be had.
    """
    beside = shipped().get(str(source), Path(source)) / PROMPTS
    if beside.is_file():
        return read_prompts(beside)[:count]
    if "data" not in model.recipe or model.tokenizer is None:
        raise ValueError(f"prompts: no {PROMPTS} beside {str(source)!r} and no data in its recipe; give a file of prompts")
    data = cast(DataConfig, resolve(model.recipe["data"], DATA, "data"))
    return held_out_prompts(data.build(), model.tokenizer, count, seed)


def read_prompts(path: Path | str) -> list[Prompt]:
    """The prompts of a JSON-lines file with the fields of `Prompt`. Raises ValueError for a missing or malformed file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompts={str(path)!r}: no such file; give a .jsonl with one object per line")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompts.append(Prompt(*(str(record[field.name]) for field in fields(Prompt))))
        except (ValueError, KeyError, TypeError):
            wanted = ", ".join(field.name for field in fields(Prompt))
            raise ValueError(f"prompts='{path}:{number}': not a JSON object with {wanted}; correct that line") from None
    if not prompts:
        raise ValueError(f"prompts={str(path)!r}: empty; give at least one prompt")
    return prompts


def write_prompts(path: Path | str, prompts: Sequence[Prompt]) -> None:
    """Write `prompts` as `read_prompts` reads them."""
    Path(path).write_text("".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts), encoding="utf-8")


def write_held_out(directory: Path | str, data: DataConfig, tokenizer: Tokenizer, count: int = 200, seed: int = 0) -> None:
    """Write `prompts.jsonl`, and `files.json`: the sha256 of every training and held-out document of `data`."""
    corpus = data.build()
    write_prompts(Path(directory) / PROMPTS, held_out_prompts(corpus, tokenizer, count, seed))
    record = {"python": platform.python_version(), "data": data.model_dump(mode="json")}
    hashes = {part: corpus.hashes(part) for part in PARTS}
    (Path(directory) / FILES).write_text(json.dumps({**record, **hashes}, indent=1), encoding="utf-8")


def held_out_prompts(corpus: Corpus, tokenizer: Tokenizer, count: int = 200, seed: int = 0) -> list[Prompt]:
    """`count` prompts (fewer if the text has no more) of about 100 to 160 tokens, that start and end with a line.

    Spread over the held-out documents: each gives one before any gives two. No text is used twice. A pure function of corpus,
    tokenizer and seed. Raises ValueError if no document is long enough.
    """
    rng = CounterRng.seeded([seed]).split("prompts")
    queues = [queue for document in corpus.documents("validation") if (queue := _shuffled(_cut(document, tokenizer, rng), rng))]
    if not queues:
        raise ValueError(f"prompts: no held-out document has {_LONGEST + _REFERENCE} tokens; raise data.held_out or add text")
    queues = [queues[i] for i in rng.uniform(len(queues))[0].argsort().tolist()]
    rounds = range(max(map(len, queues)))
    return [queue[turn] for turn in rounds for queue in queues if turn < len(queue)][:count]


def _cut(document: Document, tokenizer: Tokenizer, rng: CounterRng) -> list[Prompt]:
    """One prompt and reference after the other, from the start of the document to its end."""
    lines = StringIO(document.text).readlines()  # at line feeds only
    # line by line a text may take a few more tokens than as a whole
    ends = torch.tensor([len(ids) for ids in tokenizer.encode_documents(lines)]).cumsum(0)
    wanted = _SHORTEST + (_LONGEST - _SHORTEST) * rng.split(document.name).uniform(len(lines))[0]
    prompts: list[Prompt] = []
    start = 0
    while True:
        before = int(ends[start - 1]) if start else 0
        middle = _line_at(ends, before + float(wanted[start]))
        stop = _line_at(ends, before + float(wanted[start]) + _REFERENCE)
        if stop is None or middle is None:
            return prompts
        if _SHORTEST <= int(ends[middle - 1]) - before <= _LONGEST:
            name = f"{document.name}:{start + 1}"
            prompts.append(Prompt(name, "".join(lines[start:middle]), "".join(lines[middle:stop])))
        start = stop
        if start == len(lines):
            return prompts


def _line_at(ends: torch.Tensor, tokens: float) -> int | None:
    """The number of lines that hold at least `tokens` tokens, None if all do not."""
    lines = int(torch.searchsorted(ends.double(), tokens)) + 1
    return lines if lines <= len(ends) else None


def _shuffled(prompts: list[Prompt], rng: CounterRng) -> list[Prompt]:
    if not prompts:
        return prompts
    order = rng.split(prompts[0].name).uniform(len(prompts))[0].argsort()
    return [prompts[i] for i in order.tolist()]
