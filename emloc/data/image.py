"""Images of a data set, read when they are needed and never before."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import ExifTags, Image

from emloc.errors import ConfigError

# Longer side over shorter. Beyond it nothing is left of an image that is cut into square tiles.
MAX_ASPECT = 100

# PIL has a parser for every format, and each ends on a broken file in a way of its own.
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)

# What brings an image of that EXIF orientation the right way up; from 5 on, width becomes height.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class LazyImage:
    """One image; `name` is what messages call it, `key` changes with its content."""

    name: str
    key: str
    read: Callable[[], bytes] = field(compare=False, repr=False)  # the encoded file

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as it is looked at; from the file's header alone.

        Raises:
            ConfigError: it cannot be read, or is a thin line.
        """
        try:
            image, orientation = _header(self.read())
        except _BROKEN as error:
            raise self._unreadable(error) from error
        width, height = image.size[::-1] if orientation >= 5 else image.size
        self._refuse_thin(width, height)
        return width, height

    def open(self) -> Image.Image:
        """The image itself, in RGB, the right way up.

        Raises:
            ConfigError: it cannot be decoded.
        """
        try:
            image, orientation = _header(self.read())
            if orientation in _TURNS:
                image = image.transpose(_TURNS[orientation])
            if image.mode.startswith("I;16"):  # which Pillow would clip to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"its pixels are of 32 bits (mode {image.mode})")
            image = image.convert("RGB")
        except _BROKEN as error:
            raise self._unreadable(error) from error
        self._refuse_thin(*image.size)
        return image

    def _refuse_thin(self, width: int, height: int) -> None:
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ConfigError(
                f"{self.name}: an image of {width} x {height} pixels has no tiles to be cut into; "
                "set task.unreadable=skip to leave such rows out"
            )

    def _unreadable(self, error: Exception) -> ConfigError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return ConfigError(
            f"{self.name}: cannot read the image: {reason[:160]}; "
            "correct it, or set task.unreadable=skip to leave such rows out"
        )


def _header(content: bytes) -> tuple[Image.Image, int]:
    """An image of which no pixel is decoded yet, and how it is to be turned: a key of _TURNS, or 1.

    PIL's own transposition writes the rest of the EXIF anew, which fails where it is odd.
    """
    image = Image.open(io.BytesIO(content))
    if image.format == "TIFF":  # PIL turns these itself
        return image, 1
    # A PNG's own method would decode all of it, for what may be said behind its pixels.
    found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return image, found if found in _TURNS else 1
