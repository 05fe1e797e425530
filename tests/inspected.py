"""Read what wandb wrote of a run, with its own inspector."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass
class Entry:
    """A W&B run on disk, as `wandb sync` would read it."""

    folder: Path

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        (file,) = self.folder.glob("run-*.wandb")
        places = dict.fromkeys(("HOME", "WANDB_CACHE_DIR"), str(self.folder / "inspected"))
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
            env={**os.environ, **places},
            capture_output=True,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def run(self) -> dict[str, Any]:
        return self.of("run")[0]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines that were logged, without what wandb adds, tables and pictures."""
        lines = [
            {k: v for k, v in line["item"].items() if not k.startswith("_") and "._" not in k}
            for line in self.of("history")
        ]
        return [line for line in lines if not any(k.endswith(".path") for k in line)]

    @property
    def summary(self) -> dict[str, Any]:
        return {k: v for one in self.of("summary") for k, v in one["update"].items()}

    @property
    def exit_code(self) -> int:
        (end,) = self.of("exit")
        return end["exit_code"]

    def table(self, name: str) -> list[dict[str, Any]]:
        """Rows of a table, column -> value."""
        (file,) = (self.folder / "files/media/table").glob(f"{name}_*.table.json")
        table = json.loads(file.read_text())
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def entries(folder: Path) -> list[Entry]:
    """The offline runs in a folder, in the order they were begun."""
    return [Entry(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]
