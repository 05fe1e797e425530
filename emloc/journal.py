"""What a stage has finished of a long piece of work, a line for each block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """`journal.jsonl` in a stage's folder: block -> what was noted when its file was written.

    A line follows its block's file. What an interrupted run left behind is put in order at once: a
    line that was cut off or whose file is gone is dropped, and its block has to be done again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "journal.jsonl"
        self.lines: dict[str, dict[str, Any]] = {}
        written = self._path.read_text() if self._path.exists() else ""
        for line in written.splitlines():
            entry = _parsed(line)
            if entry is not None and self.file(entry["block"]).exists():
                self.lines[entry["block"]] = entry
        kept = "".join(json.dumps(entry) + "\n" for entry in self.lines.values())
        if kept != written:
            draft = self._path.with_suffix(".draft")
            draft.write_text(kept)
            draft.rename(self._path)

    def file(self, block: str) -> Path:
        """The file of one block."""
        return self._folder / f"{block}.safetensors"

    def add(self, block: str, **facts: Any) -> None:
        """Note that the file of this block is written, and its size."""
        entry = {"block": block, **facts, "bytes": self.file(block).stat().st_size}
        self.lines[block] = entry
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:  # cut off when the run was killed
        return None
    return entry
