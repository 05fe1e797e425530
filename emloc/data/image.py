"""Images of a data set that are read and decoded only when they are needed."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import ExifTags, Image

from emloc.errors import ConfigError, one_line

# Largest ratio of the longer side to the shorter one. A thinner image cannot be cut into square
# tiles.
MAX_ASPECT = 100

# Exceptions of PIL's parsers for damaged files; each format raises its own.
_DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)

# EXIF orientation -> the transposition that turns the image upright. Orientations from 5 on swap
# width and height.
_TRANSPOSITIONS = {
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
    """One image of a data set that is read and decoded on demand."""

    name: str  # for error messages
    key: str  # cache key; changes with the image's content
    read: Callable[[], bytes] = field(compare=False, repr=False)  # reads the encoded file

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright image in pixels, read from the file's header alone.

        Raises:
            ConfigError: the file cannot be read, or the image is too thin.
        """
        try:
            image, orientation = _open_header(self.read())
        except _DECODING_ERRORS as error:
            raise self._read_error(error) from error
        width, height = image.size[::-1] if orientation >= 5 else image.size
        self._refuse_thin(width, height)
        return width, height

    def open(self) -> Image.Image:
        """Decode the image and return it upright, in RGB.

        Raises:
            ConfigError: the file cannot be decoded, or the image is too thin.
        """
        try:
            image, orientation = _open_header(self.read())
            if orientation in _TRANSPOSITIONS:
                image = image.transpose(_TRANSPOSITIONS[orientation])
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips these to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of 32 bits (mode {image.mode}) are not supported")
            image = image.convert("RGB")
        except _DECODING_ERRORS as error:
            raise self._read_error(error) from error
        self._refuse_thin(*image.size)
        return image

    def _refuse_thin(self, width: int, height: int) -> None:
        """Raise `ConfigError` if the image is too thin to be cut into tiles."""
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ConfigError(
                f"{self.name}: an image of {width} x {height} pixels has no tiles, since "
                "it is too thin; set task.unreadable=skip to leave such rows out"
            )

    def _read_error(self, error: Exception) -> ConfigError:
        """The error for an image that PIL cannot read, with PIL's reason."""
        reason = one_line(error) or type(error).__name__
        return ConfigError(
            f"{self.name}: cannot read the image: {reason[:160]}; "
            "correct the file, or set task.unreadable=skip to leave such rows out"
        )


def _open_header(content: bytes) -> tuple[Image.Image, int]:
    """Open an image file without decoding pixels; return the image and its EXIF orientation.

    The orientation is a key of `_TRANSPOSITIONS`, or 1 for an upright image. `ImageOps` of PIL is
    not used for the transposition, because it rewrites the EXIF block and fails on unusual ones.
    """
    image = Image.open(io.BytesIO(content))
    if image.format == "TIFF":  # PIL turns TIFF images upright by itself
        return image, 1
    # The base class's method, because that of PNG images decodes all pixels to reach the EXIF
    # blocks behind them.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return image, orientation if orientation in _TRANSPOSITIONS else 1
