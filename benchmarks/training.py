"""Training speed and peak memory beside `transformers.Trainer`: the same decoder, weights, batches, dtype and AdamW.

`python benchmarks/training.py`, on an idle machine. Each run has a process of its own, and they take turns, in another order each
round. The mean loss of every run stands beside its speed: equal ones say that both did the same work. Nothing is asserted.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.hub.save import save_hf
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.training.objectives.next_token import NextTokenConfig
from fewstep.training.optim import AdamWConfig
from fewstep.training.plan import Budget, Plan, Run
from fewstep.training.precision import PRECISIONS, arithmetic
from fewstep.training.schedule import Cosine
from fewstep.training.trainer import Trainer

MIXER = AttentionConfig(kv_heads=1, head_width=64)
MODEL = DecoderConfig(
    vocab=2048, width=192, depth=12, query_heads=3, hidden=512, mixers=(MIXER,), tied=False
)  # code-nano's trunk
OPTIM = AdamWConfig()
LIBRARIES = ("fewstep", "transformers")
WARMUP = 2  # steps that are not timed


@final
@dataclass(frozen=True, slots=True)
class Work:
    """What both trainers do: `steps` steps on `rows` x `length` tokens in `dtype`, on `threads` threads (0: torch's choice)."""

    dtype: str
    steps: int
    rows: int
    length: int
    threads: int

    def network(self) -> Model:
        """The model, with the same weights in every process."""
        torch.manual_seed(0)
        return Model(MODEL.build(), None)

    def tokens(self) -> Iterator[Tensor]:
        """The batches [rows, length]."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randint(MODEL.vocab, (self.rows, self.length), generator=generator) for _ in range(self.steps))


@final
@dataclass(frozen=True, slots=True)
class Ran:
    """A run: when each step began (seconds), the mean loss of all, the most memory held before training and in all (bytes)."""

    times: list[float]
    loss: float
    before: int
    peak: int

    def speed(self, work: Work) -> float:
        """Tokens per second after the warm-up."""
        timed = self.times[WARMUP:]
        return work.rows * work.length * (len(timed) - 1) / (timed[-1] - timed[0])


@final
class Clocked:
    """Batches in order; notes when each was asked for."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.times: list[float] = []
        self._batches = batches

    def batch(self, step: int) -> Batch:
        """Batch number `step`."""
        self.times.append(time.perf_counter())
        return Batch(self._batches[step])


def ours(work: Work, folder: Path) -> Ran:
    """The run of fewstep's trainer."""
    data, model = Clocked([*work.tokens()]), work.network()
    run = Run(
        batch=work.rows,
        length=work.length,
        log_every=work.steps,
        validate_every=0,
        checkpoint_steps=0,
        checkpoint_seconds=0,
        divergence=0,
    )
    plan = Plan(OPTIM, Cosine(warmup=0, floor=1.0), PRECISIONS[work.dtype](), Budget(steps=work.steps), run)
    before = held()
    summary = Trainer(model.network, NextTokenConfig().build(), data, plan, folder / "run", console=Console(quiet=True)).run()
    return Ran(data.times, summary.loss, before, held())


def theirs(work: Work, folder: Path) -> Ran:
    """The run of the other trainer, on the exported model."""
    try:
        from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
        from transformers import Trainer as TheirTrainer
        from transformers.utils import logging
    except ImportError:
        raise ValueError("peers: transformers is not installed; pip install 'fewstep[peers]'") from None
    logging.disable_progress_bar()
    save_hf(work.network(), folder / "model")
    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, local_files_only=True)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=work.rows,
        max_steps=work.steps,
        train_sampling_strategy="sequential",
        bf16=work.dtype == "bf16",
        use_cpu=True,
        optim="adamw_torch_fused",
        learning_rate=OPTIM.lr,
        lr_scheduler_type="constant",
        adam_beta1=OPTIM.betas[0],
        adam_beta2=OPTIM.betas[1],
        adam_epsilon=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
        max_grad_norm=1.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    data: Any = [{"input_ids": text, "labels": text} for batch in work.tokens() for text in batch]
    before = held()
    done = TheirTrainer(model=network, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    return Ran(times, done.training_loss, before, held())


def held() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_here(library: str, work: Work) -> Ran:
    """One run in this process."""
    if work.threads:
        torch.set_num_threads(work.threads)
    with tempfile.TemporaryDirectory() as folder:
        return (ours if library == "fewstep" else theirs)(work, Path(folder))


def run_apart(library: str, work: Work) -> Ran:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps([library, asdict(work)])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Ran(**json.loads(done.stdout.splitlines()[-1]))


def compare(work: Work, rounds: int) -> dict[str, list[Ran]]:
    """`rounds` runs of each library, in alternating order."""
    runs: dict[str, list[Ran]] = {library: [] for library in LIBRARIES}
    for turn in range(rounds):
        for library in LIBRARIES if turn % 2 == 0 else LIBRARIES[::-1]:
            runs[library].append(run_apart(library, work))
    return runs


def summary(runs: Sequence[Ran], work: Work) -> dict[str, float]:
    """Medians, and the spread of the speed."""
    speeds = [run.speed(work) for run in runs]
    return {
        "tokens_per_second": median(speeds),
        "least": min(speeds),
        "most": max(speeds),
        "peak_mb": median(run.peak for run in runs) / 1e6,
        "grown_mb": median(run.peak - run.before for run in runs) / 1e6,
        "loss": median(run.loss for run in runs),
    }


def main(options: argparse.Namespace, console: Console) -> None:
    """All runs, the table, and every number in a file."""
    dtypes = ["fp32", *(["bf16"] if arithmetic(torch.bfloat16, torch.device("cpu")) else [])]
    table = Table("", "dtype", "tokens/s", "spread", "ratio", "peak MB", "grown MB", "loss")
    record: list[Mapping[str, Any]] = []
    for dtype in dtypes:
        work = Work(dtype, options.steps, options.rows, options.length, options.threads)
        runs = compare(work, options.rounds)
        rows = {library: summary(runs[library], work) for library in LIBRARIES}
        ratio = median(
            mine.speed(work) / other.speed(work) for mine, other in zip(*(runs[name] for name in LIBRARIES), strict=True)
        )
        for library, row in rows.items():
            spread, over = f"{row['least']:.0f}-{row['most']:.0f}", f"{ratio:.2f}" if library == "fewstep" else ""
            memory = f"{row['peak_mb']:.0f}", f"{row['grown_mb']:.0f}"
            table.add_row(library, dtype, f"{row['tokens_per_second']:.0f}", spread, over, *memory, f"{row['loss']:.5f}")
            measured = [asdict(run) for run in runs[library]]
            record.append({"library": library, **asdict(work), "summary": row, "runs": measured})
    console.print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"torch": torch.__version__, "model": MODEL.model_dump(), "runs": record}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/training.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.steps < WARMUP + 2:
        parser.error(f"--steps {chosen.steps}: at least {WARMUP + 2}, of which {WARMUP} warm up")
    if chosen.one:
        name, given = json.loads(chosen.one)
        print(json.dumps(asdict(run_here(name, Work(**given)))))
    else:
        main(chosen, Console())
