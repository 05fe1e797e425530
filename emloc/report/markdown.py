"""A table as Markdown, and what has to be said below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emloc.config.paths import EXPERIMENTS
from emloc.report.markdown_table import markdown_table
from emloc.report.paper import Paper, paper_of
from emloc.report.rows import Row, rows_of
from emloc.report.run_table import table_of
from emloc.report.table import Table, split


def table(folder: Path) -> str:
    """The runs below `folder` as a Markdown table, those that differ in the seed as one line.

    Also of one run, and of a tidy CSV file of runs.
    """
    rows = rows_of(folder)
    return table_with_notes(folder, rows, unrun=False) if rows else f"no runs in {folder}"


def table_with_notes(place: Path, rows: Sequence[Row], *, unrun: bool) -> str:
    """The same of rows that were read from `place`, at least one.

    `unrun`: with lines of what the paper has and was not run.
    """
    paper = paper_of([row.experiment for row in rows], EXPERIMENTS)
    shown = table_of(rows, paper, unrun=unrun)
    return "\n".join([markdown(shown), "", *notes(shown, rows, paper), *_adapters(place, rows)])


def is_run(place: Path) -> bool:
    """Whether it is a single run."""
    return (place / "status.json").exists()


def markdown(shown: Table, *, bold: bool = False) -> str:
    """A table whose columns stand below one another, the best in bold if asked for."""

    def cell(index: int, column: str, word: str) -> str:
        if not bold or (index, column) not in shown.best:
            return word
        ours, aside = split(word)
        return f"**{ours}** {aside}".rstrip()

    columns = shown.columns
    cells = [
        [cell(index, *each) for each in zip(columns, words, strict=True)]
        for index, words in enumerate(shown.words())
    ]
    return markdown_table(columns, cells)


def notes(shown: Table, rows: Sequence[Row], paper: Paper) -> list[str]:
    """What has to be known to read the table."""
    columns = shown.columns
    sources = paper.of_models(row.model for row in rows).sources
    return [
        "through: the model that was trained through; train: peak memory of the training; "
        "seconds: of each stage when it was computed, of a step the median",
        *(["±: standard deviation over seeds"] if "seeds" in columns else []),
        *(f"paper: {source}; difference: ours less the paper's" for source in sources),
        *_data(rows),
    ]


def _data(rows: Sequence[Row]) -> list[str]:
    """Which data the scores are about: a digest, because local copies and interpreters differ."""
    return [
        f"data of {task}: {name}"
        for task, name in sorted({(row.task, row.data) for row in rows if row.done})
    ]


def _adapters(place: Path, rows: Sequence[Row]) -> list[str]:
    paths = ((row, (place if is_run(place) else place / row.run) / "adapter") for row in rows)
    return [f"adapter of {row.method}: {path}" for row, path in paths if path.exists()]
