"""Samples as files: what a reader of the file sees, and what is refused."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.report.pictures import write_animation, write_moving_points, write_points, write_sheet


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_holds_every_image_in_its_place(channels: int, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.rand(5, channels, 4, 6) * 3 - 1
    write_sheet(x, tmp_path / "deep" / "sheet.png", -1, 2, zoom=2)
    with Image.open(tmp_path / "deep" / "sheet.png") as image:
        assert image.size == (2 * (3 * 7 - 1), 2 * (2 * 5 - 1))
        for i in range(5):
            for row, column in ((0, 0), (3, 5), (1, 2)):
                seen = image.getpixel((2 * (i % 3 * 7 + column), 2 * (i // 3 * 5 + row)))
                told = ((x[i, :, row, column] + 1) / 3 * 255).round().int().tolist()
                assert seen == (told[0] if channels == 1 else tuple(told))


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_an_animation_has_every_frame(ending: str, tmp_path: Path) -> None:
    frames = [torch.full((4, 1, 8, 8), level) for level in (0.0, 0.5, 1.0)]
    write_animation(frames, tmp_path / f"a.{ending}", 0, 1)
    with Image.open(tmp_path / f"a.{ending}") as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
        for frame, level in enumerate((0, 128, 255)):
            image.seek(frame)
            assert abs(int(image.convert("L").getpixel((1, 1))) - level) <= 2  # type: ignore[arg-type]


def test_a_sheet_has_as_many_columns_as_asked_for(tmp_path: Path) -> None:
    write_sheet(torch.zeros(6, 1, 4, 4), tmp_path / "sheet.png", 0, 1, zoom=1, columns=6)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (6 * 5 - 1, 4)


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_points_move_where_they_are(ending: str, tmp_path: Path) -> None:
    places = ((-0.5, -0.5), (0.5, 0.5), (0.0, 40.0))
    write_moving_points([torch.tensor([place]) for place in places], tmp_path / f"a.{ending}", reach=1.0)
    with Image.open(tmp_path / f"a.{ending}") as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
        for frame, (x, y) in enumerate(places[:2]):
            image.seek(frame)
            grey = image.convert("L")
            dark = [(c, r) for c in range(grey.width) for r in range(grey.height) if int(grey.getpixel((c, r))) < 128]  # type: ignore[arg-type]
            assert dark
            assert all(abs(c - (x + 1) * grey.width / 2) < 3 and abs(r - (1 - y) * grey.height / 2) < 3 for c, r in dark)
    with pytest.raises(ValueError, match=r"^x: shape \(2, 3\), expected points"):
        write_moving_points([torch.zeros(2, 3)], tmp_path / "a.gif", 1.0)


def test_points_are_drawn(tmp_path: Path) -> None:
    write_points(torch.randn(10, 2), tmp_path / "p.png", reach=3.0)
    with Image.open(tmp_path / "p.png") as image:
        assert len(image.convert("RGB").getcolors(100_000) or []) > 2


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for x in (torch.zeros(2, 2), torch.zeros(1, 2, 4, 4)):
        with pytest.raises(ValueError, match=r"^x: shape [^\n]*$"):
            write_sheet(x, tmp_path / "a.png", 0, 1)
    with pytest.raises(ValueError, match=r"^x: shape [^\n]*$"):
        write_points(torch.zeros(3, 3), tmp_path / "a.png")
    for path in (tmp_path / "a.unknown", tmp_path / "file" / "a.png"):
        with pytest.raises(ValueError, match=r"^path=[^\n]*; [^\n]*$"):
            write_sheet(torch.zeros(1, 1, 2, 2), path, 0, 1)
    for frames, name in (([], "a.gif"), ([torch.zeros(1, 1, 2, 2)], "a.png")):
        with pytest.raises(ValueError, match=r"^path=[^\n]*$"):
            write_animation(frames, tmp_path / name, 0, 1)
