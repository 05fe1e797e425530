"""Images of a data set's rows, stored as bytes in the table, as base64 text, or in files."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from emloc.data.image import LazyImage
from emloc.errors import ConfigError
from emloc.runtime.digest import digest

# Maximum length of a path in bytes on any system. A longer text is an image in base64.
_LONGEST_PATH = 4096


@dataclass(frozen=True)
class BufferRef:
    """A reference to an encoded image in the memory-mapped table, which is read on demand."""

    buffer: Any  # pyarrow.Buffer
    base64: bool

    @property
    def size(self) -> int:
        """Number of stored bytes."""
        size: int = self.buffer.size
        return size

    def read(self) -> bytes:
        """Read the encoded image file."""
        stored: bytes = self.buffer.to_pybytes()
        return _decode_base64(stored) if self.base64 else stored


class LazyRow(Mapping[str, Any]):
    """One row of a data set; each column is read from the table at its access.

    The value of a binary column is a `BufferRef` instead of the bytes. With `keep_text_refs` this
    also holds for long texts, which may be images in base64.
    """

    def __init__(
        self, table: Any, columns: Sequence[str], index: int, *, keep_text_refs: bool = False
    ) -> None:
        self._table, self._columns, self._index = table, columns, index
        self._keep_text_refs = keep_text_refs

    def __getitem__(self, column: str) -> Any:
        array = self._table.column(column).slice(self._index, 1).chunk(0)
        return _value(array, self._keep_text_refs)

    def __contains__(self, column: object) -> bool:
        return column in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def _value(array: Any, keep_text_refs: bool) -> Any:
    """The value of an Arrow array of length 1, with a `BufferRef` for values that may be images."""
    if array.null_count:
        return None
    type_name = str(array.type)
    if "binary" not in type_name and not (keep_text_refs and "string" in type_name):
        return array[0].as_py()
    if type_name.startswith("struct<"):
        return {
            member.name: _value(array.field(member.name), keep_text_refs) for member in array.type
        }
    if "list<" in type_name:
        items = array.flatten()
        return [_value(items.slice(index, 1), keep_text_refs) for index in range(len(items))]
    buffer, is_text = _value_buffer(array), "string" in type_name
    if buffer is None or (is_text and buffer.size <= _LONGEST_PATH):
        return array[0].as_py()
    return BufferRef(buffer, base64=is_text)


def _value_buffer(array: Any) -> Any:
    """The bytes of the only value of a binary or text array, without the copy of Arrow's scalars.

    None if all values of the column are empty.
    """
    _, offsets, data = array.buffers()
    if data is None:
        return None
    is_large = str(array.type).startswith("large_")
    typed_offsets = memoryview(offsets).cast("q" if is_large else "i")
    start, end = typed_offsets[array.offset : array.offset + 2]
    return data.slice(start, end - start)


@dataclass(frozen=True)
class StoredImage(LazyImage):
    """An image of a data set, with the number of its stored bytes."""

    stored: int  # bytes

    @cached_property
    def content(self) -> str:
        """SHA-256 of the encoded image file, which is read to compute the hash.

        Raises:
            ConfigError: the file cannot be read.
        """
        try:
            return hashlib.sha256(self.read()).hexdigest()
        except (OSError, ValueError) as error:
            raise self._read_error(error) from error

    def is_same(self, other: StoredImage) -> bool:
        """Whether both files have the same content; they are read only if their sizes are equal."""
        return self.stored == other.stored and self.content == other.content


class NoImageError(Exception):
    """A row has no usable image, for the given reason; `file` is the name of a missing file."""

    def __init__(self, reason: str, file: str | None = None) -> None:
        super().__init__(reason)
        self.file = file


@dataclass(frozen=True)
class ImageSource:
    """Turns the values of the expression `task.image` into images.

    A value is a reference to bytes, a mapping `{bytes, path}`, a base64 text, the name of a file
    below `root`, or a URL that ends with such a name.
    """

    task: str  # name of the task
    root: Path | None  # folder of image files
    # File name -> path, size and cache key; None for a missing file.
    _files: dict[str, tuple[Path, int, str] | None] = field(default_factory=dict, repr=False)
    # Cache key of an image -> why the image cannot be read, or None.
    _flaws: dict[str, str | None] = field(default_factory=dict, repr=False)

    def images(self, values: Sequence[Any], row: str, origin: Any) -> tuple[StoredImage, ...]:
        """The images of a row, not read yet.

        Args:
            values: values of the expression `task.image`.
            row: name of the row for error messages.
            origin: identifies the row in the cache keys of its images.

        Raises:
            NoImageError: the row has no image, a value is no image, or a file is missing.
            ConfigError: the images are files, but their folder is unknown.
        """
        if not values or any(value in (None, "") for value in values):
            raise NoImageError("task.image gives no image")
        name = f"{self.task} {row}"
        if len(values) == 1:
            return (self._image(values[0], name, [origin, 0]),)
        return tuple(
            self._image(value, f"{name} image {number}", [origin, number])
            for number, value in enumerate(values)
        )

    def check_readable(self, images: Sequence[StoredImage]) -> None:
        """Decode every image; an image that several rows share is decoded once.

        Raises:
            NoImageError: an image cannot be decoded.
        """
        for image in images:
            if image.key not in self._flaws:
                self._flaws[image.key] = _find_flaw(image)
            if reason := self._flaws[image.key]:
                raise NoImageError(reason)

    def _image(self, value: Any, name: str, origin: Any) -> StoredImage:
        """The image for one value of `task.image`."""
        if isinstance(value, Mapping):
            stored, path = value.get("bytes"), value.get("path")
            if stored is None and path is None:
                raise NoImageError("task.image gives neither bytes nor a path")
            return self._image(path if stored is None else stored, name, origin)
        if isinstance(value, str):
            file = self._file_name(value)
            if file is not None:
                return self._file_image(file, name)
            encoded = value.encode()
            return StoredImage(name, digest(origin), partial(_decode_base64, encoded), len(encoded))
        if not isinstance(value, BufferRef):
            raise NoImageError(f"task.image gives a value of type {type(value).__name__}")
        return StoredImage(name, digest(origin), value.read, value.size)

    def _file_name(self, value: str) -> str | None:
        """The file name in a text; None if the text is base64, which contains no dot."""
        if value.startswith(("http://", "https://")):
            return unquote(PurePosixPath(urlsplit(value).path).name)
        if "." in value and not value.startswith("data:"):
            return value
        return value if self.root and os.path.isfile(self.root / value) else None

    def _file_image(self, file: str, name: str) -> StoredImage:
        """The image in the file with the name or absolute path `file`."""
        if self.root is None and not Path(file).is_absolute():
            raise ConfigError(
                f"task {self.task}: task.image names files (such as {file}), but their folder is "
                "unknown; set task.image_root=/path/to/images"
            )
        file_facts = self._file_facts(file)
        if file_facts is None:
            raise NoImageError(f"there is no file {file}", file)
        path, size, key = file_facts
        return StoredImage(f"{name} ({file})", key, path.read_bytes, size)

    def _file_facts(self, file: str) -> tuple[Path, int, str] | None:
        """Path, size in bytes and cache key of a file; None if it is missing.

        The result is cached, as many rows can name the same file.
        """
        if file not in self._files:
            self._files[file] = self._stat_file(file)
        return self._files[file]

    def _stat_file(self, file: str) -> tuple[Path, int, str] | None:
        """Read path, size and cache key of a file from disk; None if it is missing."""
        # `datasets` itself writes absolute paths if the data set is a folder of images.
        path = (self.root or Path("/")) / file
        if ".." in path.parts or not path.is_file():
            return None
        stat = path.stat()
        name = path.name if Path(file).is_absolute() else file
        return path, stat.st_size, digest([name, stat.st_size, stat.st_mtime_ns])


def _find_flaw(image: LazyImage) -> str | None:
    """Why the image cannot be read; None if it can."""
    try:
        _ = image.size
        image.open()
    except ConfigError as error:
        # The remedy in the message is cut off, as the row is skipped already.
        return str(error).removeprefix(f"{image.name}: ").rpartition("; ")[0]
    return None


def _decode_base64(encoded: bytes) -> bytes:
    """Decode base64, with or without a `data:` prefix."""
    return base64.b64decode(encoded.rpartition(b",")[2])
