"""Journal of the blocks that a long stage has finished, so that it can be resumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from emloc.runtime.atomic import write_text
from emloc.runtime.manifest import file_hash

log = logging.getLogger(__name__)


class Journal:
    """The file `journal.jsonl` in a stage's folder, with one line of facts for each finished block.

    A block's line is written after the block's file and holds the size and hash of that file.
    Opening a journal removes the incomplete remains of an interrupted run: lines that were cut off,
    lines without their file, and files that differ from their line. Their blocks are computed
    again.

    `lines` maps the name of a finished block to its facts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "journal.jsonl"
        self.lines: dict[str, dict[str, Any]] = {}
        content = self._path.read_text() if self._path.exists() else ""
        for line in content.splitlines():
            entry = _parse_line(line)
            if entry is not None and self._is_whole(entry):
                self.lines[entry["block"]] = entry
        valid_content = "".join(json.dumps(entry) + "\n" for entry in self.lines.values())
        if valid_content != content:
            write_text(self._path, valid_content)

    def file(self, block: str) -> Path:
        """Return the path of the safetensors file of a block."""
        return self._folder / f"{block}.safetensors"

    def add(self, block: str, **facts: Any) -> None:
        """Append the line of a block whose file has been written, with the file's size and hash."""
        path = self.file(block)
        entry = {"block": block, **facts, "bytes": path.stat().st_size, "xxh3": file_hash(path)}
        self.lines[block] = entry
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        """Return whether a block's file agrees with its line; a file that does not is deleted."""
        path = self.file(entry["block"])
        if not path.exists():
            return False
        size = path.stat().st_size
        if size == entry.get("bytes") and file_hash(path) == entry.get("xxh3"):
            return True
        log.warning("%s: %s is damaged, so its block is computed again", self._folder, path.name)
        path.unlink()
        return False


def _parse_line(line: str) -> dict[str, Any] | None:
    """Return the facts of a line; None if the line was cut off."""
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:  # the process was killed while it wrote the line
        return None
    return entry
