"""Samples of a model of arrays, made and shown: the numbers, what they cost, and a picture. This file knows no solver by name."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.event import Event
from fewstep.decode.arrays import Samples, requested, sample
from fewstep.decode.denoise import Sampled
from fewstep.hub.arrays import load_arrays
from fewstep.models.denoiser import Denoiser
from fewstep.report.pictures import write_animation, write_moving_points, write_points, write_sheet

_DRAWN = 256  # samples in a sheet or an animation of images


def sample_here(
    source: str | Path, fields: Mapping[str, object], out: Path, console: Console | None = None, animation: str = "gif"
) -> Samples:
    """Sample the model at `source` into the folder `out`: samples.safetensors, samples.json and a picture, where x can be one.

    `fields` of a `SampleConfig`; what they leave out is as the model's kind is best sampled.
    A denoiser's way from noise to data, that of its first batch, becomes an `animation`, gif or webp. Raises ValueError for a
    model, request or folder that will not do.
    """
    if animation not in ("gif", "webp"):
        raise ValueError(f"animation={animation!r}: must be 'gif' or 'webp'; choose one")
    console, model, frames = console or Console(), load_arrays(source), list[Tensor]()
    config = requested(model, fields)

    def watch(event: Event[Sampled]) -> None:
        if len(frames) <= config.steps and isinstance(model, Denoiser):
            frames.append(model.unnormed(event.payload.x))

    made = sample(model, config, watch)
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file({"x": made.x.contiguous()}, out / "samples.safetensors")
        told = {"model": str(source), "setting": config.model_dump(mode="json"), "cost": made.cost.as_dict()}
        (out / "samples.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"out={str(out)!r}: cannot be written ({error}); choose another folder") from None
    pictures = _draw(made.x, frames, out, animation)
    calls, seconds = made.cost.calls / len(made.x), made.cost.seconds
    shape = tuple(made.x.shape[1:])
    console.print(f"{len(made.x)} samples of {shape}: {calls:g} calls each, {seconds:.2f} s in all", soft_wrap=True)
    console.print(", ".join(map(str, [out / "samples.safetensors", *pictures])), soft_wrap=True)
    return made


def _draw(x: Tensor, frames: list[Tensor], out: Path, animation: str) -> list[Path]:
    """The pictures that x can be: points of a plane, or images whose levels span what was sampled."""
    still, moving = out / "samples.png", out / f"samples.{animation}"
    if x.ndim == 2 and x.shape[1] == 2:
        write_points(x, still)
        if frames:
            write_moving_points(frames, moving, 1.1 * _edges(x.abs())[1])
    elif x.ndim == 4 and x.shape[1] in (1, 3):
        drawn = x[:_DRAWN]
        low, high = _edges(drawn)
        write_sheet(drawn, still, low, high)
        if frames:
            write_animation([frame[:_DRAWN] for frame in frames], moving, low, high)
    else:
        return []
    return [still, moving] if frames else [still]


def _edges(x: Tensor) -> tuple[float, float]:
    """Between them lie all but one in a hundred of the numbers of x."""
    some = x.flatten()[:: max(1, x.numel() >> 20)]
    low, high = some.quantile(torch.tensor([0.005, 0.995], dtype=x.dtype)).tolist()
    return low, max(high, low + 1e-6)
