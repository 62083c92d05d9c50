"""Decoding speed: the shipped model with every drafter beside `transformers`, and plain decoding of a random 300 M model.

`python benchmarks/decode.py`, on an idle machine. Writes runs/benchmarks/decode-*/race.json and race.html, and prints the tables.
Nothing is asserted: what a machine does is for its owner to read.
"""

import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fewstep.hub.load import load
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model
from fewstep.nn.packed import pack
from fewstep.report.contest import PLAIN, Contestant, Ours, RaceConfig, compete, entrants
from fewstep.report.costs import machine_costs
from fewstep.report.peers import transformers_peers
from fewstep.report.race import race_decode_model

OUT = Path("runs/benchmarks")
LARGE = DecoderConfig(vocab=32_000, width=1024, depth=20, query_heads=16, hidden=2816, tied=True, max_positions=512)
PROMPT, TOKENS, ROUNDS = 64, 64, 3


def shipped(console: Console) -> None:
    """Every drafter and peer on the shipped model, in both precisions."""
    for dtype in ("bfloat16", "float32"):
        config = RaceConfig(count=12, max_new_tokens=96, rounds=5)
        race_decode_model(load("code-nano", dtype=dtype), config, OUT / f"decode-code-nano-{dtype}", console=console)


def large(console: Console) -> None:
    """Plain decoding at a size where memory traffic is everything, beside `transformers` and the bound of the memory."""
    torch.manual_seed(0)
    model = Model(LARGE.build().to(torch.bfloat16), None)
    prompts = torch.randint(LARGE.vocab, (2, PROMPT)).tolist()
    config = RaceConfig(max_new_tokens=TOKENS, rounds=ROUNDS)
    with tempfile.TemporaryDirectory() as exports:
        try:
            peers = transformers_peers(model, None, config, Path(exports))[:1]
        except ValueError as error:
            console.print(str(error))
            peers = []
        network = model.network
        pack(network)
        plain = Ours(PLAIN, network, entrants(network)[PLAIN].build(network, lambda path: network), config)
        contestants: list[Contestant] = [plain, *peers]
        records = compete(contestants, prompts, config)
    machine = machine_costs(network, prompts[0])
    table = Table("", "ms/token", "tokens/s", "over plain", title=f"random {model.size / 1e6:.0f} M parameters, bfloat16")
    for record in records:
        speed, ratio = record.tokens_per_second, record.speed_over(records[0])
        row = (f"{1e3 / speed.median:.1f}", f"{speed.median:.2f}", f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})")
        table.add_row(f"{record.library} {record.name}", *row)
    console.print(table)
    read, bound = machine.weight_bytes / 1e6, 1e3 * machine.bound_seconds
    alone = ", ".join(f"{1e3 * seconds:.1f} ms on {count}" for count, seconds in machine.call_seconds.items())
    console.print(
        f"a call reads {read:.0f} MB: at least {bound:.1f} ms at {machine.bandwidth / 1e9:.1f} GB/s; it takes {alone} tokens"
    )


if __name__ == "__main__":
    shipped(Console())
    large(Console())
