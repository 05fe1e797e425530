"""A table as Markdown, with the notes below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emloc.config.paths import EXPERIMENTS
from emloc.report.markdown_table import markdown_table
from emloc.report.notes import data_digests, how_to_serve
from emloc.report.paper import paper_of
from emloc.report.rows import Row, rows_of
from emloc.report.rows.run_files import run_folder
from emloc.report.run_table import notes_of, table_of
from emloc.report.summary import summary_of
from emloc.report.summary_file import is_summary, read_summary
from emloc.report.table import Table


def table(place: Path) -> str:
    """The runs of a folder, of one run or of a CSV file as a Markdown table.

    Runs that differ in the seed alone are one line.
    """
    if is_summary(place):
        runs = table_of(read_summary(place))
        return "\n".join([markdown(runs), "", *notes_of(runs)])
    rows = rows_of(place)
    return table_with_notes(place, rows, unrun=False) if rows else f"no runs in {place}"


def table_with_notes(place: Path, rows: Sequence[Row], *, unrun: bool) -> str:
    """The Markdown table and notes of rows that were read from `place`, at least one.

    `unrun`: whether numbers of the paper that no run is about have lines, too.
    """
    paper = paper_of([row.experiment for row in rows], EXPERIMENTS)
    summary = summary_of(rows, paper, unrun=unrun)
    runs = table_of(summary)
    sources = paper.of_models(row.model for row in rows).sources
    of_runs = [*data_digests(rows), *_adapters(place, rows), *how_to_serve(place, rows)]
    notes = [*notes_of(runs, sources), *of_runs]
    return "\n".join([markdown(runs), "", *notes])


def markdown(table: Table, *, bold: bool = False) -> str:
    """The table with columns of one width each, and the best cells in bold if `bold`."""
    frame = table.marked("**{}**") if bold else table.frame
    return markdown_table(table.columns, frame.to_numpy().tolist())


def _adapters(place: Path, rows: Sequence[Row]) -> list[str]:
    paths = ((row, run_folder(place, row) / "adapter") for row in rows)
    return [f"adapter of {row.named_method}: {path}" for row, path in paths if path.exists()]
