"""The work of `race text`, a piece at a time: train a network and take its bits, or let it write one way and judge that.

A piece is a pure function of its names and the `Setup`. This file knows no folder but the networks'. Who races is in
`text_methods`, who keeps the books in `text_race`.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast, final

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.core.recipe import parse
from fewstep.decode.drafters.mtp import MultiTokenConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.filling import FillConfig, Filling
from fewstep.decode.generate import Transcripts, requests
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.hub.load import load
from fewstep.models.decoder import Decoder
from fewstep.models.model import Model
from fewstep.recipes.run import train
from fewstep.report.likelihood_bound import NatsBound, nats_bound
from fewstep.report.text_methods import METHODS, TRAININGS, Method, TextRaceConfig, recipe_of
from fewstep.text.tokenizer import Tokenizer
from fewstep.training.data.sources import DataConfig
from fewstep.training.objectives.score_entropy import ScoreEntropyConfig

_HELD_OUT = "held-out.json"
_POINTS = 40  # of a learning curve
_GRAMS = (1, 2, 3)
_TOGETHER = 32  # rows of which exact likelihoods are taken at once

History = list[list[Any]]  # of a position: the call after which it held a text, and the text


@final
class Setup:
    """What is equal for everybody: the config, and the `folder` of networks and held-out text."""

    def __init__(self, config: TextRaceConfig, folder: Path, console: Console) -> None:
        self.config, self.folder, self.console = config, folder, console

    @cached_property
    def judge(self) -> Model:
        """The model that reads what was written. Raises ValueError for one that cannot be loaded."""
        return load(self.config.judge)

    def run(self, training: str) -> Path:
        """The run folder of a network."""
        return self.folder / "runs" / training

    def held_out(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Rows of tokens, each from one held-out document, drawn once for everybody. Raises ValueError where there are none."""
        path = self.folder / _HELD_OUT
        if not path.is_file():
            length, wanted = self.config.length, max(self.config.windows, self.config.count)
            texts = [document.text for document in cast(DataConfig, self.config.data).build().documents("validation")]
            documents = tokenizer.encode_documents(texts)
            rows = [ids[i : i + length] for ids in documents for i in range(0, len(ids) - length + 1, length)]
            if not rows:
                raise ValueError(f"length={length}: no held-out document has so many tokens; lower it, or add text")
            order = CounterRng.seeded([self.config.seed]).split("held-out").uniform(len(rows))[0].argsort(stable=True)
            found = [rows[i] for i in order[:wanted].tolist()]
            path.write_text(json.dumps(found), encoding="utf-8")
        return cast(list[list[int]], json.loads(path.read_text(encoding="utf-8")))


@final
@dataclass(slots=True)
class Written:
    """What was written: the new `tokens` of each row, `calls` and what they gave, and what each position of row 0 held when."""

    tokens: list[list[int]] = field(default_factory=list)
    calls: int = 0
    given: int = 0  # tokens that calls gave, not the prompt
    history: list[History] = field(default_factory=list)
    spent: int = 0  # calls of row 0


def learn(setup: Setup, training: str) -> dict[str, Any]:
    """Train the network and take its bits. A run that was cut short goes on."""
    directory = setup.run(training)
    trained = train(recipe_of(setup.config, training), directory=directory, resume=directory.is_dir(), console=setup.console)
    if trained.summary.interrupted:
        raise KeyboardInterrupt
    model, used = cast(Model, trained.model), trained.summary.used
    begun = time.perf_counter()
    tokenizer = cast(Tokenizer, model.tokenizer)
    rows = setup.held_out(tokenizer)[: setup.config.windows]
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)
    return {
        "training": training,
        "steps": used.steps,
        "tokens": used.tokens,
        "seconds": used.seconds,
        "parameters": model.size,
        "bits": bits(setup.config, training, model.network, rows, size),
        "bits_seconds": time.perf_counter() - begun,
        "curve": _curve(directory / "log.jsonl", size / sum(len(row) - 1 for row in rows)),
    }


def bits(config: TextRaceConfig, training: str, network: Decoder, rows: Sequence[Sequence[int]], size: int) -> dict[str, Any]:
    """Bits per byte of `rows`, which spell `size` bytes, each but for its first token, which is given.

    `error`: of the Monte Carlo estimate; `spread`: of the mean over rows, which is the same rows for everybody.
    """
    row, tokens = TRAININGS[training], torch.tensor(rows)
    scored = torch.ones_like(tokens, dtype=torch.bool)
    scored[:, 0] = False
    batch = Batch(tokens, None, {"scored": scored})
    if row.family == "ar":
        found = exact(network, batch)
    elif row.family == "score":
        found = scored_bound(network, batch, parse(ScoreEntropyConfig, row.objective), config.draws, config.repeats, config.seed)
    else:
        block = row.objective.get("size")
        found = nats_bound(network, batch, block=block, draws=config.draws, repeats=config.repeats, seed=config.seed)
    value, error = found.bits(size)
    spread = float(found.nats.std()) * math.sqrt(len(rows)) / (math.log(2) * size) if len(rows) > 1 else 0.0
    known = row.family == "ar" or row.objective.get("size") == 1
    return {"value": value, "error": error, "spread": spread, "exact": known, "rows": len(rows)}


@torch.inference_mode()
def exact(network: Decoder, batch: Batch) -> NatsBound:
    """-ln p of each row from left to right, given its first token."""
    found = []
    for rows in batch.tokens.split(_TOGETHER):
        logits = network.unembed(network(rows[:, :-1]).final).float()
        found.append(cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").double().sum(1))
    nats = torch.cat(found)
    return NatsBound(nats, torch.zeros_like(nats), torch.full_like(nats, batch.tokens.shape[1] - 1))


@torch.inference_mode()
def scored_bound(network: Decoder, batch: Batch, config: ScoreEntropyConfig, draws: int, repeats: int, seed: int) -> NatsBound:
    """As `nats_bound`, by score entropy: `draws` times spread evenly, `repeats` times over. Cost: draws x repeats rows a row."""
    objective, found = config.build(), []
    for tokens, scored in zip(batch.tokens, batch.extra["scored"], strict=True):
        one = Batch(tokens.expand(draws, -1), None, {"scored": scored.expand(draws, -1)})
        rng = CounterRng.seeded(range(draws), tokens.device).at(seed)
        found.append(torch.stack([objective.nats(network, one, rng.at(r)).sum(1).mean() for r in range(repeats)]))
    nats = torch.stack(found)
    return NatsBound(nats.mean(1), nats.std(1) / math.sqrt(repeats), batch.extra["scored"].sum(1))


def race(setup: Setup, method: str, rung: float) -> dict[str, Any]:
    """Let the method's network go on from held-out prompts, and judge what it wrote."""
    config, entrant = setup.config, METHODS[method]
    model = load(setup.run(entrant.training))
    rows = setup.held_out(cast(Tokenizer, model.tokenizer))[: config.count]
    prompts = [row[: config.prompt] for row in rows]
    write, new = (_fill if TRAININGS[entrant.training].fills else _go_on), config.length - config.prompt
    parts, begun = [], time.perf_counter()
    for first in range(0, len(prompts), config.together):
        parts.append(write(model, prompts[first : first + config.together], new, entrant, rung, config.seed + first))
    seconds = time.perf_counter() - begun
    calls = sum(part.calls for part in parts)
    return {
        "method": method,
        "rung": rung,
        "texts": len(prompts),
        "calls": calls / len(prompts),
        "tokens_per_call": sum(part.given for part in parts) / calls,
        "seconds": seconds / len(prompts),
        **judged(setup.judge, model, prompts, [tokens for part in parts for tokens in part.tokens]),
        "frames": _frames(model, prompts[0], parts[0]),
    }


def floor(setup: Setup, training: str) -> dict[str, Any]:
    """What the judge says of the text that was held out, in the tokens that everybody has."""
    model, start = load(setup.run(training)), setup.config.prompt
    rows = setup.held_out(cast(Tokenizer, model.tokenizer))[: setup.config.count]
    return judged(setup.judge, model, [row[:start] for row in rows], [row[start:] for row in rows])


def judged(judge: Model, model: Model, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The quality of `outputs` after `prompts`, which no one of its three parts tells alone.

    `judge`: bits per byte under the judge, which also falls for text that repeats itself; `entropy`: bits of the law of tokens
    within a text, which then falls too; `distinct`: the share of different n-grams of tokens among all, by n.
    """
    tokenizer, reader = cast(Tokenizer, model.tokenizer), cast(Tokenizer, judge.tokenizer)
    found, sizes = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        text = tokenizer.decode(output)
        given, read = reader.encode(tokenizer.decode(prompt)), reader.encode(text, add_special_tokens=False)
        if read:
            logits = judge.logits(torch.tensor([[*given, *read]])[:, :-1])[0, len(given) - 1 :].float()
            found.append(float(cross_entropy(logits, torch.tensor(read), reduction="sum")) / math.log(2))
            sizes.append(len(text.encode()))
    value, error = _ratio(torch.tensor(found).double(), torch.tensor(sizes).double())
    grams = {n: [tuple(ids[i : i + n]) for ids in outputs for i in range(len(ids) - n + 1)] for n in _GRAMS}
    return {
        "judge": {"value": value, "error": error},
        "entropy": sum(_entropy(output) for output in outputs) / len(outputs),
        "distinct": {str(n): len(set(each)) / max(1, len(each)) for n, each in grams.items()},
    }


def _go_on(model: Model, prompts: Sequence[list[int]], new: int, method: Method, rung: float, seed: int) -> Written:
    """From left to right, with as many drafted tokens a call as the rung says."""
    network, drafted = model.network, round(rung)
    config = MultiTokenConfig(branching=(1,) * drafted) if drafted else SilentConfig()
    seeds = range(seed, seed + len(prompts))
    transcripts, written = Transcripts(len(prompts)), Written()
    drafter = config.build(network, lambda path: network)
    settings, sampling = Settings(max_new_tokens=new), SamplingConfig(temperature=1.0)
    for event in requests(network, drafter, prompts, settings, sampling=sampling, seed=seeds):
        transcripts.take(event)
        step = event.payload
        for i in (step.rows == 0).nonzero().flatten().tolist():
            written.spent += max(step.calls, not written.history)  # the prompt's call gives the first token
            written.history += [[[written.spent, token]] for token in step.tokens[i, : int(step.count[i])].tolist()]
    done = transcripts.completions()
    written.tokens = [row.tokens for row in done]
    written.calls = sum(row.cost.calls for row in done)
    written.given = sum(row.cost.tokens - row.cost.prefill_calls for row in done)
    return written


def _fill(model: Model, prompts: Sequence[list[int]], new: int, method: Method, rung: float, seed: int) -> Written:
    """A gap behind each prompt, in the model's own blocks, with as many tokens a step as the rung says."""
    width = TRAININGS[method.training].objective.get("size", new)
    seeds = range(seed, seed + len(prompts))
    asked = {"order": method.ordering(rung), "steps": method.steps(rung, width), "seed": tuple(seeds), "ignore_eos": True}
    filling = Filling(model, [[*prompt, *[None] * new] for prompt in prompts], parse(FillConfig, asked))
    written, start = Written(history=[[] for _ in range(new)]), len(prompts[0])
    for event in filling.steps():
        step = event.payload
        written.calls += int(step.calls.sum())
        for i in (step.rows == 0).nonzero().flatten().tolist():
            written.spent += int(step.calls[i])
            for j in step.changed[i].nonzero().flatten().tolist():
                place = int(step.first[i]) + j - start
                written.history[place].append([written.spent, int(step.tokens[i, j])])
    written.tokens = [result.tokens[start:] for result in filling.results()]
    written.given = sum(map(len, written.tokens))
    return written


def _frames(model: Model, prompt: Sequence[int], written: Written) -> dict[str, Any]:
    """The first text on its way: what each position of it held after which call."""
    tokenizer = cast(Tokenizer, model.tokenizer)
    told = [[[call, tokenizer.decode([token])] for call, token in history] for history in written.history]
    return {"prompt": tokenizer.decode(prompt), "calls": written.spent, "tokens": told}


def _entropy(ids: Sequence[int]) -> float:
    counts = torch.tensor(list(Counter(ids).values())).double()
    return float(torch.special.entr(counts / counts.sum()).sum()) / math.log(2)


def _ratio(total: Tensor, size: Tensor) -> tuple[float, float]:
    """The ratio of two sums over texts, and its standard error. Raises ValueError where nothing was written."""
    if not len(total):
        raise ValueError("texts: all empty, nothing to judge; train longer, or raise count")
    value = float(total.sum() / size.sum())
    off = (total - value * size).square().sum() * len(total) / max(1, len(total) - 1)
    return value, float(off.sqrt() / size.sum())


def _curve(log: Path, bytes_per_token: float) -> list[dict[str, float]]:
    """The training loss of what is bounded, in bits per byte, against tokens and seconds: means of neighbouring lines."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["group"] == "train" and line["loss"] is not None]
    count = max(1, math.ceil(len(lines) / _POINTS))
    points = []
    for group in (lines[i : i + count] for i in range(0, len(lines), count)):
        nats = [line.get("next_token", line["loss"]) for line in group]
        points.append(
            {
                "tokens": group[-1]["tokens"],
                "seconds": group[-1]["seconds"],
                "bits": sum(nats) / len(nats) / math.log(2) / bytes_per_token,
            }
        )
    return points
