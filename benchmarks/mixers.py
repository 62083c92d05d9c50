"""Mixers with a matrix state beside what else computes the same, on this machine: `python benchmarks/mixers.py --threads 1`.

Performer: a layer of eight heads at 1024 tokens, against the same sums written out token by token, as performer-pytorch does
without CUDA, and against performer-pytorch itself where it is installed. Decay: the chunk form with one decay a head against
PyTorch's softmax attention and, without decays, against all chunks at once as flash-linear-attention's naive form has them.
Contestants take turns within one process; seconds are those of one computing thread, of several the clock's, median and best.
What every mixer costs against length is `fewstep race mixers`.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewstep.core.mixer import Context
from fewstep.nn import decay
from fewstep.nn.mixers.performer import Performer, PerformerConfig
from fewstep.nn.recurrent import Links
from fewstep.report.mixer_costs import alternate

HEADS, WIDTH = 8, 64  # and channels of a head
LENGTHS = (1024, 2048, 4096, 8192)
FEATURES = (128, 266)  # 266 = 64 ln 64


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median and best seconds of each, the contestants taking turns after a call each to warm up."""
    for call in calls.values():
        call()
    return {name: {"median": statistics.median(taken), "best": min(taken)} for name, taken in alternate(calls, rounds).items()}


def chunked(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, chunk: int = 64) -> Tensor:
    """Linear attention over [B,T,H,E] chunk after chunk, as `Recurrent` does it."""
    carry, outputs = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    real = torch.ones(q.shape[0], chunk, dtype=torch.bool)
    sees, none = real.unsqueeze(1).expand(-1, chunk, -1).tril(), torch.zeros_like(real)
    links = Links(torch.arange(-1, chunk - 1).expand(q.shape[0], -1), sees, none, True)
    for start in range(0, q.shape[1], chunk):
        q_c, k_c, v_c = (x[:, start : start + chunk] for x in (q, k, v))
        a_c = None if log_a is None else log_a[:, start : start + chunk]
        outputs.append(decay.read(q_c, k_c, v_c, a_c, carry, links))
        carry = decay.advance(k_c, v_c, a_c, carry, real)
    return torch.cat(outputs, 1)


def at_once(q: Tensor, k: Tensor, v: Tensor, chunk: int = 64) -> Tensor:
    """The same without decays, every chunk's state held at once, as flash-linear-attention's naive form does it."""
    q, k, v = (x.transpose(1, 2).unflatten(2, (-1, chunk)) for x in (q, k, v))
    states = (k.mT @ v).cumsum(2)
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
    later = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)
    y = q @ states + (q @ k.mT).masked_fill(later, 0) @ v
    return y.flatten(2, 3).transpose(1, 2)


def written_out(q: Tensor, k: Tensor, v: Tensor, pieces: int = 128) -> Tensor:
    """Causal attention of features q, k [B,H,T,M] and values [B,H,T,E], the state of every token of a piece held at once."""
    above, below, outputs = torch.zeros(()), torch.zeros(()), []
    for q_c, k_c, v_c in zip(*(x.chunk(pieces, 2) for x in (q, k, v)), strict=True):
        keys = below + k_c.cumsum(2)
        states = above + torch.einsum("bhnd,bhne->bhnde", k_c, v_c).cumsum(2)
        weight = 1 / torch.einsum("bhnd,bhnd->bhn", q_c, keys)
        outputs.append(torch.einsum("bhnde,bhnd,bhn->bhne", states, q_c, weight))
        above, below = states[:, :, -1:], keys[:, :, -1:]
    return torch.cat(outputs, 2)


def by_the_book(layer: Performer, x: Tensor) -> Tensor:
    """The whole layer with features as the authors make them, and their state for every token."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)
    logs = [
        (each * WIDTH**-0.25) @ layer.get_buffer("projection").mT - each.square().sum(-1, keepdim=True) / 2 * WIDTH**-0.5
        for each in (q, k)
    ]
    q = (logs[0] - logs[0].amax(-1, keepdim=True).detach()).exp()
    k = (logs[1] - logs[1].amax((-1, -2), keepdim=True).detach()).exp()
    return layer.out(written_out(q, k, v).transpose(1, 2).flatten(2))


def peer(layer: Performer, count: int) -> Callable[[Tensor], Tensor] | None:
    """The layer with performer-pytorch's attention between its projections; None where that is not installed."""
    try:
        from performer_pytorch import FastAttention
    except ImportError:
        return None
    attention = FastAttention(WIDTH, count, causal=True)
    attention.projection_matrix.copy_(layer.get_buffer("projection"))

    def run(x: Tensor) -> Tensor:
        q, k, v = layer.qkv(x).unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)
        return layer.out(attention(q, k, v).transpose(1, 2).flatten(2))

    return run


def race_performer(rounds: int) -> list[dict[str, object]]:
    """Forward, and forward with backward, printed as they go."""
    print(f"causal Performer, 1024 tokens, {HEADS} heads of {WIDTH}: seconds, median (best); times over fewstep")
    records: list[dict[str, object]] = []
    x, ctx = torch.randn(1, 1024, HEADS * WIDTH), Context(torch.arange(1024)[None])
    for count in FEATURES:
        layer = PerformerConfig(count=count).build(width=HEADS * WIDTH, heads=HEADS)
        runs: dict[str, Callable[[Tensor], Tensor]] = {
            "fewstep": lambda x, layer=layer: layer(x, ctx)[0],
            "written out": lambda x, layer=layer: by_the_book(layer, x),
        }
        other = peer(layer, count)
        if other is not None:
            runs["performer-pytorch"] = other
        with torch.no_grad():
            difference = float((runs["fewstep"](x) - runs["written out"](x)).abs().max())
            forward = timed({name: lambda run=run: run(x) for name, run in runs.items()}, rounds)
        both = timed({name: lambda run=run: run(x).sum().backward() for name, run in runs.items()}, rounds)
        for pass_, seconds in (("forward", forward), ("forward and backward", both)):
            tell(f"{count} features, {pass_}", seconds)
            records.append({"features": count, "pass": pass_, "difference": difference, **seconds})
    return records


def race_decay(rounds: int) -> list[dict[str, object]]:
    """Every length, printed as it goes."""
    print(f"one decay a head, {HEADS} heads of {WIDTH}, forward: seconds, median (best); times over fewstep")
    records: list[dict[str, object]] = []
    for length in LENGTHS:
        q, k, v = torch.randn(3, 1, length, HEADS, WIDTH)
        log_a = -0.1 * torch.rand(1, length, HEADS)
        q_h, k_h, v_h = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        calls: dict[str, Callable[[], object]] = {
            "fewstep": lambda q=q, k=k, v=v, a=log_a: chunked(q, k, v, a),
            "fewstep, no decay": lambda q=q, k=k, v=v: chunked(q, k, v, None),
            "all chunks at once, no decay": lambda q=q, k=k, v=v: at_once(q, k, v),
            "softmax attention": lambda q=q_h, k=k_h, v=v_h: scaled_dot_product_attention(q, k, v, is_causal=True),
        }
        with torch.no_grad():
            seconds = timed(calls, rounds)
        tell(f"{length} tokens", seconds)
        records.append({"length": length, **seconds})
    return records


def tell(label: str, seconds: dict[str, dict[str, float]]) -> None:
    """One line a contestant."""
    ours = seconds["fewstep"]["median"]
    for name, taken in seconds.items():
        median = taken["median"]
        print(f"  {label:32} {name:30} {median:8.4f} ({taken['best']:8.4f}) {median / ours:7.2f}x", flush=True)


def main() -> None:
    """Print the tables and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/mixers.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.threads} thread(s), torch {torch.__version__}")
    performer, decays = race_performer(options.rounds), race_decay(options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"threads": options.threads, "torch": torch.__version__, "performer": performer, "decay": decays}
    options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
