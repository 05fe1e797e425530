"""Offsets on disk: files for each place, mapped into memory, in which a row is found by its key.

A folder of offsets holds `rows.json` and the files `place-<place>-shard-<shard>.safetensors`. Each
file has the offsets of some rows at one place: tensors `<row key>/<part>` (tokens, ...).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from emloc.anchors.formats import Parts
from emloc.errors import ConfigError
from emloc.runtime.atomic import write_json
from emloc.runtime.manifest import verified_file
from emloc.runtime.safetensors_file import write_safetensors

ROWS_FILE = "rows.json"
# Open files of one reader; each is a mapping, which takes address space but no memory.
_OPEN_FILES = 512


def shard_file(folder: Path, place: int, shard: int) -> Path:
    """Return the path of one file of offsets."""
    return folder / f"place-{place:03d}-shard-{shard:05d}.safetensors"


def write_shard(path: Path, offsets: Mapping[str, Parts]) -> None:
    """Write the offsets of some rows at one place: row key -> parts."""
    tensors = {
        f"{row}/{name}": part for row, parts in offsets.items() for name, part in parts.items()
    }
    write_safetensors(path, tensors, {})


def write_rows(folder: Path, shards: Sequence[Sequence[str]]) -> None:
    """Write which rows each shard holds, by their keys."""
    write_json(folder / ROWS_FILE, [list(rows) for rows in shards])


def read_rows(folder: Path) -> list[list[str]]:
    """Return the row keys of each shard of a folder."""
    rows: list[list[str]] = json.loads((folder / ROWS_FILE).read_text())
    return rows


@dataclass(frozen=True)
class _Shelf:
    """Where the offsets of a row lie."""

    folder: Path
    shard: int


class OffsetReader:
    """Reads the offsets of single rows from one or several folders."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._shelves = {
            row: _Shelf(folder, index)
            for folder in folders
            for index, rows in enumerate(read_rows(folder))
            for row in rows
        }
        self._open = lru_cache(maxsize=_OPEN_FILES)(_open_shard)

    def __contains__(self, row: str) -> bool:
        return row in self._shelves

    def read(self, row: str, place: int) -> dict[str, Tensor]:
        """Return the parts of a row's offsets at a place, each (tokens, ...).

        Raises:
            ConfigError: there are no offsets of this row.
            DamagedError: a file is missing or has changed.
        """
        shelf = self._shelves.get(row)
        if shelf is None:
            raise ConfigError(
                "anchors: a training row has no offsets; they were computed for other rows, "
                "another model or another emulator: compute them anew for these rows"
            )
        file, names = self._open(shard_file(shelf.folder, place, shelf.shard))
        return {name: file.get_tensor(f"{row}/{name}") for name in names}


def _open_shard(path: Path) -> tuple[Any, list[str]]:
    """Return an open file of offsets, and the names of the parts that each row has in it."""
    file: Any = safe_open(verified_file(path), framework="pt")
    return file, sorted({key.rpartition("/")[2] for key in file.keys()})  # noqa: SIM118
