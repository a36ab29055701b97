"""Reads picture files that anyone may have made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from ..settings.errors import ConfigError, one_line

#: Pillow's names of the formats that are read. Pillow would hand others to a program (EPS to Ghostscript), or decode them in
#: code that few people use.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")

#: The most pixels of a picture, 8192 x 8192. A file of some kilobytes can claim billions.
MOST_PIXELS = 2**26

#: How many times as long as the other a side may be. Scorers resize the shorter one to some hundred pixels.
MOST_RATIO = 2000

#: Pillow's modes that can become RGB without changing the picture. One with more than 8 bits would be clipped.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


def read_picture(path: Path) -> Image.Image:
    """A picture file, decoded and rotated as a viewer shows it. An animation gives its first frame.

    Raises:
        ConfigError: the file cannot be read, is none of `FORMATS`, or has more than 8 bits, more pixels than
            `MOST_PIXELS` or a side that is too long.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels: more than {MOST_PIXELS}, make it smaller")
            if max(image.size) > MOST_RATIO * min(image.size):
                raise ValueError(
                    f"{image.width} x {image.height} pixels: one side is more than {MOST_RATIO} times the other"
                )
            if image.mode not in MODES:
                raise ValueError(f"mode {image.mode} would be clipped: save it as RGB with 8 bits")
            with _without_libtiff() if image.format == "TIFF" else contextlib.nullcontext():
                image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except Image.UnidentifiedImageError:
        raise ConfigError(
            f"{path} cannot be read as a picture: it is damaged, or not one of {', '.join(FORMATS)}"
        ) from None
    except Exception as error:
        # For a damaged file Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError and others.
        why = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise ConfigError(f"{path} cannot be read as a picture: {one_line(why)}") from None


@contextlib.contextmanager
def _without_libtiff() -> Iterator[None]:
    """Drops what is written to stderr past Python, as libtiff does for a damaged file. The error is raised as well."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
