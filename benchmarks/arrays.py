"""Training and sampling of arrays beside peers, rows a second: `python benchmarks/arrays.py`, on an idle machine.

Images: the default U-Net with fewstep's trainer and sampler; the very same network in the training and sampling loops of the
examples of `diffusers`; and in those loops the library's own U-Net of as many channels, levels and blocks. All learn the noise of
DDPM's chain with AdamW, clipping and a moving average, and sample by 2M. Flows: the same kinds and sizes of `zuko` and
`normflows`, all in one plain loop. What is not installed is left out (extra `peers`; pip install zuko normflows). Contestants
take turns, in another order each round. Nothing is asserted.
"""

import argparse
import importlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fewstep.core.objective import Batch
from fewstep.core.random import CounterRng
from fewstep.decode.arrays import SampleConfig, sample
from fewstep.diffusion.parameterisations import EpsConfig
from fewstep.diffusion.processes import DDPMConfig
from fewstep.diffusion.solvers.ode import DPMSolverConfig
from fewstep.models.denoiser import Denoiser, DenoiserConfig
from fewstep.models.flow import Flow, FlowConfig
from fewstep.nn.backbones.unet import UNetConfig
from fewstep.nn.bijections.maf import MAFConfig
from fewstep.nn.bijections.nsf import NSFAutoregressiveConfig
from fewstep.nn.bijections.realnvp import RealNVPConfig
from fewstep.training.objectives.denoising import DenoisingConfig
from fewstep.training.optim import AdamWConfig
from fewstep.training.plan import Budget, Plan, Run
from fewstep.training.precision import PRECISIONS
from fewstep.training.schedule import Cosine
from fewstep.training.trainer import Trainer

SHAPE, ROWS, WIDTH, DECAY, RATE = (1, 8, 8), 64, 32, 0.999, 1e-3
FEATURES, TRANSFORMS, HIDDEN, BINS, FLOW_ROWS = 16, 5, 64, 8, 512
WARMUP = 2  # steps of training that are not timed
Job = Callable[[int], float]  # steps -> rows a second


class Clocked:
    """Batches of noise; notes when each was asked for."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.x = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(0))

    def batch(self, step: int) -> Batch:
        """The same batch for every step."""
        self.times.append(time.perf_counter())
        return Batch(torch.arange(ROWS)[:, None], extra={"x": self.x})

    @property
    def speed(self) -> float:
        """Rows a second after the warm-up."""
        timed = self.times[WARMUP:]
        return ROWS * (len(timed) - 1) / (timed[-1] - timed[0])


def denoiser() -> Denoiser:
    """The model, with the same weights every time."""
    torch.manual_seed(0)
    return DenoiserConfig(
        shape=SHAPE, backbone=UNetConfig(width=WIDTH), process=DDPMConfig(), parameterisation=EpsConfig()
    ).build()


def own_training(steps: int) -> float:
    """fewstep's trainer."""
    data = Clocked()
    run = Run(batch=ROWS, log_every=steps, validate_every=0, checkpoint_steps=0, checkpoint_seconds=0, divergence=0, ema=DECAY)
    optim = AdamWConfig(lr=RATE, weight_decay=0.0)
    plan = Plan(optim, Cosine(warmup=0), PRECISIONS["fp32"](), Budget(steps=steps + WARMUP), run)
    with tempfile.TemporaryDirectory() as folder:
        objective = DenoisingConfig(times="uniform").build()
        Trainer(denoiser(), objective, data, plan, Path(folder) / "run", console=Console(quiet=True)).run()
    return data.speed


def own_sampling(steps: int) -> float:
    """fewstep's sampler."""
    model = denoiser().eval()
    begun = time.perf_counter()
    sample(model, SampleConfig(count=ROWS, batch=ROWS, steps=steps, solver=DPMSolverConfig()))
    return ROWS / (time.perf_counter() - begun)


def own_network() -> Callable[[Tensor, Tensor], Tensor]:
    """The network of fewstep as diffusers' loop calls one."""
    return denoiser().backbone


def diffusers_network() -> Callable[[Tensor, Tensor], Tensor]:
    """Its U-Net with the same channels, levels and blocks, attention at the lower level."""
    diffusers = importlib.import_module("diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=SHAPE[-1],
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
        layers_per_block=1,
        block_out_channels=(WIDTH, 2 * WIDTH),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=2 * WIDTH,
    )
    return Sampled(network)


class Sampled(nn.Module):
    """A network of diffusers without the record around its output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The estimate of the noise."""
        estimate: Tensor = self.network(x, t).sample
        return estimate


def their_training(make: Callable[[], Any], steps: int) -> float:
    """The loop of diffusers' examples of unconditional training."""
    diffusers, averages = importlib.import_module("diffusers"), importlib.import_module("diffusers.training_utils")
    network, data = make().train(), Clocked()
    scheduler = diffusers.DDPMScheduler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps + WARMUP)
    average = averages.EMAModel(network.parameters(), decay=DECAY)
    for step in range(steps + WARMUP):
        x = data.batch(step).extra["x"]
        noise = torch.randn_like(x)
        t = torch.randint(0, 1000, (len(x),))
        loss = nn.functional.mse_loss(network(scheduler.add_noise(x, noise, t), t), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        falling.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        loss.item()
    return data.speed


@torch.no_grad()
def their_sampling(make: Callable[[], Any], steps: int) -> float:
    """The loop of diffusers' pipelines."""
    diffusers = importlib.import_module("diffusers")
    network, scheduler = make().eval(), diffusers.DPMSolverMultistepScheduler()
    begun = time.perf_counter()
    scheduler.set_timesteps(steps)
    x = torch.randn(ROWS, *SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(ROWS)), t, x).prev_sample
    return ROWS / (time.perf_counter() - begun)


def images() -> dict[tuple[str, str], Job]:
    """By what is done and who does it."""
    jobs: dict[tuple[str, str], Job] = {
        ("U-Net, training", "fewstep"): own_training,
        ("U-Net, sampling", "fewstep"): own_sampling,
    }
    if installed("diffusers"):
        for name, make in (("diffusers, our network", own_network), ("diffusers, its network", diffusers_network)):
            jobs["U-Net, training", name] = lambda steps, make=make: their_training(make, steps)  # type: ignore[misc]
            jobs["U-Net, sampling", name] = lambda steps, make=make: their_sampling(make, steps)  # type: ignore[misc]
    return jobs


def own_flow(kind: str) -> tuple[Any, Callable[[Tensor], Tensor], Callable[[int], Tensor]]:
    """A flow of fewstep: its module, densities and samples."""
    part = {
        "RealNVP": RealNVPConfig(layers=TRANSFORMS, hidden=HIDDEN),
        "MAF": MAFConfig(layers=TRANSFORMS, hidden=HIDDEN),
        "NSF": NSFAutoregressiveConfig(layers=TRANSFORMS, hidden=HIDDEN, bins=BINS),
    }[kind]
    flow: Flow = FlowConfig(shape=(FEATURES,), bijections=(part,), standardise=False).build()
    return flow, flow.log_prob, lambda count: flow.sample(CounterRng.seeded(torch.arange(count)))


def zuko_flow(kind: str) -> tuple[Any, Callable[[Tensor], Tensor], Callable[[int], Tensor]]:
    """The same of zuko."""
    zuko = importlib.import_module("zuko")
    bins = {"bins": BINS} if kind == "NSF" else {}
    flow = getattr(zuko.flows, kind)(FEATURES, transforms=TRANSFORMS, hidden_features=(HIDDEN, HIDDEN), **bins)
    return flow, lambda x: flow().log_prob(x), lambda count: flow().sample((count,))


def normflows_flow(kind: str) -> tuple[Any, Callable[[Tensor], Tensor], Callable[[int], Tensor]]:
    """The same of normflows."""
    nf = importlib.import_module("normflows")
    parts: list[Any] = []
    for _ in range(TRANSFORMS):
        if kind == "RealNVP":
            net = nf.nets.MLP([FEATURES // 2, HIDDEN, HIDDEN, FEATURES], init_zeros=True)
            parts += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(FEATURES, mode="swap")]
        elif kind == "MAF":
            inverted = nf.flows.MaskedAffineAutoregressive(FEATURES, HIDDEN, num_blocks=1)  # one pass samples: an IAF
            parts += [nf.flows.Reverse(inverted), nf.flows.Permute(FEATURES)]
        else:
            spline = nf.flows.AutoregressiveRationalQuadraticSpline(FEATURES, 1, HIDDEN, num_bins=BINS, tail_bound=5)
            parts += [spline, nf.flows.Permute(FEATURES)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES), parts)
    return flow, flow.log_prob, lambda count: flow.sample(count)[0]


def flows() -> dict[tuple[str, str], Job]:
    """By what is done and who does it."""
    makers = {"fewstep": own_flow, "zuko": zuko_flow, "normflows": normflows_flow}
    jobs: dict[tuple[str, str], Job] = {}
    for kind in ("RealNVP", "MAF", "NSF"):
        for library, make in makers.items():
            if installed(library):
                jobs[f"{kind}, training", library] = lambda steps, make=make, kind=kind: flow_training(make(kind), steps)  # type: ignore[misc]
                jobs[f"{kind}, sampling", library] = lambda steps, make=make, kind=kind: flow_sampling(make(kind), steps)  # type: ignore[misc]
    return jobs


def flow_training(parts: tuple[Any, Callable[[Tensor], Tensor], Callable[[int], Tensor]], steps: int) -> float:
    """Likelihood and AdamW in a plain loop."""
    flow, log_prob, _ = parts
    optimizer = torch.optim.AdamW(flow.parameters(), lr=RATE, fused=True)
    x = torch.randn(FLOW_ROWS, FEATURES)
    begun = 0.0
    for step in range(steps + WARMUP):
        if step == WARMUP:
            begun = time.perf_counter()
        loss = -log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return FLOW_ROWS * steps / (time.perf_counter() - begun)


@torch.no_grad()
def flow_sampling(parts: tuple[Any, Callable[[Tensor], Tensor], Callable[[int], Tensor]], steps: int) -> float:
    """`steps` batches of samples, after one that warms up."""
    drawn = parts[2]
    drawn(FLOW_ROWS)
    begun = time.perf_counter()
    for _ in range(steps):
        drawn(FLOW_ROWS)
    return FLOW_ROWS * steps / (time.perf_counter() - begun)


def installed(library: str) -> bool:
    """Whether it can be imported."""
    try:
        importlib.import_module(library)
    except ImportError:
        return False
    return True


def main(options: argparse.Namespace, console: Console) -> None:
    """All runs, the table, and every number in a file."""
    torch.set_num_threads(options.threads)
    jobs = {key: job for key, job in {**images(), **flows()}.items() if options.only in key[0]}
    speeds: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    for turn in range(options.rounds):
        for key in sorted(jobs, reverse=turn % 2 == 1):
            speeds[key].append(jobs[key](options.steps))
    table = Table("", "", "rows/s", "spread", "fewstep over it", title=f"rows a second, {options.threads} threads")
    record: list[Mapping[str, Any]] = []
    for (task, library), found in sorted(speeds.items()):
        over = [mine / other for mine, other in zip(speeds[task, "fewstep"], found, strict=True)]
        spread, ratio = f"{min(found):.0f}-{max(found):.0f}", f"{median(over):.2f} ({min(over):.2f}-{max(over):.2f})"
        table.add_row(task, library, f"{median(found):.0f}", spread, "" if library == "fewstep" else ratio)
        record.append({"task": task, "library": library, "rows_per_second": found, "fewstep_over": over})
    console.print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"torch": torch.__version__, "threads": options.threads, "runs": record}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="tasks whose name has this, such as U-Net or sampling")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/arrays.json"))
    main(parser.parse_args(), Console())
