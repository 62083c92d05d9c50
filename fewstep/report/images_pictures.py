"""The pictures of `race images`: what was sampled, and the way from noise to it, as PNG. This file knows grounds by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, final

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fewstep.decode.arrays import SampleConfig
from fewstep.models.denoiser import Denoiser
from fewstep.report.images_methods import GROUNDS, SIGMA_DATA
from fewstep.report.pictures import write_sheet

_SIDE, _FINER = 180, 3  # pixels of a picture of points, and drawn a side for each
_CELLS = 90  # squares a side whose points are counted
_SHEET, _STRIPS, _PLACES = 36, 6, 8  # images shown, ways of images shown, and places of a way
_LINE, _START, _END, _INK = (90, 110, 130, 110), (200, 120, 40, 255), (10, 125, 95, 255), (20, 60, 110)


@final
class Way:
    """Where some rows were at each place of the grid, in units of data: x_t shrunk to the size that x_0 has."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.places: list[Tensor] = []

    def follow(self, arrived: Sequence[Tensor], model: Denoiser, config: SampleConfig) -> None:
        """Take down where a sampling arrived, step by step."""
        process = model.process
        grid = cast(Any, config.grid).build(process, config.steps)
        for t, x in zip(grid, arrived, strict=True):
            size = float(torch.hypot(process.alpha(t), process.sigma(t) / SIGMA_DATA))
            self.places.append(model.unnormed(x[: self._rows] / size))


def draw(path: Path, x: Tensor, way: Way | None, ground: str) -> None:
    """Write PATH.png with samples x [N,*shape] and, where there is a `way`, PATH-way.png."""
    place = GROUNDS[ground]
    path.parent.mkdir(parents=True, exist_ok=True)
    if place.levels:
        write_sheet(x[:_SHEET], path.with_name(f"{path.name}.png"), 0, place.levels - 1, zoom=3)
        if way is not None and way.places:
            steps = torch.linspace(0, len(way.places) - 1, min(_PLACES, len(way.places))).round().long().tolist()
            strips = torch.stack([way.places[i][:_STRIPS] for i in steps], 1).flatten(0, 1)
            write_sheet(strips, path.with_name(f"{path.name}-way.png"), 0, place.levels - 1, zoom=2, columns=len(steps))
        return
    _density(x, place.view).save(path.with_name(f"{path.name}.png"), optimize=True)
    if way is not None and way.places:
        _ways(torch.stack(way.places, 1), place.view).save(path.with_name(f"{path.name}-way.png"), optimize=True)


def _density(x: Tensor, reach: float) -> Image.Image:
    """How many of the points [N,2] lie in each square of [-reach, reach]^2, darker where more do."""
    inside = x[(x.abs() < reach).all(1)]
    index = ((inside + reach) / (2 * reach) * _CELLS).long().clamp(0, _CELLS - 1)
    counts = torch.bincount((_CELLS - 1 - index[:, 1]) * _CELLS + index[:, 0], minlength=_CELLS**2).view(_CELLS, _CELLS).double()
    shade = (counts / counts.max().clamp(min=1)).sqrt().unsqueeze(2)
    ink = torch.tensor(_INK, dtype=torch.float64)
    pixels = (255 - shade * (255 - ink)).round().to(torch.uint8)
    picture = Image.fromarray(pixels.numpy()).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    return picture.quantize(32)


def _ways(places: Tensor, reach: float) -> Image.Image:
    """The ways [N,K+1,2] as lines from orange to green ends."""
    side = _SIDE * _FINER
    picture = Image.new("RGB", (side, side), "white")
    canvas = ImageDraw.Draw(picture, "RGBA")
    pixels = (torch.stack([places[..., 0] + reach, reach - places[..., 1]], -1) / (2 * reach) * side).tolist()
    for way in pixels:
        canvas.line([tuple(point) for point in way], fill=_LINE, width=_FINER)
    for end, colour in ((0, _START), (-1, _END)):
        for way in pixels:
            x, y = way[end]
            canvas.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
    return picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS).quantize(32)
