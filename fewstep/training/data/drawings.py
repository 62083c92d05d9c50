"""Images that are drawn and not found: characters of fonts, and plain shapes, each at a place, size and angle of its own.

The same seed draws the same images on every machine. This file knows no model and no objective.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, cast, final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from fewstep.core.random import CounterRng
from fewstep.training.data.arrays import Table
from fewstep.training.data.images import PicturesConfig

_FINER = 4  # pixels drawn a side of one that is kept
_NO_CHARACTER = "\U0010ffff"  # which no font has: what it draws stands for what is missing
_ROWS = 512  # drawn at once

Distance = Callable[[Tensor, Tensor], Tensor]  # (p [N,2,H,W], radius [N,1,1]) -> about how far outside [N,H,W], inside below 0


class DrawnConfig(PicturesConfig):
    """`count` images of `size` pixels a side, drawn from `seed`."""

    size: int = Field(default=16, ge=4)
    count: int = Field(default=4096, ge=2)
    seed: int = 0

    def rng(self) -> CounterRng:
        """A row of randomness for each image."""
        return CounterRng.seeded([self.seed]).fork(torch.zeros(self.count, dtype=torch.int64)).at(torch.arange(self.count))


@final
class GlyphsConfig(DrawnConfig):
    """Characters, white on black: of Pillow's own font, or of those at `fonts` (.ttf, .otf), all equally often.

    Each is turned by up to `turn` degrees, made smaller by up to a third and moved as far as it fits. Classes are the characters.
    Raises ValueError for a file that is no font, and a character that a font does not have.
    """

    kind: ClassVar[str] = "glyphs"

    characters: str = "0123456789"
    fonts: tuple[Path, ...] = ()
    turn: float = Field(default=15.0, ge=0, le=180)

    @field_validator("characters")
    @classmethod
    def _are_seen(cls, characters: str) -> str:
        if not characters or any(each.isspace() for each in characters) or len(set(characters)) < len(characters):
            raise ValueError(f"characters={characters!r}: must be one or more, each once, none of them blank; correct them")
        return characters

    def build(self) -> Table:
        fine, rng = _FINER * self.size, self.rng()
        fonts = [_font(path, fine) for path in self.fonts] or [_default(fine)]
        glyphs = torch.stack([_glyph(font, name, each, fine) for each in self.characters for name, font in fonts])
        chosen = (rng.split("glyph").uniform() * len(glyphs)).long()
        scale = 1 - rng.split("scale").uniform() / 3
        angle = (2 * rng.split("angle").uniform() - 1) * math.radians(self.turn)
        shift = (2 * rng.split("shift").uniform(2) - 1) * (1 - scale[:, None]) / 2
        cos, sin = angle.cos() / scale, angle.sin() / scale
        back = -torch.stack([cos * shift[:, 0] - sin * shift[:, 1], sin * shift[:, 0] + cos * shift[:, 1]], 1)
        maps = torch.stack([torch.stack([cos, -sin, back[:, 0]], 1), torch.stack([sin, cos, back[:, 1]], 1)], 1)
        drawn = []
        for rows in torch.arange(self.count).split(_ROWS):
            grid = affine_grid(maps[rows].float(), [len(rows), 1, fine, fine], align_corners=False)
            drawn.append(_levels(avg_pool2d(grid_sample(glyphs[chosen[rows]], grid, align_corners=False), _FINER)))
        return self.table(torch.cat(drawn), chosen // len(fonts), len(self.characters))


@final
class ShapesConfig(DrawnConfig):
    """Circles, squares, triangles and crosses at any angle on black: white, or each of a `colour` of its own. Classes: kinds."""

    kind: ClassVar[str] = "shapes"

    colour: bool = False

    def build(self) -> Table:
        rng = self.rng()
        kinds = (rng.split("kind").uniform() * len(SHAPES)).long()
        drawn = []
        for rows in torch.arange(self.count).split(_ROWS):
            some = rng.fork(rows)
            radius = 0.3 + 0.3 * some.split("radius").uniform().view(-1, 1, 1)
            centre = (2 * some.split("centre").uniform(2).view(-1, 2, 1, 1) - 1) * (1 - radius[:, None])
            angle = 2 * math.pi * some.split("angle").uniform()
            p = _turned(_pixels(self.size) - centre, angle)
            each = torch.stack([distance(p, radius) for distance in SHAPES.values()])[kinds[rows], torch.arange(len(rows))]
            covered = (0.5 - each * self.size / 2).clamp(0, 1).unsqueeze(1)
            paint = 0.25 + 0.75 * some.split("paint").uniform(3) if self.colour else covered.new_ones(len(rows), 1)
            drawn.append(_levels(covered * paint[:, :, None, None]))
        return self.table(torch.cat(drawn), kinds, len(SHAPES))


def _circle(p: Tensor, radius: Tensor) -> Tensor:
    return torch.linalg.vector_norm(p, dim=1) - radius


def _polygon(sides: int) -> Distance:
    """The regular polygon inside the circle of `radius`."""
    angles = torch.arange(sides, dtype=torch.float64) * (2 * math.pi / sides) + math.pi / 2
    normals = torch.stack([angles.cos(), angles.sin()], 1)

    def distance(p: Tensor, radius: Tensor) -> Tensor:
        return torch.einsum("kd,ndhw->nkhw", normals, p).amax(1) - radius * math.cos(math.pi / sides)

    return distance


def _cross(p: Tensor, radius: Tensor) -> Tensor:
    """Two bars, a third as wide as long."""
    x, y = p.abs().unbind(1)
    return torch.minimum(torch.maximum(x - radius, y - radius / 3), torch.maximum(y - radius, x - radius / 3))


SHAPES: Mapping[str, Distance] = MappingProxyType(
    {"circle": _circle, "square": _polygon(4), "triangle": _polygon(3), "cross": _cross}
)


def _pixels(size: int) -> Tensor:
    """[2,size,size]: x and y of the middles of the pixels of [-1, 1]^2."""
    middles = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 / size) - 1
    return torch.stack(torch.meshgrid(middles, middles, indexing="xy"))


def _turned(p: Tensor, angle: Tensor) -> Tensor:
    cos, sin, (x, y) = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1), p.unbind(1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], 1)


def _levels(shares: Tensor) -> Tensor:
    return (shares * 255).round().clamp(0, 255).to(torch.uint8)


def _default(size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ValueError("data='glyphs': this Pillow draws no outline fonts; install one with FreeType")
    return "Pillow's own font", font


def _font(path: Path, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    try:
        return repr(str(path)), ImageFont.truetype(path, size)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.fonts={str(path)!r}: no readable font ({error}); give a .ttf or .otf file") from None


def _glyph(font: ImageFont.FreeTypeFont, name: str, character: str, size: int) -> Tensor:
    """[1,size,size] float32 in [0, 1], in the middle and as large as fits."""
    missing, found = (font.getmask(each) for each in (_NO_CHARACTER, character))
    if not found.getbbox() or (found.size == missing.size and bytes(cast(list[int], found)) == bytes(cast(list[int], missing))):
        raise ValueError(f"data.characters={character!r}: {name} does not have it; leave it out or give another font")
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (size, size))
    place = ((size - right - left) / 2, (size - bottom - top) / 2)
    ImageDraw.Draw(image).text(place, character, fill=255, font=font)
    return torch.from_numpy(np.array(image)).float().unsqueeze(0) / 255
