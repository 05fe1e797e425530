"""Columns of local data files: each name occurs once, and integers stay integers."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from emloc.errors import ConfigError

_INTEGER = re.compile(r"\s*[+-]?\d+\s*")


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


def restore_integers(data: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """The splits of CSV files with integers where the files have integers.

    The reader of CSV files turns a column of integers with empty cells into fractions: `1` becomes
    `1.0`.

    Args:
        data: split -> its rows as a `datasets.Dataset`.
        files: split -> its CSV file.
    """
    return {split: _with_integers(rows, Path(files[split])) for split, rows in data.items()}


def _with_integers(rows: Any, file: Path) -> Any:
    """The rows with integers in the columns of fractions whose cells are integers or empty."""
    import datasets

    table = rows.data.table
    gapped = [
        name
        for name in table.column_names
        if str(table.schema.field(name).type) == "double" and table[name].null_count
    ]
    integers = _integer_columns(file, gapped) if gapped else []
    if not integers:
        return rows
    for name in integers:
        column = table[name].cast("int64")
        table = table.set_column(table.column_names.index(name), name, column)
    return datasets.Dataset(datasets.table.InMemoryTable(table.replace_schema_metadata(None)))


def _integer_columns(file: Path, names: list[str]) -> list[str]:
    """Those of the named columns of a CSV file whose cells are integers or empty."""
    integers = set(names)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.DictReader(stream):
            integers -= {name for name in integers if row.get(name) and not _is_integer(row[name])}
    return [name for name in names if name in integers]


def _is_integer(cell: str) -> bool:
    """Whether a cell is empty or an integer that 64 bits hold exactly as a fraction, too."""
    return not cell.strip() or (bool(_INTEGER.fullmatch(cell)) and abs(int(cell)) < 2**53)
