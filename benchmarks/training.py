"""Training speed and peak memory beside `transformers.Trainer`: the same architecture, batch, optimizer, dtype and data.

`python benchmarks/training.py`, on an idle machine. Each run has a process of its own, and they alternate. Nothing is asserted.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fewstep.core.objective import Batch
from fewstep.hub.save import save_hf
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.training.objectives.next_token import NextTokenConfig
from fewstep.training.optim import AdamWConfig
from fewstep.training.plan import Budget, Plan, Run
from fewstep.training.precision import PRECISIONS, arithmetic
from fewstep.training.schedule import SCHEDULES
from fewstep.training.trainer import Trainer

MIXER = AttentionConfig(kv_heads=1, head_width=64)
MODEL = DecoderConfig(vocab=2048, width=192, depth=12, query_heads=3, hidden=512, mixers=(MIXER,))  # code-nano's trunk
ROWS, LENGTH, STEPS, WARMUP, ROUNDS = 8, 384, 10, 2, 3
LIBRARIES = ("fewstep", "transformers")


class Tokens:
    """Random batches, and when each was asked for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def batch(self, step: int) -> Batch:
        self.times.append(time.perf_counter())
        generator = torch.Generator().manual_seed(step)
        return Batch(torch.randint(MODEL.vocab, (ROWS, LENGTH), generator=generator))


def ours(dtype: str, folder: Path) -> list[float]:
    """The times at which the steps of fewstep's trainer began."""
    run = Run(batch=ROWS, length=LENGTH, validate_every=0, checkpoint_steps=0, checkpoint_seconds=0)
    plan = Plan(AdamWConfig(), SCHEDULES["wsd"](), PRECISIONS[dtype](), Budget(steps=STEPS), run)
    data = Tokens()
    Trainer(MODEL.build(), NextTokenConfig().build(), data, plan, folder / "run", console=Console(quiet=True)).run()
    return data.times


def theirs(dtype: str, folder: Path) -> list[float]:
    """The times at which the steps of the other trainer began."""
    try:
        from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
        from transformers import Trainer as TheirTrainer
    except ImportError:
        raise ValueError("peers: transformers is not installed; pip install 'fewstep[peers]'") from None
    save_hf(Model(MODEL.build(), None), folder / "model")
    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, local_files_only=True)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            times.append(time.perf_counter())

    optim = AdamWConfig()
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=ROWS,
        max_steps=STEPS,
        bf16=dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch_fused",
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        max_grad_norm=1.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    texts = torch.cat([Tokens().batch(step).tokens for step in range(STEPS)])
    data: Any = [{"input_ids": text, "labels": text} for text in texts]
    TheirTrainer(model=network, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    return times


def measure(library: str, dtype: str) -> dict[str, float]:
    """One run in this process: tokens per second after the warm-up, and the most memory the process held."""
    with tempfile.TemporaryDirectory() as folder:
        times = (ours if library == "fewstep" else theirs)(dtype, Path(folder))
    steps = len(times) - 1 - WARMUP
    speed = ROWS * LENGTH * steps / (times[-1] - times[WARMUP])
    return {"tokens_per_second": speed, "peak_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def main(console: Console) -> None:
    """All runs, alternating, and the table."""
    dtypes = ["fp32", *(["bf16"] if arithmetic(torch.bfloat16, torch.device("cpu")) else [])]
    table = Table("", "dtype", "tokens/s", "spread", "peak MB", title=f"{ROWS} x {LENGTH} tokens a step, AdamW")
    record = []
    for dtype in dtypes:
        runs: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
        for turn in range(ROUNDS):
            for library in LIBRARIES if turn % 2 == 0 else LIBRARIES[::-1]:
                command = [sys.executable, __file__, library, dtype]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[library].append(json.loads(done.stdout.splitlines()[-1]))
        for library, found in runs.items():
            speeds = [run["tokens_per_second"] for run in found]
            peak = median(run["peak_bytes"] for run in found)
            table.add_row(library, dtype, f"{median(speeds):.0f}", f"{min(speeds):.0f}-{max(speeds):.0f}", f"{peak / 1e6:.0f}")
            record.append({"library": library, "dtype": dtype, "runs": found})
    console.print(table)
    path = Path("runs/benchmarks/training.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main(Console())
