"""Images of any folder, brought to one size: the short side resized, the middle kept.

A file that cannot be read is left out, named and counted in a notice. This file knows no model and no objective.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from fewstep.training.data.arrays import ArraysConfig, Content, Table, one_hot

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none that Pillow hands to another program
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_NAMED = 8  # broken files that a notice names
_DEEP = 257  # 16-bit levels of an 8-bit one


class PicturesConfig(ArraysConfig):
    """What images that become a table share. x [B,C,H,W] holds the levels 0 .. 255.

    `classes`: c [B,K] names the class. `flips`: half of a training batch is mirrored left to right, anew each time.
    `dequantised`: uniform noise on [0, 1) is added to the levels, for models of real numbers.
    """

    classes: bool = False
    flips: bool = False
    dequantised: bool = False
    held_out: float = Field(default=0.1, gt=0, lt=1)

    def table(self, x: Tensor, labels: Tensor, count: int) -> Table:
        """Images x [N,C,H,W] of the classes `labels` [N] < `count`, as the fields ask."""
        return Table(Content(x, one_hot(labels, count) if self.classes else None, self.flips, self.dequantised), self.held_out)


@final
class ImagesConfig(PicturesConfig):
    """The images of `folder` and of the folders in it, `size` pixels a side, in colour or grey.

    The class of an image is the first folder on its way. Transparent pixels lie on white, animations count by their first frame,
    and a photograph is turned as its camera says. Cost: size^2 bytes of memory a channel and image. Raises ValueError for a
    folder without a readable image, and for an image outside all classes where these are asked for.
    """

    kind: ClassVar[str] = "images"

    folder: Path = Field(default=Path("images"), description="the folder")
    size: int = Field(default=32, ge=1)
    colour: bool = True

    def build(self) -> Table:
        place = f"data.folder={str(self.folder)!r}"
        if not self.folder.is_dir():
            raise ValueError(f"{place}: no such folder; give one that holds images")
        paths = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not paths:
            raise ValueError(f"{place}: no image in it; give a folder of {', '.join(SUFFIXES)}")
        images, kept, broken = list[Tensor](), list[Path](), list[str]()
        for path in paths:
            try:
                images.append(read_image(path, self.size, self.colour))
                kept.append(path)
            except ValueError as error:
                broken.append(str(error))
        if broken:
            told = "; ".join(broken[:_NAMED]) + (f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else "")
            if not kept:
                raise ValueError(f"{place}: none of its {len(paths)} images can be read: {told}; give others")
            warnings.warn(
                f"{place}: {len(broken)} of {len(paths)} images cannot be read and are left out: {told}",
                RuntimeWarning,
                stacklevel=2,
            )
        names = self._classes(kept) if self.classes else [""] * len(kept)
        known = sorted(set(names))
        return self.table(torch.stack(images), torch.tensor([known.index(name) for name in names]), len(known))

    def _classes(self, paths: Sequence[Path]) -> list[str]:
        parts = [path.relative_to(self.folder).parts for path in paths]
        stray = next((path for path, part in zip(paths, parts, strict=True) if len(part) < 2), None)
        if stray is not None:
            raise ValueError(f"data.classes=true: {str(stray)!r} lies in no folder of its class; move it, or set classes=false")
        return [part[0] for part in parts]


def read_image(path: Path, size: int, colour: bool) -> Tensor:
    """The image [3 or 1,size,size] uint8 at `path`. Raises ValueError naming the file where it is none, or damaged."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            flat = _flattened(ImageOps.exif_transpose(file))
            fitted = ImageOps.fit(flat.convert("RGB" if colour else "L"), (size, size), Image.Resampling.BICUBIC)
    except Exception as error:  # a decoder may raise anything where its file is damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path.name!r} ({reason.replace(str(path), path.name)})") from None
    return torch.from_numpy(np.array(fitted).reshape(size, size, -1)).permute(2, 0, 1).contiguous()


def _flattened(image: Image.Image) -> Image.Image:
    """Without transparency, eight bits a channel."""
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion cuts off what exceeds 255
        levels = np.asarray(image)
        if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() >= 1 << 16:
            raise ValueError(f"mode {image.mode} with levels outside 16 bits")
        return Image.fromarray((levels // _DEEP).astype(np.uint8))
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    clear = image.convert("RGBA")
    white = Image.new("RGBA", clear.size, "white")
    return Image.alpha_composite(white, clear).convert("RGB")
