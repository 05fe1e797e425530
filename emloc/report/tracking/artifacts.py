"""Results of a finished run or sweep as tables and images, for trackers.

The module imports no torch, and matplotlib only when images are requested.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from emloc.report.rows import FIELDS, rows_of

# Held-out rows in the table of predictions. The files of the run have all rows.
PREDICTIONS = 200


@dataclass(frozen=True)
class Table:
    """Columns and rows. A cell is a number, a word, a truth value or None."""

    columns: list[str]
    rows: list[list[Any]]


def tables_of_run(folder: Path) -> dict[str, Table]:
    """Return the first `PREDICTIONS` predictions, and each layer's compression and correction."""
    tables = {
        "predictions": _table(_predictions(folder)),
        "layers": _table(_by_layer(folder / "layers.json")),
        "correction": _table(_by_layer(folder / "correction.json")),
    }
    return {name: table for name, table in tables.items() if table.rows}


def table_of_runs(folder: Path) -> Table:
    """Return all runs in a folder: facts, the settings in which they differ, and numbers."""
    rows = rows_of(folder)
    names = dict.fromkeys(name for row in rows for name in row.decisive)
    differing = [name for name in names if len({row.settings.get(name) for row in rows}) > 1]
    return _table(
        {name: getattr(row, name) for name in FIELDS}
        | {name: row.settings.get(name) for name in differing}
        | dict(row.numbers)
        for row in rows
    )


@contextmanager
def pictures_of(folder: Path) -> Iterator[dict[str, Path]]:
    """Draw the figures of a run or of a folder of runs, and yield name -> PNG file.

    The files exist until the `with` block ends. Names leave out the run, so that figures of
    different runs have the same names.
    """
    from emloc.report.figures import figures, save

    with TemporaryDirectory() as temporary:
        pictures = save(figures(rows_of(folder), folder), Path(temporary), ("png",))
        yield {path.stem.replace(f"_{folder.name}", ""): path for path in pictures}


def _predictions(folder: Path) -> list[dict[str, Any]]:
    """Return the loss of each held-out answer (nats per token), and the generated answer if any."""
    answers = {line["id"]: line for line in _lines(folder / "answers.jsonl")}
    first = _lines(folder / "predictions.jsonl")[:PREDICTIONS]
    return [
        {
            "id": line["id"],
            "loss": line["nll"] / line["tokens"],
            **line,
            **answers.get(line["id"], {}),
        }
        for line in first
    ]


def _by_layer(path: Path) -> list[dict[str, Any]]:
    """Return a line for each layer; no line where the file is not about layers."""
    table = json.loads(path.read_text()) if path.exists() else {}
    return [
        {"layer": name} | {k: v for k, v in line.items() if not isinstance(v, dict)}
        for name, line in table.items()
        if isinstance(line, dict)
    ]


def _table(lines: Iterable[Mapping[str, Any]]) -> Table:
    lines = list(lines)
    columns = list(dict.fromkeys(name for line in lines for name in line))
    return Table(columns, [[_cell(line.get(name)) for name in columns] for line in lines])


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
