"""Files in the folders of runs."""

from __future__ import annotations

from pathlib import Path

from emloc.config.run_folder import is_run
from emloc.report.rows import Row


def run_folder(place: Path, row: Row) -> Path:
    """Return the folder of a run. Of a run in a file of rows there is no such folder."""
    return place if is_run(place) else place / row.run


def read_run_file(place: Path, row: Row, name: str) -> str:
    """Return the text of a run's file; empty where the run has no such file.

    Args:
        place: a folder of runs, one run, or a file of rows, beside which no runs lie.
        row: the run.
        name: of the file.
    """
    path = run_folder(place, row) / name
    return path.read_text(encoding="utf-8") if row.done and path.exists() else ""
