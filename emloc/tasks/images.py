"""The images of a row, wherever a data set keeps them: in the table, as base64, or in files."""

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

# Bytes. Text above it is no path on any system, so it is the image itself.
_LONGEST_PATH = 4096


@dataclass(frozen=True)
class BufferRef:
    """An encoded image in the memory-mapped table: a few bytes that say where, until it is read."""

    buffer: Any
    base64: bool

    @property
    def size(self) -> int:
        """Stored bytes."""
        size: int = self.buffer.size
        return size

    def read(self) -> bytes:
        """The encoded file."""
        stored: bytes = self.buffer.to_pybytes()
        return _decoded(stored) if self.base64 else stored


class LazyRow(Mapping[str, Any]):
    """One row of a data set, of which a column is read when it is asked for and never before.

    Binary values, and with `views` long texts too, stay where they are: a `View` stands for them.
    """

    def __init__(
        self, table: Any, columns: Sequence[str], index: int, *, views: bool = False
    ) -> None:
        self._table, self._columns, self._index, self._views = table, columns, index, views

    def __getitem__(self, column: str) -> Any:
        return _value(self._table.column(column).slice(self._index, 1).chunk(0), self._views)

    def __contains__(self, column: object) -> bool:
        return column in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def _value(array: Any, views: bool) -> Any:
    """The one value of an Arrow array, with a `View` for what may be an image."""
    if array.null_count:
        return None
    kind = str(array.type)
    if "binary" not in kind and not (views and "string" in kind):
        return array[0].as_py()
    if kind.startswith("struct<"):
        return {one.name: _value(array.field(one.name), views) for one in array.type}
    if "list<" in kind:
        inside = array.flatten()
        return [_value(inside.slice(place, 1), views) for place in range(len(inside))]
    place, text = _place(array), "string" in kind
    if place is None or (text and place.size <= _LONGEST_PATH):
        return array[0].as_py()
    return BufferRef(place, base64=text)


def _place(array: Any) -> Any:
    """The buffer of the one value of an array of bytes or text. Arrow's own scalars are copies."""
    _, ends, data = array.buffers()
    if data is None:  # every value of the column is empty
        return None
    wide = str(array.type).startswith("large_")
    start, end = memoryview(ends).cast("q" if wide else "i")[array.offset : array.offset + 2]
    return data.slice(start, end - start)


@dataclass(frozen=True)
class StoredImage(LazyImage):
    """A picture, and the size of what is stored of it in bytes."""

    stored: int

    @cached_property
    def content(self) -> str:
        """Digest of the encoded file, which is read for it.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            return hashlib.sha256(self.read()).hexdigest()
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def same(self, other: StoredImage) -> bool:
        """Whether the same file is stored; both are read only where their sizes are equal."""
        return self.stored == other.stored and self.content == other.content


class NoImageError(Exception):
    """A row shows nothing that can be used; says why, and which file is missing if one is."""

    def __init__(self, reason: str, file: str | None = None) -> None:
        super().__init__(reason)
        self.file = file


@dataclass(frozen=True)
class ImageSource:
    """Turns what `task.image` gives for a row into pictures.

    Bytes, `{bytes, path}`, base64, a file name below `root`, a URL whose last part is one, or a
    list of these.
    """

    task: str
    root: Path | None
    _files: dict[str, tuple[Path, int, str] | None] = field(default_factory=dict, repr=False)
    _flaws: dict[str, str | None] = field(default_factory=dict, repr=False)  # by a picture's key

    def pictures(self, values: Sequence[Any], row: str, origin: Any) -> tuple[StoredImage, ...]:
        """The pictures of a row, of which nothing is read; `origin` is what tells the row apart.

        Raises:
            NoImageError: there is none, a value is no image, or a file is not there.
            ConfigError: they are in files, and nothing says where those are.
        """
        if not values or any(one in (None, "") for one in values):
            raise NoImageError("task.image gives no image")
        name = f"{self.task} {row}"
        if len(values) == 1:
            return (self._picture(values[0], name, [origin, 0]),)
        return tuple(
            self._picture(one, f"{name} image {place}", [origin, place])
            for place, one in enumerate(values)
        )

    def try_all(self, pictures: Sequence[StoredImage]) -> None:
        """Decode every picture, of a file only once.

        Raises:
            NoImageError: one cannot be decoded.
        """
        for one in pictures:
            if one.key not in self._flaws:
                self._flaws[one.key] = _flaw(one)
            if reason := self._flaws[one.key]:
                raise NoImageError(reason)

    def _picture(self, value: Any, name: str, origin: Any) -> StoredImage:
        if isinstance(value, Mapping):
            stored, path = value.get("bytes"), value.get("path")
            if stored is None and path is None:
                raise NoImageError("task.image gives neither bytes nor a path")
            return self._picture(path if stored is None else stored, name, origin)
        if isinstance(value, str):
            file = self._file_name(value)
            if file is not None:
                return self._in_file(file, name)
            encoded = value.encode()
            return StoredImage(name, digest(origin), partial(_decoded, encoded), len(encoded))
        if not isinstance(value, BufferRef):
            raise NoImageError(f"task.image gives a value of type {type(value).__name__}")
        return StoredImage(name, digest(origin), value.read, value.size)

    def _file_name(self, value: str) -> str | None:
        """The name of the file that a text means; None where it is base64, which has no dot."""
        if value.startswith(("http://", "https://")):
            return unquote(PurePosixPath(urlsplit(value).path).name)
        if "." in value and not value.startswith("data:"):
            return value
        return value if self.root and os.path.isfile(self.root / value) else None

    def _in_file(self, file: str, name: str) -> StoredImage:
        if self.root is None and not Path(file).is_absolute():
            raise ConfigError(
                f"task {self.task}: task.image names files ({file} for one), and not the folder "
                "they are in; set task.image_root=/path/to/images"
            )
        found = self._found(file)
        if found is None:
            raise NoImageError(f"there is no file {file}", file)
        path, size, key = found
        return StoredImage(f"{name} ({file})", key, path.read_bytes, size)

    def _found(self, file: str) -> tuple[Path, int, str] | None:
        """Path, size and key of a file, or None; asked once, since many rows name the same one."""
        if file not in self._files:
            self._files[file] = self._look(file)
        return self._files[file]

    def _look(self, file: str) -> tuple[Path, int, str] | None:
        # Absolute ones are written by `datasets` itself, for a folder of images.
        path = (self.root or Path("/")) / file
        if ".." in path.parts or not path.is_file():
            return None
        seen = path.stat()
        name = path.name if Path(file).is_absolute() else file
        return path, seen.st_size, digest([name, seen.st_size, seen.st_mtime_ns])


def _flaw(picture: LazyImage) -> str | None:
    """Why a picture cannot be used."""
    try:
        _ = picture.size
        picture.open()
    except ConfigError as error:
        # Without the advice to leave it out, which is being done.
        return str(error).removeprefix(f"{picture.name}: ").rpartition("; ")[0]
    return None


def _decoded(encoded: bytes) -> bytes:
    """Base64, maybe behind a `data:` prefix, as bytes."""
    return base64.b64decode(encoded.rpartition(b",")[2])
