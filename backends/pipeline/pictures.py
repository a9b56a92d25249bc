"""Pictures that a call starts from: opened, turned, cut and made as small as the model's images.

What may come in: PNG, JPEG and WebP as a path or as bytes, a Pillow image, a numpy array. What is
done to each is said, and stands in the call's output.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from core.errors import PreconditionError

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 50_000_000
"""What a picture may have: a file of some kilobytes can unpack to gigabytes."""
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Picture:
    """A picture as the encoder takes it.

    Attributes:
        pixels: uint8 [height, width, 3].
        done: what was done to it, in words; empty for one that came as it is taken.
    """

    pixels: NDArray[np.uint8]
    done: tuple[str, ...]


def read_pictures(images: Any, width: int, height: int) -> list[Picture]:
    """One picture, or a sequence of them, at `width` x `height`.

    Args:
        images: a path, bytes, a Pillow image, an array [height, width(, channels)], or a list of
            these; an array [n, height, width, channels] is n pictures.

    Raises:
        PreconditionError: one of them cannot be read; the message says which.
    """
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    alone = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview)
    alone = alone or isinstance(images, np.ndarray | Image.Image)
    if not alone and not isinstance(images, Sequence):
        raise not_a_picture("images", images)
    listed = [images] if alone else list(images)
    if not listed:
        raise PreconditionError("there is no picture", "the list is empty", "pass at least one")
    return [
        read_picture(each, "the picture" if alone else f"picture {number}", width, height)
        for number, each in enumerate(listed, start=1)
    ]


def read_picture(source: Any, name: str, width: int, height: int) -> Picture:
    """One picture at `width` x `height`; `name` is what a message calls it."""
    if isinstance(source, str | os.PathLike):
        name = f"{name} {os.fspath(source)}"
    try:
        image, done = opened(source, name)
        require_few_pixels(image.size, name)
        image.load()
        turned = ImageOps.exif_transpose(image)
    except PreconditionError:
        raise
    except Image.DecompressionBombError as error:
        raise PreconditionError(
            f"{name} is too large", str(error), f"pass one of at most {MOST_PIXELS:,} pixels"
        ) from error
    except UnidentifiedImageError as error:
        raise PreconditionError(
            f"{name} is none that is read here",
            "its content is neither PNG nor JPEG nor WebP",
            "convert it to one of these",
        ) from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds on a damaged file
        raise PreconditionError(
            f"{name} cannot be read",
            " ".join(str(error).split())[:300] or type(error).__name__,
            "check the file: it may be cut off or damaged",
        ) from error
    if turned.size != image.size or turned.getexif().get(0x0112) != image.getexif().get(0x0112):
        done.append("turned as its EXIF says")
    flat = flattened(turned, done)
    return Picture(np.asarray(fitted(flat, width, height, done)), tuple(done))


def opened(source: Any, name: str) -> tuple[Image.Image, list[str]]:
    """The image of any source, and what is to be said of it so far."""
    if isinstance(source, Image.Image):
        return source, []
    if isinstance(source, np.ndarray):
        return from_array(source, name), []
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        if path.is_dir():
            raise PreconditionError(f"{name} is a folder", "a picture is a file", "name the file")
        if not path.is_file():
            raise PreconditionError(
                f"{name} is not there", f"looked in {Path.cwd()}", "check the path"
            )
        source = path.read_bytes()
    if not isinstance(source, bytes | bytearray | memoryview):
        raise not_a_picture(name, source)
    image = Image.open(io.BytesIO(source), formats=FORMATS)
    frames = getattr(image, "n_frames", 1)
    return image, [f"the first of {frames} frames"] if frames > 1 else []


def from_array(array: NDArray[Any], name: str) -> Image.Image:
    """An array as an image: uint8, or floats from 0 to 1; grey, RGB or RGBA."""
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if not (grey or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        raise PreconditionError(
            f"{name} is an array of shape {list(array.shape)}",
            "a picture is [height, width] or [height, width, channels] with 1, 3 or 4 channels",
            "pass it so: array.transpose(1, 2, 0) puts the channels last",
        )
    require_few_pixels((array.shape[1], array.shape[0]), name)
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise PreconditionError(
                f"{name} holds numbers from {array.min():g} to {array.max():g}",
                "an array of floats is a picture from 0 to 1",
                "scale it, or pass uint8",
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise PreconditionError(
            f"{name} is an array of {array.dtype}",
            "a picture is uint8 from 0 to 255, or floats from 0 to 1",
            "convert it: array.astype('uint8')",
        )
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.ndim == 3 and grey
                                                else array))  # fmt: skip


def require_few_pixels(size: tuple[int, int], name: str) -> None:
    """Refuse a picture by the size that its header states, before it is unpacked."""
    width, height = size
    if width * height > MOST_PIXELS:
        raise PreconditionError(
            f"{name} is too large: {width}x{height}",
            f"it would be unpacked to {width * height:,} pixels",
            f"pass one of at most {MOST_PIXELS:,} pixels",
        )


def flattened(image: Image.Image, done: list[str]) -> Image.Image:
    """RGB, with transparency laid on white."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
        done.append("16 bits to 8")
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() != (255, 255):
            done.append("transparency on white")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (*WHITE, 255)), layer)
    if image.mode == "RGB":
        return image
    if image.mode != "RGBA":
        done.append(f"{image.mode} to RGB")
    return image.convert("RGB")


def fitted(image: Image.Image, width: int, height: int, done: list[str]) -> Image.Image:
    """The middle of `image` in the aspect of `width` x `height`, at that size."""
    there = image.size
    if there == (width, height):
        return image
    if there[0] * height != there[1] * width:
        done.append(f"{there[0]}x{there[1]} cut to the middle in the aspect of {width}x{height}")
    smaller = there[0] >= width and there[1] >= height
    how = Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC
    done.append(f"resized to {width}x{height} by {'area' if smaller else 'bicubic interpolation'}")
    return ImageOps.fit(image, (width, height), how)


def not_a_picture(name: str, value: object) -> PreconditionError:
    return PreconditionError(
        f"{name} is a {type(value).__name__}, which is no picture",
        "a picture is a path, the bytes of a PNG, JPEG or WebP, a Pillow image or a numpy array",
        "pass one of these, or a list of them",
    )
