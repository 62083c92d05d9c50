"""Images to learn from: folders with all that goes wrong in them, drawn characters and shapes, and how they become batches."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch import Tensor

from fewstep.core.recipe import parse
from fewstep.training.data.arrays import Content, DigitsConfig, Table
from fewstep.training.data.drawings import SHAPES, GlyphsConfig, ShapesConfig
from fewstep.training.data.images import ImagesConfig, read_image


def paint(path: Path, pixels: Any, mode: str | None = None, **saved: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, dtype=saved.pop("dtype", np.uint8)))
    (image.convert(mode) if mode else image).save(path, **saved)
    return path


def folder(tmp_path: Path, count: int = 6) -> Path:
    """Two classes of grey squares, all different."""
    for i in range(count):
        paint(tmp_path / ("ants", "bees")[i % 2] / f"{i}.png", np.full((5, 5), 10 * i))
    return tmp_path


def whole(table: Table) -> tuple[Tensor, Tensor]:
    parts = [table.rows(part).extra for part in ("train", "validation")]
    return torch.cat([part["x"] for part in parts]), torch.cat([part.get("c", torch.zeros(0)) for part in parts])


def test_a_folder_becomes_images_of_its_classes(tmp_path: Path) -> None:
    table = ImagesConfig(folder=folder(tmp_path), size=4, classes=True, held_out=0.5).build()
    x, c = whole(table)
    assert (table.shape, table.context) == ((3, 4, 4), 2) and x.dtype == torch.float32
    level = x[:, 0, 0, 0]
    assert sorted(level.tolist()) == [0, 10, 20, 30, 40, 50] and torch.equal(x, level.view(-1, 1, 1, 1).expand_as(x))
    assert torch.equal(c.argmax(1), (level / 10 % 2).long())
    assert ImagesConfig(folder=tmp_path, colour=False, held_out=0.5).build().shape == (1, 32, 32)


def test_broken_files_are_named_and_counted_and_training_goes_on(tmp_path: Path) -> None:
    folder(tmp_path)
    good = paint(tmp_path / "bees" / "big.png", np.random.default_rng(0).integers(0, 255, (40, 40)))
    (tmp_path / "bees" / "cut.png").write_bytes(good.read_bytes()[:900])
    (tmp_path / "ants" / "text.jpg").write_text("no image")
    (tmp_path / "ants" / "none.gif").write_bytes(b"")
    (tmp_path / "ants" / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "ants" / "notes.txt").write_text("not looked at")
    with pytest.warns(RuntimeWarning, match=r"4 of 11 images cannot be read and are left out: ") as told:
        table = ImagesConfig(folder=tmp_path, size=4, classes=True, held_out=0.5).build()
    message = str(told[0].message)
    assert all(name in message for name in ("cut.png", "text.jpg", "none.gif", "page.png")) and "\n" not in message
    assert len(whole(table)[0]) == 7 and len(table.train(2, 0).batch(5).tokens) == 2
    for i in range(20):
        (tmp_path / f"{i}.webp").write_text("")
    with pytest.warns(RuntimeWarning, match=r"24 of 31 images .*; and 16 more$"):
        ImagesConfig(folder=tmp_path, held_out=0.5).build()


@pytest.mark.parametrize(
    ("files", "fields", "told"),
    [
        (None, {}, r"no such folder; "),
        ({}, {}, r"no image in it; "),
        ({"a.txt": b"x"}, {}, r"no image in it; "),
        ({"a.png": b"x", "b/c.png": b"y"}, {}, r"none of its 2 images can be read: 'a\.png' \(.*; 'c\.png' \(.*; "),
    ],
)
def test_a_folder_without_images_is_refused(files: Any, fields: dict[str, Any], told: str, tmp_path: Path) -> None:
    place = tmp_path / "images"
    for name, content in (files or {}).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    if files is not None:
        place.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=rf"^data\.folder='.*images': {told}") as refusal:
        parse(ImagesConfig, {"folder": place, **fields}, "data").build()
    assert "\n" not in str(refusal.value)


def test_an_image_outside_all_classes_is_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    paint(folder(tmp_path) / "stray.png", np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"^data\.classes=true: '.*stray\.png' lies in no folder of its class; "):
        ImagesConfig(folder=tmp_path, classes=True).build()
    assert ImagesConfig(folder=tmp_path, held_out=0.5).build().context == 0


def test_every_kind_of_image_becomes_the_levels_it_shows(tmp_path: Path) -> None:
    deep = paint(tmp_path / "deep.png", np.full((4, 4), 257 * 200), dtype=np.uint16)
    clear = paint(tmp_path / "clear.png", np.dstack([np.zeros((4, 4, 3)), np.full((4, 4), 0)]), "RGBA")
    half = paint(tmp_path / "half.png", np.dstack([np.zeros((4, 4, 3)), np.full((4, 4), 128)]), "RGBA")
    table = paint(tmp_path / "table.gif", np.full((4, 4), 77), "P")
    for path, level in ((deep, 200), (clear, 255), (half, 127), (table, 77)):
        for colour in (True, False):
            levels = read_image(path, 4, colour)
            assert levels.shape == (3 if colour else 1, 4, 4) and (levels.int() - level).abs().max() <= 1, path
    frames = [Image.fromarray(np.full((4, 4), level, np.uint8)) for level in (10, 250)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "moving.gif", 4, False).int() - 10).abs().max() <= 1
    tags = Image.Exif()
    tags[0x0112] = 3  # upside down
    paint(tmp_path / "turned.png", [[0, 0], [255, 255]], exif=tags)
    assert read_image(tmp_path / "turned.png", 2, False)[0].tolist() == [[255, 255], [0, 0]]


def test_the_short_side_is_resized_and_the_middle_kept(tmp_path: Path) -> None:
    wide = np.zeros((8, 24))
    wide[:, 8:16] = 200
    for pixels in (wide, wide.T):
        assert (read_image(paint(tmp_path / "a.png", pixels), 4, False).int() - 200).abs().max() <= 40
    assert read_image(tmp_path / "a.png", 4, False).float().mean() > 190


def test_a_bomb_is_a_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"^'bomb\.png' \(.*pixels"):
        read_image(paint(tmp_path / "bomb.png", np.zeros((8, 8))), 4, False)


def rows(count: int) -> Tensor:
    return torch.arange(count * 6, dtype=torch.float32).view(count, 1, 2, 3)


def test_half_of_a_training_batch_is_mirrored_anew_and_no_other(seed: int) -> None:
    table = Table(Content(rows(400), flips=True), 0.2)
    straight = Table(Content(rows(400)), 0.2)
    count = len(straight.rows("train").tokens)
    first, again, later = (table.train(count, seed).batch(step).extra["x"] for step in (0, 0, 1))
    plain = straight.train(count, seed).batch(0).extra["x"]
    assert torch.equal(first, again)
    mirrored = (first == plain.flip(-1)).flatten(1).all(1)
    assert ((first == plain).flatten(1).all(1) ^ mirrored).all()
    assert abs(float(mirrored.double().mean()) - 0.5) < 5 * 0.5 / count**0.5
    numbers = {float(x.sum()): bool(x[0, 0, 0] > x[0, 0, 2]) for x in first}
    assert any(numbers[float(x.sum())] != bool(x[0, 0, 0] > x[0, 0, 2]) for x in later), "not the same ones again"
    for one, other in zip(table.validation(50), straight.validation(50), strict=True):
        assert torch.equal(one.extra["x"], other.extra["x"])


def test_noise_fills_a_level_and_is_the_same_for_the_same_batch(seed: int) -> None:
    table, plain = (Table(Content(rows(300), dequantised=noisy), 0.2) for noisy in (True, False))
    one, two = (table.train(64, seed).batch(3).extra["x"] for _ in range(2))
    noise = one - plain.train(64, seed).batch(3).extra["x"]
    assert torch.equal(one, two) and noise.min() >= 0 and noise.max() <= 1 + 1e-3 and noise.std() > 0.2
    held_out = [torch.cat([batch.extra["x"] for batch in table.validation(size)]) for size in (7, 300)]
    assert torch.equal(*held_out)
    assert torch.equal(table.rows("train").extra["x"], plain.rows("train").extra["x"]), "the rows themselves stay whole"


@pytest.mark.parametrize("config", [GlyphsConfig, ShapesConfig])
def test_drawings_follow_their_seed_and_fill_their_classes(config: Any) -> None:
    table = config(count=200, size=8, classes=True, held_out=0.3).build()
    x, c = whole(table)
    names = len(SHAPES) if config is ShapesConfig else 10
    assert x.shape == (200, 1, 8, 8) and c.shape == (200, names) and bool((c.sum(0) > 0).all())
    assert x.min() >= 0 and 200 < x.max() <= 255 and bool((x.flatten(1).amax(1) > 60).all()), "nothing is blank"
    assert len(x.flatten(1).unique(dim=0)) > 190
    assert torch.equal(whole(config(count=200, size=8, held_out=0.3).build())[0], x)
    assert not torch.equal(whole(config(count=200, size=8, held_out=0.3, seed=1).build())[0][:20], x[:20])


def test_a_shape_has_its_area(seed: int) -> None:
    """Seen closely enough, the share of white pixels is that of the figure."""
    config = ShapesConfig(count=60, size=64, classes=True, held_out=0.2, seed=seed % 1000)
    table = config.build()
    x, c = whole(table)
    rng = config.rng()
    radius = (0.3 + 0.3 * rng.split("radius").uniform()).float()
    area = x.mean((1, 2, 3)) / 255 * 4
    order = torch.cat([table.rows(part).tokens[:, 0] for part in ("train", "validation")])
    found = area / radius[order] ** 2
    expected = torch.tensor([torch.pi, 2.0, 1.5 * 3**0.5 / 2, 20 / 9])[c.argmax(1)]
    torch.testing.assert_close(found, expected, rtol=0.06, atol=0)


def test_colours_are_each_images_own() -> None:
    x, _ = whole(ShapesConfig(count=50, colour=True, held_out=0.3).build())
    assert x.shape == (50, 3, 16, 16)
    assert len(x.amax((2, 3)).unique(dim=0)) > 45


def test_fonts_by_path_and_characters_they_lack(tmp_path: Path) -> None:
    own = ImageFont.load_default(10)
    assert isinstance(own, ImageFont.FreeTypeFont)
    path = tmp_path / "own.ttf"
    path.write_bytes(own.font_bytes if isinstance(own.font_bytes, bytes) else own.path.getvalue())  # type: ignore[union-attr]
    fields = {"count": 40, "size": 8, "held_out": 0.3}
    by_path, bundled = (whole(GlyphsConfig(**fields, fonts=fonts).build())[0] for fonts in ((path,), ()))
    assert torch.equal(by_path, bundled)
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    for given, told in (
        ({"fonts": (tmp_path / "bad.ttf",)}, r"^data\.fonts='.*bad\.ttf': no readable font \("),
        ({"fonts": (tmp_path / "none.ttf",)}, r"^data\.fonts='.*none\.ttf': no readable font \("),
        ({"characters": "a\u0f40"}, r"^data\.characters='\u0f40': Pillow's own font does not have it; "),
        ({"characters": "a b"}, r"^data\.characters='a b': must be one or more"),
        ({"characters": "aa"}, r"^data\.characters='aa': must be one or more"),
    ):
        with pytest.raises(ValueError, match=told) as refusal:
            parse(GlyphsConfig, {**fields, **given}, "data").build()
        assert "\n" not in str(refusal.value)


def test_digits_can_be_noised(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, noisy = (DigitsConfig(dequantised=each).build() for each in (False, True))
    one, two = (next(each.validation(20)) for each in (plain, noisy))
    assert torch.equal(one.tokens, two.tokens) and torch.equal(two.extra["x"].floor(), one.extra["x"])
    assert re.fullmatch(r"0\.\d+", f"{float((two.extra['x'] - one.extra['x']).std()):.3f}")
