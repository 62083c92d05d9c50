"""Decoding speed beside llama.cpp: the same weights in bfloat16 (as GGUF), prompts, tokens and threads, in alternating runs.

`python benchmarks/llamacpp.py`, on an idle machine, after `pip install llama-cpp-python gguf`, which compiles llama.cpp for some
eleven minutes of processor time and so is asked for by no extra. Without them one line says so and nothing is measured.
llama.cpp runs in a process of its own that answers one request a line. Its loop here is the leanest that its C functions allow,
greedy by numpy, with the prompt lookup that comes with llama-cpp-python. Before the race both sides' logits are held against
those of the same weights in float32. Prints tables, writes runs/benchmarks/llamacpp.json, and asserts nothing.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, cast, final

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep.core.event import Cost
from fewstep.core.mixer import Tree
from fewstep.core.model import Target
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.retrieval import RetrievalConfig
from fewstep.hub.families import FAMILIES, write_config
from fewstep.hub.load import load
from fewstep.hub.names import HEADS, family_names
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model
from fewstep.models.weights import distinct
from fewstep.nn.packed import pack
from fewstep.report.contest import PLAIN, Contestant, Lap, Ours, RaceConfig, Record, Spread, compete, entrants
from fewstep.report.costs import call_seconds, cpu_name
from fewstep.report.process import Process
from fewstep.report.process import serve as answer
from fewstep.report.prompts import prompts_for
from fewstep.text.tokenizer import Tokenizer

LIBRARY = "llama.cpp"
SHIPPED = "code-nano"
RANDOM: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "19M": DecoderConfig(vocab=2048, width=384, depth=10, query_heads=6, hidden=1024, tied=False, max_positions=512),
        "291M": DecoderConfig(vocab=32_000, width=1024, depth=20, query_heads=16, hidden=2816, max_positions=512),
    }
)
CAPACITY, PROMPT = 512, 64  # tokens of context; tokens of a random prompt
SIZES = (1, 2, 4, 8, 16)  # tokens in one call
REST = 0.05  # seconds after a run, in which the threads of that run stop spinning


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """A projection to `heads` [HE,D] with the two rows that a rotation mixes side by side instead of half a head apart."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def gguf_tensors(model: Model) -> dict[str, Tensor]:
    """The trunk's weights by their names in Llama checkpoints, as llama.cpp computes with them: queries and keys interleaved."""
    config = model.network.config
    kv_heads, _ = config.mixers[0].widths(config.width, config.query_heads)
    heads = {"q_proj": config.query_heads, "k_proj": kv_heads}
    named = distinct(family_names(model.network, FAMILIES["llama"]))
    return {
        name: next((interleaved(tensor, count) for part, count in heads.items() if f".{part}." in name), tensor).detach()
        for name, tensor in named.items()
        if not name.startswith(HEADS)
    }


def write_gguf(model: Model, path: Path) -> None:
    """Write `model`, matrices in bfloat16 and norms in float32, without a vocabulary: ids go in and come out.

    Raises ValueError for what is no plain Llama decoder.
    """
    import gguf

    config = model.network.config
    values = write_config(FAMILIES["llama"], config)
    if values["rope_scaling"] is not None:
        raise ValueError(f"rope_scaling={values['rope_scaling']}: not written here; choose a model without")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab)
    writer.add_tokenizer_model("none")
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.depth)
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(config.query_heads)
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_key_length(values["head_dim"])
    writer.add_value_length(values["head_dim"])
    writer.add_rope_freq_base(values["rope_theta"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.depth)
    for name, tensor in gguf_tensors(model).items():
        known = names.get_name(name, try_suffixes=(".weight",))
        if tensor.ndim == 1:
            writer.add_tensor(known, tensor.float().numpy())
        else:
            stored = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(known, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def greedy(
    best: Callable[[list[int], int], np.ndarray], lookup: Callable[[np.ndarray], np.ndarray] | None, text: list[int], length: int
) -> tuple[list[int], int]:
    """`text` continued to `length` tokens, and the calls it took.

    `best(tokens, start)`: the likeliest token after each of `tokens`, which stand at `start` .. in the text. `lookup`: a guess of
    what follows a text (None: no guesses).
    """
    tokens, end, calls = np.empty(length, dtype=np.intc), len(text), 0
    tokens[:end] = text
    while end < length:
        draft = [] if lookup is None else lookup(tokens[:end])[: length - end - 1].tolist()
        found = best([int(tokens[end - 1]), *draft], end - 1)
        kept = next((i for i, token in enumerate(draft) if token != found[i]), len(draft))
        tokens[end : end + kept + 1] = found[: kept + 1]
        end, calls = end + kept + 1, calls + 1
    return tokens.tolist(), calls


@final
class Engine:
    """llama.cpp with one sequence: what runs in the other process."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        self._lib, self._lookup = llama_cpp, LlamaPromptLookupDecoding()
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = CAPACITY
        options.n_threads = options.n_threads_batch = threads
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(CAPACITY, 0, 1)

    def call(self, tokens: Sequence[int], start: int, every: bool = True) -> np.ndarray:
        """Evaluate `tokens` at positions `start` ..; the logits of each, or of the last [1,V]. What stood there is forgotten."""
        batch, count = self._batch, len(tokens)
        self._lib.llama_memory_seq_rm(self._memory, 0, start, -1)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or i == count - 1
        if self._lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        rows = count if every else 1
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), shape=(rows, self._vocab))

    def generate(self, prompt: list[int], count: int, drafts: int) -> dict[str, Any]:
        """`count` greedy tokens after `prompt`, with `drafts` of prompt lookup a call; 0: plain."""
        self._lookup.num_pred_tokens = drafts
        start = time.perf_counter()
        first = int(self.call(prompt, 0, every=False)[0].argmax())
        prefilled = time.perf_counter()
        tokens, calls = greedy(self._best, self._lookup if drafts else None, [*prompt, first], len(prompt) + count)
        now = time.perf_counter()
        return {"tokens": tokens[len(prompt) :], "calls": calls, "seconds": now - start, "prefill_seconds": prefilled - start}

    def _best(self, tokens: Sequence[int], start: int) -> np.ndarray:
        return self.call(tokens, start).argmax(1)

    def logits(self, prompt: list[int], path: str) -> None:
        """The logits after each token of `prompt`, into a file."""
        np.save(path, self.call(prompt, 0))

    def seconds(self, prompt: list[int], sizes: list[int]) -> list[float]:
        """Median seconds of calls on so many tokens after `prompt`; a change of size costs a new graph."""
        self.call(prompt, 0)
        taken = []
        for size in sizes:
            seconds = []
            for _ in range(23):
                start = time.perf_counter()
                self.call(prompt[:size], len(prompt))
                seconds.append(time.perf_counter() - start)
            taken.append(median(seconds[3:]))
        return taken


def serve(options: argparse.Namespace) -> None:
    """What the other process does."""
    engine = Engine(options.serve, options.threads)
    answer({"generate": engine.generate, "logits": engine.logits, "seconds": engine.seconds})


@final
class Theirs:
    """The peer in one of its modes, one prompt at a time."""

    library = LIBRARY

    def __init__(self, peer: Process, drafts: int, tokens: int) -> None:
        self.name = f"prompt lookup {drafts}" if drafts else PLAIN
        self._peer, self._drafts, self._tokens = peer, drafts, tokens

    def run(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Lap:
        done = self._peer.ask("generate", {"prompt": prompts[0], "count": self._tokens, "drafts": self._drafts})
        cost = Cost(done["calls"], 0, 1, self._tokens, done["seconds"])
        return Lap([done["tokens"]], cost, prefill_seconds=done["prefill_seconds"])


@torch.inference_mode()
def agreement(target: Target, exact: Target, peer: Process, prompt: Sequence[int]) -> dict[str, float]:
    """How far the logits after each token of `prompt` lie from those of `exact`, the same weights in float32, at most.

    `scale`: their root mean square. `same_*`: the share of positions with the same likeliest token.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.npy"
        peer.ask("logits", {"prompt": prompt, "path": str(path)})
        theirs = torch.from_numpy(np.load(path))
    tree, found = Tree.chain(torch.tensor([prompt])), []
    for network, dtype in ((exact, torch.float32), (target, torch.bfloat16)):
        logits = network.extend(tree, network.init_state(1, len(prompt), device="cpu", dtype=dtype)).logits
        found.append(cast(Tensor, logits)[0].float())
    known = {"scale": float(found[0].square().mean().sqrt())}
    for name, one, other in (("ours", found[1], found[0]), ("theirs", theirs, found[0]), ("apart", found[1], theirs)):
        known[name] = float((one - other).abs().max())
        known[f"same_{name}"] = float((one.argmax(-1) == other.argmax(-1)).float().mean())
    return known


def time_calls(
    target: Target, peer: Process, prompt: Sequence[int], rounds: int
) -> list[tuple[dict[int, float], dict[int, float]]]:
    """Median seconds of our calls and theirs on n tokens after `prompt`, by n, in alternating rounds."""
    taken = []
    for _ in range(rounds):
        ours = call_seconds(target, prompt, SIZES)
        time.sleep(REST)
        theirs = peer.ask("seconds", {"prompt": prompt, "sizes": SIZES})
        time.sleep(REST)
        taken.append((ours, dict(zip(SIZES, theirs, strict=True))))
    return taken


def made(name: str, count: int) -> tuple[Model, list[list[int]]]:
    """The model called `name` with plain weights in bfloat16, and prompts for it."""
    if name == SHIPPED:
        model = load(SHIPPED, dtype="bfloat16", packed=False)
        encode = cast(Tokenizer, model.tokenizer).encode
        return model, [encode(prompt.prompt) for prompt in prompts_for(SHIPPED, model, count)]
    torch.manual_seed(0)
    config = RANDOM[name]
    return Model(config.build().to(torch.bfloat16), None), torch.randint(config.vocab, (count, PROMPT)).tolist()


def contestants(model: Model, name: str, peer: Process, config: RaceConfig) -> list[Contestant]:
    """Plain decoding of both sides and, on text, every drafter of ours and as many prompt lookups, of 2 tokens up, of theirs.

    Sides alternate without exception: a process that idled while the other ran starts slower, which must meet all alike.
    """
    network, text = model.network, name == SHIPPED
    extra: dict[str, DrafterConfig] = {f"retrieval {nodes}": RetrievalConfig(nodes=nodes) for nodes in (4, 8) if text}
    drafters = {**entrants(network, () if text else (PLAIN,)), **extra}
    ours = [Ours(key, network, drafter.build(network, lambda path: network), config) for key, drafter in drafters.items()]
    theirs = [Theirs(peer, drafts, config.max_new_tokens) for drafts in (0, *range(2, len(ours) + 1))]
    return [entrant for pair in zip(ours, theirs, strict=True) for entrant in pair]


def race(name: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Agreement, calls and race on one model, printed, as plain values."""
    model, prompts = made(name, options.count)
    exact = deepcopy(model.network).float()
    config = RaceConfig(max_new_tokens=options.tokens, rounds=options.rounds, count=options.count)
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        write_gguf(model, gguf)
        pack(model.network)
        with Process([sys.executable, __file__, "--serve", str(gguf), "--threads", str(torch.get_num_threads())]) as peer:
            same = agreement(model.network, exact, peer, prompts[0])
            del exact
            calls = time_calls(model.network, peer, prompts[0], options.rounds)
            records = compete(contestants(model, name, peer, config), prompts, config, lambda _: time.sleep(REST))
    known = ", ".join(f"{key} {value:.4g}" for key, value in same.items())
    console.print(f"{name}, {model.size / 1e6:.0f} M parameters; logits: {known}", soft_wrap=True)
    _show_calls(calls, console)
    _show_race(records, console)
    return {
        "model": name,
        "parameters": model.size,
        "agreement": same,
        "calls": calls,
        "race": [_row(record, records) for record in records],
    }


def _row(record: Record, records: Sequence[Record]) -> dict[str, Any]:
    """A contestant in plain values; `decoding_*` is without the prompts."""
    ours, theirs = (entry for entry in records if entry.name == PLAIN)
    numbers, cost = record.numbers(ours, True), record.lap.cost
    spent = [total - prompts for total, prompts in zip(record.seconds, record.prefill_seconds, strict=True)]
    return {
        **numbers,
        "speed_over_their_plain": asdict(record.speed_over(theirs)),
        "decoding_ms_per_token": asdict(Spread.of([1e3 * seconds / (cost.tokens - cost.prefill_calls) for seconds in spent])),
        "decoding_speed_over_plain": asdict(record.decoding_speed_over(ours)),
        "decoding_speed_over_their_plain": asdict(record.decoding_speed_over(theirs)),
    }


def _shown(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f}-{spread['high']:.2f})"


def _show_calls(calls: Sequence[tuple[dict[int, float], dict[int, float]]], console: Console) -> None:
    table = Table("tokens in a call", "fewstep ms", f"{LIBRARY} ms", "times faster", box=SIMPLE_HEAD)
    for size in SIZES:
        ours, theirs = ([taken[side][size] for taken in calls] for side in (0, 1))
        ratio = Spread.of([other / mine for mine, other in zip(ours, theirs, strict=True)])
        table.add_row(str(size), f"{1e3 * median(ours):.3f}", f"{1e3 * median(theirs):.3f}", _shown(asdict(ratio)))
    console.print(table)


def _show_race(records: Sequence[Record], console: Console) -> None:
    table = Table("", "tokens/call", "ms/token", "over our plain", f"over {LIBRARY}'s", "same", box=SIMPLE_HEAD, padding=0)
    for record in records:
        row = _row(record, records)
        ratios = _shown(row["speed_over_plain"]), _shown(row["speed_over_their_plain"])
        speed = f"{row['tokens_per_call']:.2f}", f"{row['decoding_ms_per_token']['median']:.3f}"
        table.add_row(f"{record.library} {record.name}", *speed, *ratios, str(row["identical"]))
    console.print(table)
    fastest = {record.library: record for record in sorted(records, key=lambda record: record.tokens_per_second.median)}
    best = fastest[Ours.library]
    for other in (records[0], fastest[LIBRARY]):
        whole, decoding = (_shown(asdict(ratio)) for ratio in (best.speed_over(other), best.decoding_speed_over(other)))
        console.print(f"{best.name} over {other.library} {other.name}: {whole}, without the prompts {decoding}", soft_wrap=True)


def main(options: argparse.Namespace, console: Console) -> None:
    """Every model, and every number in a file."""
    if find_spec("llama_cpp") is None or find_spec("gguf") is None:
        console.print(f"{LIBRARY} is not installed, nothing to race: pip install llama-cpp-python gguf")
        return
    torch.set_num_threads(options.threads or torch.get_num_threads())
    found = [race(name, options, console) for name in options.models]
    record = {"threads": torch.get_num_threads(), "cpu": cpu_name(), "torch": torch.__version__, "models": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=(SHIPPED, *RANDOM), default=(SHIPPED, *RANDOM))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=8, help="prompts")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens for each prompt")
    parser.add_argument("--threads", type=int, default=0, help="on both sides; 0: as many as PyTorch takes")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/llamacpp.json"))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen)
    else:
        main(chosen, Console())
