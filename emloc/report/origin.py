"""Provenance of a report: versions, device and shared settings of its runs, each fact once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emloc.config.run_folder import find_runs
from emloc.report.rows import Row


def origin(place: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Distinct values over all runs, and the settings that all of them share, as JSON values.

    A CSV file has no versions and no device.
    """
    runs = [] if place.is_file() else find_runs(place)
    provenances = [each for run in runs if (each := run.metrics.get("provenance"))]
    return {
        "runs": len(rows),
        "experiments": _distinct(row.experiment for row in rows),
        "data": {task: _distinct(_data(task, rows)) for task in _distinct(r.task for r in rows)},
        "settings": _shared_settings(rows),
        **_merged(provenances),
    }


def _data(task: str, rows: Iterable[Row]) -> list[str]:
    return [row.data for row in rows if row.task == task and row.data]


def _shared_settings(rows: Sequence[Row]) -> dict[str, str]:
    first, *others = [set(row.settings.items()) for row in rows]
    return dict(sorted(first.intersection(*others)))


def _merged(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each key of several mappings with its distinct values, also within mappings."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for mapping in mappings for key in mapping):
        values = [mapping[key] for mapping in mappings if mapping.get(key) is not None]
        is_nested = bool(values) and all(isinstance(value, Mapping) for value in values)
        merged[key] = _merged(values) if is_nested else _distinct(values)
    return merged


def _distinct(values: Iterable[Any]) -> list[Any]:
    """The distinct values in their order; JSON values need not be hashable."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct
