"""Files in the folders of runs."""

from __future__ import annotations

from pathlib import Path

from emloc.report.rows import Row


def read_run_file(place: Path, row: Row, name: str) -> str:
    """Return the text of a run's file; empty where the run has no such file.

    Args:
        place: a folder of runs, one run, or a file of rows, beside which no runs lie.
        row: the run.
        name: of the file.
    """
    folder = place if (place / "status.json").exists() else place / row.run
    path = folder / name
    return path.read_text(encoding="utf-8") if row.done and path.exists() else ""
