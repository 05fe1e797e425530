"""Atomic writes: a file or folder is complete or absent, also after a crash or a power cut.

The content is written to a draft next to the final path, flushed to disk (fsync) and renamed; then
the parent folder is flushed. Each path has one writer at a time. The next attempt overwrites the
draft of a process that was killed. Files and folders get the permissions that the umask gives to
new ones, whichever library writes them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emloc.runtime.permissions import apply_umask, set_permissions


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield the path of a draft, which replaces the file `path` when the block ends.

    If the block raises, `path` is unchanged. With `durable=False` nothing is flushed to the disk.
    """
    draft = path.with_name(path.name + ".draft")
    draft.unlink(missing_ok=True)
    draft.touch()
    permissions = draft.stat().st_mode & 0o777
    try:
        yield draft
        set_permissions(draft, permissions)
        if durable:
            _flush(draft)
        os.replace(draft, path)
        if durable:
            _flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes to the file `path` atomically."""
    with atomic_file(path) as draft:
        draft.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write text to the UTF-8 file `path` atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value to the indented JSON file `path` atomically."""
    write_text(path, json.dumps(value, indent=1))


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty draft folder, which is renamed to `path` when the block ends.

    If the block raises, the draft is deleted.

    Raises:
        OSError: `path` exists and is not an empty folder.
    """
    draft = path.with_name(path.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        publish(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, path: Path) -> None:
    """Flush the folder `draft` and its contents to disk, then rename it to `path`.

    Raises:
        OSError: `path` exists and is not an empty folder.
    """
    apply_umask(draft)
    for item in draft.rglob("*"):
        _flush(item)
    _flush(draft)
    os.replace(draft, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Force a file's content, or a folder's directory entries, onto the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
