"""Read the offline files of W&B with the inspector of wandb."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass
class OfflineRun:
    """An offline W&B run on disk, as `wandb sync` would upload it."""

    folder: Path

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """All records of the file `run-*.wandb`, in the order they were written."""
        (file,) = self.folder.glob("run-*.wandb")
        folders = dict.fromkeys(("HOME", "WANDB_CACHE_DIR"), str(self.folder / "inspected"))
        inspection = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
            env={**os.environ, **folders},
            capture_output=True,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in inspection.stdout.splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind, such as `history` or `artifact`."""
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def run(self) -> dict[str, Any]:
        return self.of("run")[0]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged metrics, without the keys that wandb adds and without tables and images."""
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
        """Rows of a logged table, each a dictionary column -> value."""
        (file,) = (self.folder / "files/media/table").glob(f"{name}_*.table.json")
        table = json.loads(file.read_text())
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def offline_runs(folder: Path) -> list[OfflineRun]:
    """Return the offline runs in a folder, in the order they were started."""
    return [OfflineRun(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]
