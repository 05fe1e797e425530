"""The table of a folder of runs as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from emloc.report.lines import EMPTY, columns_of, lines_of
from emloc.report.rows import Row, rows_of


def table(folder: Path) -> str:
    """The runs below `folder` as a Markdown table, those that differ in the seed as one line."""
    rows = rows_of(folder)
    if not rows:
        return f"no runs in {folder}"
    lines = lines_of(rows)
    notes = [
        "through: the model that was trained through; train: peak memory of the training; "
        "seconds: of each stage when it was computed, of a step the median",
        *(["±: standard deviation over seeds"] if any("seeds" in line for line in lines) else []),
        *_data(rows),
        *_adapters(folder, rows),
    ]
    return "\n".join([markdown(lines), "", *notes])


def markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """Lines as a table whose columns stand below one another."""
    columns = columns_of(lines)
    cells = [columns, *([line.get(column, EMPTY) for column in columns] for line in lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [cells[0], rule, *cells[1:]]
    )


def _data(rows: Sequence[Row]) -> list[str]:
    """Which data the scores are about: a digest, because local copies and interpreters differ."""
    return [
        f"data of {task}: {name}"
        for task, name in sorted({(row.task, row.data) for row in rows if row.done})
    ]


def _adapters(folder: Path, rows: Sequence[Row]) -> list[str]:
    one = (folder / "status.json").exists()
    places = ((row, (folder if one else folder / row.run) / "adapter") for row in rows)
    return [f"adapter of {row.method}: {place}" for row, place in places if place.exists()]
