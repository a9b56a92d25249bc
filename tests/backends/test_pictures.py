"""Pictures that are read in: every form, and what is refused of each."""

from __future__ import annotations

import contextlib
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from backends.pipeline import pictures
from backends.pipeline.pictures import Picture, read_pictures
from core.errors import PreconditionError

SIDE = 64
ORIENTATION = 0x0112


def drawing(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A picture whose every quarter has a colour of its own: turning or mirroring shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (90, 90, 90)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def read(source: Any, width: int = SIDE, height: int = SIDE) -> Picture:
    (picture,) = read_pictures(source, width, height)
    assert picture.pixels.shape == (height, width, 3)
    assert picture.pixels.dtype == np.uint8
    return picture


def test_every_form_of_the_same_picture_is_the_same(tmp_path: Path) -> None:
    image = drawing()
    pixels = np.asarray(image)
    file = tmp_path / "in.png"
    file.write_bytes(encoded(image))
    forms = [
        image, pixels, pixels.astype(np.float32) / 255, file, str(file), encoded(image),
        bytearray(encoded(image)), encoded(image, "WEBP", lossless=True),
        image.convert("RGBA"), np.dstack([pixels, np.full((SIDE, SIDE), 255, np.uint8)]),
    ]  # fmt: skip
    for form in forms:
        picture = read(form)
        assert np.array_equal(picture.pixels, pixels), type(form)
        assert picture.done == ()
    lossy = read(encoded(image, "JPEG", quality=95)).pixels.astype(int)
    assert abs(lossy - pixels).mean() < 3


def test_a_batch_is_a_list_or_an_array_of_four_axes() -> None:
    one, other = np.asarray(drawing()), np.asarray(drawing())[::-1]
    for batch in ([one, other], (one, other), np.stack([one, other])):
        first, second = read_pictures(batch, SIDE, SIDE)
        assert np.array_equal(first.pixels, one)
        assert np.array_equal(second.pixels, other)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation: int) -> None:
    upright = drawing(48, 32)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture = read(encoded(stored, "PNG", exif=exif), 48, 32)
    assert np.array_equal(picture.pixels, np.asarray(upright))
    assert ("turned as its EXIF says" in picture.done) == (orientation > 1)


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 8, 8))
    palette = Image.new("P", (SIDE, SIDE), 0)
    palette.putpalette([10, 20, 30])
    for image in (clear, clear.convert("LA")):
        picture = read(encoded(image))
        assert (picture.pixels[-1, -1] == 255).all()
        assert "transparency on white" in picture.done
    assert (read(encoded(clear)).pixels[0, 0] == (0, 0, 255)).all()
    assert (read(encoded(palette, transparency=0)).pixels == 255).all()


def test_the_middle_is_cut_out_and_made_smaller_by_area() -> None:
    wide = np.zeros((SIDE * 2, SIDE * 6, 3), np.uint8)
    wide[:, SIDE * 2 : SIDE * 4] = 200  # the middle third
    picture = read(wide)
    assert (picture.pixels == 200).all()
    assert picture.done == (
        "384x128 cut to the middle in the aspect of 64x64",
        "resized to 64x64 by area",
    )
    checks = np.indices((SIDE * 2, SIDE * 2)).sum(0) % 2 * 255
    grey = read(checks.astype(np.uint8)).pixels
    assert np.abs(grey.astype(int) - 127).max() <= 1  # each pixel is the mean of the four below it
    assert "resized to 64x64 by bicubic interpolation" in read(drawing(16, 16)).done


def test_other_kinds_of_numbers() -> None:
    grey = np.tile(np.arange(SIDE, dtype=np.uint8), (SIDE, 1))
    for form in (grey, grey[:, :, None], Image.fromarray(grey), encoded(Image.fromarray(grey))):
        assert np.array_equal(read(form).pixels, np.dstack([grey] * 3))
    deep = Image.fromarray(grey.astype(np.uint16) << 8)
    assert np.array_equal(read(encoded(deep)).pixels[:, :, 0], grey)
    assert read(encoded(drawing().convert("CMYK"), "JPEG")).done == ("CMYK to RGB",)
    frames = [drawing(), drawing().rotate(90)]
    moving = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    picture = read(moving)
    assert np.array_equal(picture.pixels, np.asarray(frames[0]))
    assert "the first of 2 frames" in picture.done


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there is no picture"),
        (3, "images is a int, which is no picture"),
        ([None], "picture 1 is a NoneType"),
        ("nowhere.png", "nowhere.png is not there"),
        ("tests", "tests is a folder"),
        (b"", "is none that is read here"),
        (b"GIF89a", "is none that is read here"),
        (encoded(drawing(), "GIF"), "is none that is read here"),
        (encoded(drawing(), "BMP"), "is none that is read here"),
        (encoded(drawing())[:-40], "cannot be read"),
        (np.zeros((3, 64, 64), np.uint8), r"shape \[3, 64, 64\]"),
        (np.zeros((0, 64, 3), np.uint8), "shape"),
        (np.zeros(64, np.uint8), "shape"),
        (np.full((64, 64, 3), 7.0), "numbers from 7 to 7"),
        (np.full((64, 64, 3), np.nan), "numbers from nan"),
        (np.zeros((64, 64, 3), np.int64), "array of int64"),
        ([drawing(), b"no"], "picture 2 is none"),
    ],
)
def test_what_is_no_picture_is_refused(images: Any, message: str) -> None:
    with pytest.raises(PreconditionError, match=message) as refused:
        read_pictures(images, SIDE, SIDE)
    assert refused.value.next


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_unpacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forms = (encoded(drawing()), drawing(), np.asarray(drawing()))
    bombs = [
        # The width and height of a PNG's header, and the header's checksum.
        forms[0][:16]
        + header[4:12]
        + forms[0][24:29]
        + zlib.crc32(header + forms[0][24:29]).to_bytes(4)
        + forms[0][33:]
        for side in (8000, 30000)
        if (header := b"IHDR" + side.to_bytes(4) * 2)
    ]
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was unpacked"))
    for bomb in bombs:
        with pytest.raises(PreconditionError, match="too large"):
            read_pictures(bomb, SIDE, SIDE)
    monkeypatch.setattr(pictures, "MOST_PIXELS", SIDE * SIDE - 1)
    for form in forms:
        with pytest.raises(PreconditionError, match="too large: 64x64"):
            read_pictures(form, SIDE, SIDE)


@given(st.data())
def test_damaged_files_are_refused_or_read_and_never_crash(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    content = bytearray(encoded(drawing(), form))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(content)))
    with contextlib.suppress(PreconditionError):
        read(bytes(content[:cut]))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(PreconditionError):
        read(content)
