"""A table as Markdown, with the notes below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emloc.config.paths import EXPERIMENTS
from emloc.report.markdown_table import markdown_table
from emloc.report.notes import data_digests
from emloc.report.paper import paper_of
from emloc.report.rows import Row, rows_of
from emloc.report.run_table import notes_of, table_of
from emloc.report.summary import summary_of
from emloc.report.summary_file import is_summary, read_summary
from emloc.report.table import Table, split


def table(place: Path) -> str:
    """The runs of a folder, of one run or of a CSV file as a Markdown table.

    Runs that differ in the seed alone are one line.
    """
    if is_summary(place):
        summary = read_summary(place)
        shown = table_of(summary)
        return "\n".join([markdown(shown), "", *notes_of(shown)])
    rows = rows_of(place)
    return table_with_notes(place, rows, unrun=False) if rows else f"no runs in {place}"


def table_with_notes(place: Path, rows: Sequence[Row], *, unrun: bool) -> str:
    """The Markdown table of rows that were read from `place`, at least one.

    `unrun`: with lines of what the paper has and was not run.
    """
    paper = paper_of([row.experiment for row in rows], EXPERIMENTS)
    summary = summary_of(rows, paper, unrun=unrun)
    shown = table_of(summary)
    sources = paper.of_models(row.model for row in rows).sources
    notes = [*notes_of(shown, sources), *data_digests(rows), *_adapters(place, rows)]
    return "\n".join([markdown(shown), "", *notes])


def is_run(place: Path) -> bool:
    """Whether the folder is that of a single run."""
    return (place / "status.json").exists()


def markdown(shown: Table, *, bold: bool = False) -> str:
    """A table whose columns are padded to one width each, the best cells in bold if asked for."""

    def cell(index: int, column: str, word: str) -> str:
        if not bold or (index, column) not in shown.best:
            return word
        ours, aside = split(word)
        return f"**{ours}** {aside}".rstrip()

    columns = shown.columns
    cells = (
        [cell(index, *each) for each in zip(columns, words, strict=True)]
        for index, words in enumerate(shown.words())
    )
    return markdown_table(columns, cells)


def _adapters(place: Path, rows: Sequence[Row]) -> list[str]:
    paths = ((row, (place if is_run(place) else place / row.run) / "adapter") for row in rows)
    return [f"adapter of {row.method}: {path}" for row, path in paths if path.exists()]
