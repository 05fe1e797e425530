"""What the runs of a report were obtained with, each fact once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emloc.config.run_folder import find_runs
from emloc.report.rows import Row


def origin(place: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Distinct values over all runs, and the settings that all of them have, as JSON values.

    A file of rows keeps no versions and no device.
    """
    runs = [] if place.is_file() else find_runs(place)
    known = [found for run in runs if (found := run.metrics.get("provenance"))]
    return {
        "runs": len(rows),
        "experiments": _distinct(row.experiment for row in rows),
        "data": {task: _distinct(_data(task, rows)) for task in _distinct(r.task for r in rows)},
        "settings": _constant(rows),
        **_merged(known),
    }


def _data(task: str, rows: Iterable[Row]) -> list[str]:
    return [row.data for row in rows if row.task == task and row.data]


def _constant(rows: Sequence[Row]) -> dict[str, str]:
    """Settings that are the same in all rows."""
    first, *others = [set(row.settings.items()) for row in rows]
    return dict(sorted(first.intersection(*others)))


def _merged(known: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each key of several mappings with its distinct values, within mappings as well."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in known for key in one):
        values = [one[key] for one in known if one.get(key) is not None]
        inner = bool(values) and all(isinstance(value, Mapping) for value in values)
        merged[key] = _merged(values) if inner else _distinct(values)
    return merged


def _distinct(values: Iterable[Any]) -> list[Any]:
    """In the order they come up; JSON values need not be hashable."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
