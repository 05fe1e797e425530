"""The list of files that makes a folder believable: names, sizes and hashes, written last.

A folder without its list was not finished. A folder that differs from its list is damaged: a disk
was full, a file was purged, a copy broke off. Sizes are compared at every use, contents once in
each process. Large files that are mapped block by block are compared when they are opened (`whole`)
and not before.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from emloc.runtime.atomic import write_json

MANIFEST = "manifest.json"
VERSION = 1
# Files directly in the folder with this ending are read block by block, and compared as they are.
MAPPED = ".safetensors"
# Read at a time while hashing.
_PIECE = 1 << 24


class DamagedError(Exception):
    """A file of a finished folder is not what it was."""

    def __init__(self, folder: Path, flaw: str) -> None:
        super().__init__(f"{folder}: {flaw}")
        self.folder, self.flaw = folder, flaw


@dataclass(frozen=True)
class _Entry:
    """One file of a folder."""

    bytes: int
    xxh3: str


def seal(folder: Path) -> None:
    """Write the list of all files in `folder`, to the disk, when nothing more will be written."""
    entries = {
        name: {"bytes": (folder / name).stat().st_size, "xxh3": file_hash(folder / name)}
        for name in _names(folder)
    }
    write_json(folder / MANIFEST, {"version": VERSION, "files": entries})


def flaw_of(folder: Path) -> str | None:
    """What is wrong with a folder that should be finished; None if it is as it was sealed.

    Contents of mapped files are left to `whole`.
    """
    entries = _entries(folder)
    if entries is None:
        return f"it has no readable {MANIFEST}"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != entry.bytes:
            return f"{name} has {size} of {entry.bytes} bytes"
        mapped = "/" not in name and name.endswith(MAPPED)
        if not mapped and _known_hash(path) != entry.xxh3:
            return f"the content of {name} has changed"
    return None


def whole(path: Path) -> Path:
    """The file itself, its content compared with its folder's list once in this process.

    A folder that is still being written has no list, and its files are believed.

    Raises:
        DamagedError: the folder is finished and the file is missing or changed.
    """
    entries = _entries(path.parent)
    if entries is None:
        return path
    if not path.is_file():
        raise DamagedError(path.parent, f"{path.name} is missing")
    entry = entries.get(path.name)
    if entry is not None and _known_hash(path) != entry.xxh3:
        raise DamagedError(path.parent, f"the content of {path.name} has changed")
    return path


def lists_all(folder: Path) -> bool:
    """Whether there is a list that names every file in the folder."""
    entries = _entries(folder)
    return entries is not None and {*entries} == {*_names(folder)}


def set_aside(folder: Path) -> Path:
    """Rename a damaged folder, so that it can be looked at and is not found again."""
    aside = folder.with_name(f"{folder.name}.damaged-{time.time_ns()}")
    os.replace(folder, aside)
    return aside


def file_hash(path: Path) -> str:
    """The xxh3 of a file's content, 32 hex digits."""
    total = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            total.update(piece)
    return total.hexdigest()


def _names(folder: Path) -> list[str]:
    """All files but the list itself and locks, which come and go."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST and path.suffix != ".lock"
    )


def _entries(folder: Path) -> Mapping[str, _Entry] | None:
    path = folder / MANIFEST
    try:
        seen = path.stat()
    except FileNotFoundError:
        return None
    return _read(path, seen.st_size, seen.st_mtime_ns)


@lru_cache(maxsize=1024)
def _read(path: Path, size: int, modified: int) -> Mapping[str, _Entry] | None:
    """Read again only when the file has changed: a large emulator is asked for every block."""
    try:
        written: dict[str, Any] = json.loads(path.read_text())
        if written["version"] != VERSION:
            return None
        return {name: _Entry(**entry) for name, entry in written["files"].items()}
    except (ValueError, TypeError, KeyError):
        return None


def _known_hash(path: Path) -> str:
    seen = path.stat()
    return _hashed(path, seen.st_size, seen.st_mtime_ns)


@lru_cache(maxsize=65536)
def _hashed(path: Path, size: int, modified: int) -> str:
    return file_hash(path)
