"""The training loop: batches in, weights and logs out. It knows contracts only: no model, no objective, no data set by name."""

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final, runtime_checkable

import torch
from rich.console import Console
from torch import Tensor, nn

from fewstep.core.objective import Batch, Loss, Objective
from fewstep.core.random import CounterRng
from fewstep.training.average import WeightAverage
from fewstep.training.checkpoint import Checkpoint, Checkpoints, load_tensors, pack, tensors_of, unpack
from fewstep.training.health import Diverged, Watch
from fewstep.training.interrupt import Interrupt
from fewstep.training.log import Bar, Log, duration
from fewstep.training.meter import Measured, Meter, mean
from fewstep.training.plan import Plan, Used


class Data(Protocol):
    """Training batches as a pure function of their number, so that the position in the data is the step."""

    def batch(self, step: int) -> Batch: ...


@final
@dataclass(frozen=True, slots=True)
class Validation:
    """Held-out `batches`, iterated anew at each validation.

    With `bytes_per_token`, the metric `next_token` (nats per token; the loss where the objective has no such metric) is reported
    as bits per byte too.
    """

    batches: Iterable[Batch]
    bytes_per_token: float | None = None


@runtime_checkable
class Recomputes(Protocol):
    """A model that can recompute activations in the backward pass instead of keeping them (activation checkpointing)."""

    recompute: bool


@final
@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended: what it used, the last training loss, the last validation, fp16 steps skipped, the last checkpoint."""

    used: Used
    loss: float
    validation: Mapping[str, float]
    skipped: int
    checkpoint: Path
    interrupted: bool


@final
class Trainer:
    """Trains `model` on `objective` over `data` as `plan` says, inside the run folder `directory`.

    The model is on its device already. `extra` holds text files by name (recipe, tokenizer) that every checkpoint stores beside
    the weights. A killed and resumed run ends bit-identical to an uninterrupted one: draws depend on the seed and the sample's
    number only, batches on the step only, and a checkpoint holds the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: Data,
        plan: Plan,
        directory: Path,
        *,
        validation: Validation | None = None,
        extra: Mapping[str, str] | None = None,
        console: Console | None = None,
    ) -> None:
        run = plan.run
        self._model, self._objective, self._data, self._plan, self._directory = model, objective, data, plan, directory
        self._validation, self._extra, self._console = validation, extra or {}, console or Console(stderr=True)
        self._device = next(model.parameters()).device
        self._optimizers = plan.optim.build(model)
        self._scale = plan.precision.scale()
        self._average = WeightAverage(model, run.ema) if run.ema else None
        self._watch = Watch(run.divergence)
        self._rng = CounterRng.seeded([run.seed], self._device)
        self._checkpoints = Checkpoints(directory / "checkpoints", run.keep)
        self._used, self._skipped = Used(), 0
        self._validated: Mapping[str, float] = {}
        if run.recompute:
            if not isinstance(model, Recomputes):
                raise ValueError(f"run.recompute=True: {type(model).__name__} cannot recompute its activations; set it to false")
            model.recompute = True
        if run.compile:
            if plan.precision.emulated(self._device):
                raise ValueError(
                    f"run.compile=True: cannot trace precision={plan.precision.kind}, emulated on this CPU; use fp32"
                )
            model.compile()

    def run(self, resume: bool = False) -> Summary:
        """Train until the budget is used or a signal asks to stop; the state is saved in both cases.

        Raises ValueError when the folder holds a run and `resume` is off, or when the disk is full; Diverged when the loss is no
        number or rises for good. The last checkpoint is kept in every case.
        """
        self._restore(resume)
        threads = torch.get_num_threads()
        if self._plan.run.threads:
            torch.set_num_threads(self._plan.run.threads)
        log, bar = Log(self._directory, self._used.steps), Bar(self._console)
        try:
            with bar, Interrupt() as interrupt, torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
                return self._loop(log, bar, interrupt)
        except Diverged as error:
            log.notice(self._used.steps, str(error))
            raise Diverged(f"{error}; checkpoints kept: {', '.join(map(str, self._checkpoints.steps())) or 'none yet'}") from None
        finally:
            log.close()
            torch.set_num_threads(threads)

    def _loop(self, log: Log, bar: Bar, interrupt: Interrupt) -> Summary:
        run, budget, precision = self._plan.run, self._plan.budget, self._plan.precision
        if precision.emulated(self._device):
            self._say(log, f"precision={precision.kind}: no such arithmetic on this CPU; matmuls round to it and sum in fp32")
        start = logged = saved = self._used
        origin = time.perf_counter() - start.seconds
        meter, loss = Meter(), math.nan
        self._model.train()
        while (progress := budget.progress(self._used)) < 1 and not interrupt.requested:
            measured = self._step(progress)
            meter.add(measured)
            tokens, step = self._used.tokens + measured.tokens, self._used.steps + 1
            self._used = Used(step, tokens, time.perf_counter() - origin)
            if step % run.log_every == 0:
                loss = self._report(log, bar, meter, measured, self._used.seconds - logged.seconds)
                meter, logged = Meter(), self._used
            if run.validate_every and step % run.validate_every == 0:
                self._validate(log)
            by_steps = run.checkpoint_steps and step % run.checkpoint_steps == 0
            by_clock = 0 < run.checkpoint_seconds <= self._used.seconds - saved.seconds
            if (by_steps or by_clock) and self._watch.healthy and budget.progress(self._used) < 1:
                self._save()
                saved = self._used
        if self._used != start:
            if run.validate_every and self._used.steps % run.validate_every and not interrupt.requested:
                self._validate(log)
            if self._used != saved:
                self._save()
        path = self._checkpoints.path(self._used.steps)
        if interrupt.requested:
            self._say(log, f"stopped after step {self._used.steps}, saved in {path}; resume the run to go on")
        loss = meter.means()["loss"] if meter.units else loss
        return Summary(self._used, loss, self._validated, self._skipped, path, interrupt.requested)

    def _step(self, progress: float) -> Measured:
        step, accumulate = self._used.steps, self._plan.run.accumulate
        losses: list[Loss] = []
        tokens = 0
        for index in range(step * accumulate, (step + 1) * accumulate):
            batch = _moved(self._data.batch(index), self._device)
            tokens += batch.tokens.numel()
            losses += self._backward(batch, index, losses)
        if not losses:
            raise ValueError(f"step {step}: batch has nothing to score; check the segments of the data and the objective")
        units = sum(loss.units for loss in losses)
        value, metrics = mean(losses)
        norm = self._rescale(losses[0].units / units / self._scale_value)
        value_now, norm_now = torch.stack([value, norm.float()]).tolist()  # the one wait for the device in a step
        self._watch.observe(step, value_now)
        factor = self._plan.schedule.factor(step, progress)
        if self._usable(step, norm_now):
            self._update(step, factor, norm_now)
        self._optimizers.zero_grad()
        return Measured(value_now, units, metrics, tokens, norm_now, factor)

    @property
    def _scale_value(self) -> float:
        return self._scale.value if self._scale else 1.0

    def _backward(self, batch: Batch, index: int, earlier: list[Loss]) -> list[Loss]:
        """Add the gradients of a micro-batch, in proportion to its units; the loss, or nothing if it has nothing to score."""
        loss = self._loss(batch, index, "train")
        if not loss.units:
            return []
        first = earlier[0] if earlier else loss
        weight = self._scale_value * loss.units / first.units
        with self._plan.precision.backward(self._device):
            (loss.value if weight == 1 else loss.value * weight).backward()
        return [Loss(loss.value.detach(), loss.units, loss.metrics)]

    def _loss(self, batch: Batch, index: int, stream: str) -> Loss:
        rows = batch.tokens.shape[0]
        sample = torch.arange(rows, device=self._device) + index * rows
        rng = self._rng.split(stream).fork(torch.zeros_like(sample)).at(sample)
        _seed_torch(hash((self._plan.run.seed, index)), self._device)
        with self._plan.precision.context(self._device):
            return self._objective.loss(self._model, batch, rng)

    def _rescale(self, factor: float) -> Tensor:
        """Bring the gradients to their true size; their norm."""
        grads = self._optimizers.gradients()
        if factor != 1:
            torch._foreach_mul_(grads, factor)
        return torch.nn.utils.get_total_norm(grads)

    def _usable(self, step: int, norm: float) -> bool:
        overflow = not math.isfinite(norm)
        if self._scale is None and overflow:
            raise Diverged(f"step {step}: gradient norm={norm}: not a number the optimizer can use; resume with a lower optim.lr")
        if self._scale is not None:
            self._scale.update(overflow)
            if self._scale.value < _SMALLEST_SCALE:
                raise Diverged(
                    f"step {step}: loss scale={self._scale.value:.3g}: fp16 gradients overflow at any; use precision=bf16"
                )
        self._skipped += overflow
        return not overflow

    def _update(self, step: int, factor: float, norm: float) -> None:
        clip = self._plan.run.clip
        if clip and norm > clip:
            torch._foreach_mul_(self._optimizers.gradients(), clip / norm)
        self._optimizers.step(factor)
        self._objective.after_step(self._model)
        if self._average:
            self._average.update(step)

    def _report(self, log: Log, bar: Bar, meter: Meter, last: Measured, seconds: float) -> float:
        used, means = self._used, meter.means()
        rate = meter.tokens / max(seconds, 1e-9)
        scale = {"loss_scale": self._scale.value, "skipped": float(self._skipped)} if self._scale else {}
        spent = {"tokens": float(used.tokens), "seconds": used.seconds, "tokens_per_second": rate}
        optim = {"grad_norm": last.norm, "lr": self._plan.optim.lr * last.factor}
        log.write(used.steps, "train", {**means, **optim, **scale, **spent})
        progress = self._plan.budget.progress(used)
        left = duration(used.seconds * (1 - progress) / progress)
        bar.update(used.steps, progress, f"loss {means['loss']:.4f}  {rate:,.0f} tokens/s  {left} left")
        return means["loss"]

    def _validate(self, log: Log) -> None:
        if self._validation is None:
            return
        self._model.eval()
        meter = Meter()
        with self._average.applied() if self._average else nullcontext(), torch.no_grad():
            for index, batch in enumerate(self._validation.batches):
                loss = self._loss(_moved(batch, self._device), index, "validation")
                if loss.units:
                    meter.add(Measured(float(loss.value), loss.units, loss.metrics))
        self._model.train()
        if not meter.units:
            raise ValueError("validation: no batch has anything to score; give it held-out data or set run.validate_every=0")
        metrics = meter.means()
        if self._validation.bytes_per_token:
            nats = metrics.get("next_token", metrics["loss"])
            metrics["bits_per_byte"] = nats / math.log(2) / self._validation.bytes_per_token
        log.write(self._used.steps, "validation", metrics)
        self._validated = metrics
        self._objective.validated(metrics)

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {f"optim.{key}": value for key, value in self._optimizers.state().items()}
        weights = tensors_of(self._model)
        if self._average:
            tensors |= {f"model.{name}": value for name, value in weights.items()}
            weights = self._average.tensors()
        state = {
            "tokens": self._used.tokens,
            "seconds": self._used.seconds,
            "skipped": self._skipped,
            "validated": self._validated,
            "watch": self._watch.state_dict(),
            "scale": self._scale.state_dict() if self._scale else None,
            "objective": pack(self._objective.state_dict(), tensors, "objective"),
        }
        self._checkpoints.write(Checkpoint(self._used.steps, weights, tensors, state), self._extra)

    def _restore(self, resume: bool) -> None:
        if not resume:
            if self._checkpoints.steps():
                raise ValueError(
                    f"directory={str(self._directory)!r}: holds a run already; resume it or choose another directory"
                )
            return
        found = self._checkpoints.latest(self._print)
        if found is None:
            self._print(f"directory={str(self._directory)!r}: no checkpoint to resume from; starting at step 0")
            return
        state, tensors = found.state, found.tensors
        raw = _under("model.", tensors)
        load_tensors(self._model, raw or found.weights)
        if self._average:
            self._average.load(found.weights)
        self._optimizers.load(_under("optim.", tensors))
        if self._scale and state["scale"]:
            self._scale.load_state_dict(state["scale"])
        self._watch.load_state_dict(state["watch"])
        self._objective.load_state_dict(unpack(state["objective"], tensors))
        self._used = Used(found.step, state["tokens"], state["seconds"])
        self._skipped, self._validated = state["skipped"], state["validated"]

    def _say(self, log: Log, text: str) -> None:
        self._print(text)
        log.notice(self._used.steps, text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


_SMALLEST_SCALE = 2.0**-14  # smaller than any that ordinary gradients need


def _seed_torch(seed: int, device: torch.device) -> None:
    """For layers that draw from torch's own generators, such as dropout."""
    seed &= (1 << 63) - 1
    torch.default_generator.manual_seed(seed)  # torch.manual_seed keeps a stack trace per call where CUDA is not initialised
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _moved(batch: Batch, device: torch.device) -> Batch:
    segments = None if batch.segments is None else batch.segments.to(device)
    return Batch(batch.tokens.to(device), segments, {name: value.to(device) for name, value in batch.extra.items()})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
