"""Samples as files: a sheet of images as PNG, the way from noise to data as an animation, points as a scatter plot.

This file knows arrays only.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

_FRAME = 80  # milliseconds of a frame of an animation
_LAST = 1500  # and of the last one
_SIDE = 320  # pixels of an animation of points


def write_sheet(x: Tensor, path: Path, low: float, high: float, zoom: int = 4, columns: int = 0) -> None:
    """Images x [N,C,H,W] of one or three channels as a PNG; `low` is black, `high` white, `zoom` pixels a pixel.

    `columns` of them lie side by side (0: as many as make a square). Raises ValueError for what is no image, or a file that
    cannot be written.
    """
    _save([_sheet(x, low, high, zoom, columns)], path)


def write_animation(frames: Sequence[Tensor], path: Path, low: float, high: float, zoom: int = 4) -> None:
    """Frames of images [N,C,H,W], the last one longer than the others, as a GIF or WebP by the name of `path`.

    Raises as `write_sheet`.
    """
    _moving(path, len(frames))
    _save([_sheet(frame, low, high, zoom) for frame in frames], path)


def write_moving_points(frames: Sequence[Tensor], path: Path, reach: float) -> None:
    """Frames of points [N,2] of [-reach, reach]^2 in the same way."""
    _moving(path, len(frames))
    _save([_dots(frame, reach) for frame in frames], path)


def write_points(x: Tensor, path: Path, reach: float | None = None) -> None:
    """Points x [N,2] as a scatter plot of [-reach, reach]^2 (None: all of them), PNG or SVG by the name of `path`."""
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected points [N,2] of a plane")
    figure = Figure(figsize=(4, 4))
    axes = figure.add_subplot(aspect="equal")
    axes.scatter(x[:, 0].tolist(), x[:, 1].tolist(), s=2, linewidths=0, alpha=0.5)
    if reach is not None:
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise _unwritten(path, error) from None


def _moving(path: Path, count: int) -> None:
    if not count or path.suffix.lower() not in (".gif", ".webp"):
        raise ValueError(f"path={str(path)!r}, {count} frames: an animation has at least one and ends in .gif or .webp")


def _dots(x: Tensor, reach: float) -> Image.Image:
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected points [N,2] of a plane")
    picture = Image.new("L", (_SIDE, _SIDE), 255)
    canvas = ImageDraw.Draw(picture)
    across, up = ((x.double().cpu() / reach).clamp(-2, 2) + 1).mul(_SIDE / 2).unbind(1)
    for column, row in zip(across.tolist(), (_SIDE - up).tolist(), strict=True):
        canvas.ellipse((column - 1, row - 1, column + 1, row + 1), fill=0)
    return picture


def _sheet(x: Tensor, low: float, high: float, zoom: int, columns: int = 0) -> Image.Image:
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"x: shape {tuple(x.shape)}, expected images [N,C,H,W] of one or three channels")
    count, channels, height, width = x.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    levels = ((x.float().cpu() - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
    sheet = torch.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 127, dtype=torch.uint8)
    for i, image in enumerate(levels):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    pixels = sheet.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
    made = Image.fromarray(pixels)
    return made.resize((made.width * zoom, made.height * zoom), Image.Resampling.NEAREST)


def _save(frames: Sequence[Image.Image], path: Path) -> None:
    first, *others = frames
    moving: dict[str, Any] = {}
    if others:
        moving = {"save_all": True, "append_images": others, "loop": 0, "duration": [*[_FRAME] * len(others), _LAST]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        first.save(path, **moving)
    except (OSError, ValueError) as error:
        raise _unwritten(path, error) from None


def _unwritten(path: Path, error: Exception) -> ValueError:
    return ValueError(f"path={str(path)!r}: cannot be written ({error}); choose another place or ending")
