"""Manifest of a finished folder: names, sizes and hashes of its files, written last.

A folder without a manifest is unfinished. A folder that differs from its manifest is damaged: the
disk was full, a file was purged, or a copy was cut off. Sizes are compared at every use, contents
once in each process. The content of a large file, which is mapped block by block, is only compared
when the file is opened (`verified_file`).
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
from emloc.runtime.permissions import apply_umask

MANIFEST = "manifest.json"
VERSION = 1
# Files of this type directly in the folder are mapped; `verified_file` compares their content.
MAPPED = ".safetensors"
# Bytes that are read at a time to compute a hash.
_CHUNK = 1 << 24


class DamagedError(Exception):
    """A file of a finished folder is missing or differs from the manifest."""

    def __init__(self, folder: Path, flaw: str) -> None:
        super().__init__(f"{folder}: {flaw}")
        self.folder, self.flaw = folder, flaw


@dataclass(frozen=True)
class _Entry:
    """Size and hash of a file, as a manifest lists them."""

    bytes: int
    xxh3: str


def seal(folder: Path) -> None:
    """Write the manifest of `folder` to disk; afterwards its files must not change.

    All files in the folder get the permissions of new files.
    """
    apply_umask(folder)
    entries = {
        name: {"bytes": (folder / name).stat().st_size, "xxh3": file_hash(folder / name)}
        for name in _names(folder)
    }
    write_json(folder / MANIFEST, {"version": VERSION, "files": entries})


def flaw_of(folder: Path) -> str | None:
    """Describe how a finished folder differs from its manifest; None if nothing differs.

    The content of mapped files is left to `verified_file`.
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
        is_mapped = "/" not in name and name.endswith(MAPPED)
        if not is_mapped and _cached_hash(path) != entry.xxh3:
            return f"the content of {name} has changed"
    return None


def verified_file(path: Path) -> Path:
    """Compare a file with the manifest of its folder, once in this process, and return its path.

    A folder that is still being written has no manifest, so its files are not compared.

    Raises:
        DamagedError: the folder is finished, and the file is missing or has changed.
    """
    entries = _entries(path.parent)
    if entries is None:
        return path
    if not path.is_file():
        raise DamagedError(path.parent, f"{path.name} is missing")
    entry = entries.get(path.name)
    if entry is not None and _cached_hash(path) != entry.xxh3:
        raise DamagedError(path.parent, f"the content of {path.name} has changed")
    return path


def has_complete_manifest(folder: Path) -> bool:
    """Return whether `folder` has a manifest that lists every file in it."""
    entries = _entries(folder)
    return entries is not None and {*entries} == {*_names(folder)}


def set_aside(folder: Path) -> Path:
    """Rename a damaged folder, so that no stage uses it, and return its new path."""
    aside = folder.with_name(f"{folder.name}.damaged-{time.time_ns()}")
    os.replace(folder, aside)
    return aside


def file_hash(path: Path) -> str:
    """Return the xxh3 hash (128 bits, 32 hex digits) of a file's content."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def _names(folder: Path) -> list[str]:
    """Relative paths of all files in `folder`, except the manifest and lock files."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST and path.suffix != ".lock"
    )


def _entries(folder: Path) -> Mapping[str, _Entry] | None:
    """Return the entries of the folder's manifest; None if it has no readable manifest."""
    path = folder / MANIFEST
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return _read_manifest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _read_manifest(path: Path, size: int, modified: int) -> Mapping[str, _Entry] | None:
    """Read a manifest; None if it is not readable.

    Size and time of modification are part of the cache key, so that the file is only read again
    after it has changed. A large emulator needs its manifest for every block.
    """
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if manifest["version"] != VERSION:
            return None
        return {name: _Entry(**entry) for name, entry in manifest["files"].items()}
    except (ValueError, TypeError, KeyError):
        return None


def _cached_hash(path: Path) -> str:
    """Return the hash of a file, computed once for each size and time of modification."""
    stat = path.stat()
    return _hash_of_version(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=65536)
def _hash_of_version(path: Path, size: int, modified: int) -> str:
    """Return the hash of a file; size and time of modification serve as the key of the cache."""
    return file_hash(path)
