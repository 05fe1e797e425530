"""What a finished run or sweep holds, as tables and pictures for whoever shows them.

Imports no torch, and matplotlib only to draw.
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

# Held-out rows of the table of predictions; the files have all of them.
PREDICTIONS = 200


@dataclass(frozen=True)
class Table:
    """Columns, and rows of numbers, words, truth values or None."""

    columns: list[str]
    rows: list[list[Any]]


def tables_of_run(folder: Path) -> dict[str, Table]:
    """Its predictions (the first `PREDICTIONS`), and each layer's compression and correction."""
    found = {
        "predictions": _table(_predictions(folder)),
        "layers": _table(_by_layer(folder / "layers.json")),
        "correction": _table(_by_layer(folder / "correction.json")),
    }
    return {name: table for name, table in found.items() if table.rows}


def table_of_runs(folder: Path) -> Table:
    """All runs below a folder: what they are, the settings in which they differ, their numbers."""
    rows = rows_of(folder)
    every = dict.fromkeys(name for row in rows for name in row.decisive)
    differ = [name for name in every if len({row.settings.get(name) for row in rows}) > 1]
    return _table(
        {name: getattr(row, name) for name in FIELDS}
        | {name: row.settings.get(name) for name in differ}
        | dict(row.numbers)
        for row in rows
    )


@contextmanager
def pictures_of(folder: Path) -> Iterator[dict[str, Path]]:
    """The figures of a run, or of the runs below a folder, as PNG files while they are needed.

    A figure of one run is called the same for all of them.
    """
    from emloc.report.figures import figures, save

    with TemporaryDirectory() as place:
        pictures = save(figures(rows_of(folder), folder), Path(place), ("png",))
        yield {path.stem.replace(f"_{folder.name}", ""): path for path in pictures}


def _predictions(folder: Path) -> list[dict[str, Any]]:
    """Loss (nats a token) of each held-out answer, with what the model answered if it was asked."""
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
    """A line for each layer; a file that is not about single layers has none."""
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
