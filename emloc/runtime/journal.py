"""What a stage has finished of a long piece of work, a line for each block."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from emloc.runtime.atomic import write_text
from emloc.runtime.manifest import file_hash

log = logging.getLogger(__name__)


class Journal:
    """`journal.jsonl` in a stage's folder: block -> what was noted when its file was written.

    A line follows its block's file, with the file's size and hash. What an interrupted run left
    behind is put in order at once: a line that was cut off is dropped, and so are a line and a file
    that do not belong together. The block is then made again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "journal.jsonl"
        self.lines: dict[str, dict[str, Any]] = {}
        written = self._path.read_text() if self._path.exists() else ""
        for line in written.splitlines():
            entry = _parsed(line)
            if entry is not None and self._is_whole(entry):
                self.lines[entry["block"]] = entry
        kept = "".join(json.dumps(entry) + "\n" for entry in self.lines.values())
        if kept != written:
            write_text(self._path, kept)

    def file(self, block: str) -> Path:
        """The file of one block."""
        return self._folder / f"{block}.safetensors"

    def add(self, block: str, **facts: Any) -> None:
        """Note that the file of this block is written, its size and its hash."""
        path = self.file(block)
        entry = {"block": block, **facts, "bytes": path.stat().st_size, "xxh3": file_hash(path)}
        self.lines[block] = entry
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        """Whether the file is what the line says; one that is not is removed."""
        path = self.file(entry["block"])
        if not path.exists():
            return False
        size = path.stat().st_size
        if size == entry.get("bytes") and file_hash(path) == entry.get("xxh3"):
            return True
        log.warning("%s: %s is damaged, so its block is computed again", self._folder, path.name)
        path.unlink()
        return False


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:  # cut off when the run was killed
        return None
    return entry
