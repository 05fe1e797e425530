"""Files and folders that are there whole or not at all, after a crash or a power cut too.

The content is written beside its place, flushed to disk (fsync) and renamed; then the folder that
holds the name is flushed. A name has one writer at a time. What a killed process left beside it is
overwritten by the next attempt.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to. It becomes `path` when the block ends, replacing an older file.

    If the block raises, `path` stays as it was.
    """
    draft = path.with_name(path.name + ".draft")
    try:
        yield draft
        _flush(draft)
        os.replace(draft, path)
        _flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as draft:
        draft.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write to. It becomes `path` when the block ends.

    If the block raises, nothing is left.

    Raises:
        OSError: `path` is there and is not an empty folder.
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
    """Flush all that is in the folder `draft` to disk, then rename it to `path`.

    Raises:
        OSError: `path` is there and is not an empty folder.
    """
    for item in draft.rglob("*"):
        _flush(item)
    _flush(draft)
    os.replace(draft, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Have the system write a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
