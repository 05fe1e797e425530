"""Columns of local data files: each name occurs once, and cells keep their texts."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from emloc.errors import ConfigError

# Types of columns that the reader of CSV files makes of texts.
_DOUBLE = "float64"
_PARSED = ("int64", _DOUBLE, "bool")


def refuse_duplicate_columns(file: Path) -> None:
    """Check that no column of a data file occurs twice, as only one of them would be read.

    In .jsonl and .parquet files, `datasets` itself refuses such columns.

    Raises:
        ConfigError: a column occurs twice.
    """
    names = sorted(name for name, count in Counter(_column_names(file)).items() if count > 1)
    if names:
        raise ConfigError(
            f"task.path: {file} has several columns with the name {', '.join(names)}; rename them"
        )


def _column_names(file: Path) -> Iterable[str]:
    """Names of the columns of a data file, as often as they occur."""
    if file.suffix == ".csv":
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            return next(csv.reader(stream), [])
    if file.suffix == ".json":
        return _repeated_json_keys(file)
    return []


def _repeated_json_keys(file: Path) -> list[str]:
    """Keys that occur twice in one object of a JSON file, each twice."""
    repeated: dict[str, None] = {}

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        repeated.update({name: None for name, count in counts.items() if count > 1})
        return dict(pairs)

    try:
        json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=note)
    except ValueError:  # lines of JSON, or a file that `datasets` will refuse
        return []
    return [*repeated, *repeated]


def written_cells(rows: Any, file: Path) -> dict[str, list[str]]:
    """Cells of a CSV file as they are written, where Python would write their values otherwise.

    `1` is read as 1.0 in a column with empty cells, `007` as 7, `0.50` as 0.5 and `true` as True.

    Args:
        rows: the rows of the file as a `datasets.Dataset`.
        file: the CSV file.

    Returns:
        Column -> its cells without surrounding spaces, for the columns with such a cell.
    """
    names = [name for name, kind in rows.features.items() if getattr(kind, "dtype", "") in _PARSED]
    cells = _cells(file, names) if names else {}
    return {
        name: texts
        for name, texts in cells.items()
        if len(texts) == len(rows)
        and any(
            value is not None and str(value) != text
            for value, text in zip(rows[name], texts, strict=True)
        )
    }


def integer_cells(rows: Any) -> dict[str, list[str]]:
    """Integers of the columns that are stored as fractions because they have gaps.

    Tables of numbers have no gap in a column of integers. Many programs therefore store the
    integer 1 as 1.0 if another row has no value.

    Args:
        rows: the rows as a `datasets.Dataset`.

    Returns:
        Column -> its values as integers, and an empty text for each gap.
    """
    names = [name for name, kind in rows.features.items() if getattr(kind, "dtype", "") == _DOUBLE]
    values = {name: rows.data.table[name].to_numpy() for name in names}
    return {
        name: ["" if np.isnan(value) else str(int(value)) for value in column]
        for name, column in values.items()
        if np.isnan(column).any() and (column[~np.isnan(column)] % 1 == 0).all()
    }


def _cells(file: Path, names: list[str]) -> dict[str, list[str]]:
    """Column -> its cells without surrounding spaces, for the named columns of a CSV file."""
    limit = csv.field_size_limit(sys.maxsize)  # a cell may hold an image as text
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            cells: dict[str, list[str]] = {
                name: [] for name in names if name in (reader.fieldnames or ())
            }
            for row in reader:
                for name, texts in cells.items():
                    texts.append((row[name] or "").strip())
    finally:
        csv.field_size_limit(limit)
    return cells
