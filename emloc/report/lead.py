"""One sentence that says what the runs of a report are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emloc.report.rows import Row
from emloc.report.rows.run_files import read_run_file

_DIGITS = 12  # of a commit's name


def lead_sentence(rows: Sequence[Row], origin: Mapping[str, Any], place: Path) -> str:
    """Return models, tasks, held-out rows, seeds, commit, and how the runs ended.

    Args:
        rows: the runs, at least one.
        origin: as `origin(place, rows)` returns it.
        place: a folder of runs, one run, or a file of rows, which has no count of held-out rows.
    """
    counts = {read_run_file(place, row, "predictions.jsonl").count("\n") for row in rows} - {0}
    seeds = sorted({row.seed for row in rows})
    commits = [str(commit)[:_DIGITS] for commit in origin.get("commit", ())]
    parts = [
        f"{_names(row.model for row in rows)} on {_names(row.task for row in rows)}",
        *([f"scored on {_names(map(str, sorted(counts)))} held-out rows"] if counts else []),
        f"seed{'s' if len(seeds) > 1 else ''} {_names(map(str, seeds))}",
        *([f"commit {_names(commits)}"] if commits else []),
    ]
    states = Counter(row.state for row in rows)
    ends = ", ".join(f"{count} {state}" for state, count in states.items())
    return f"{len(rows)} run{'s' if len(rows) > 1 else ''} ({ends}) of {', '.join(parts)}."


def _names(words: Iterable[str]) -> str:
    """Join different words: `a`, `a and b`, `a, b and c`."""
    *first, last = dict.fromkeys(words)
    return f"{', '.join(first)} and {last}" if first else last
