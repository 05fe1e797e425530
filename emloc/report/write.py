"""The report of some runs as files in a folder: tables, figures and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from emloc.config.experiments import Experiment, experiment
from emloc.config.paths import EXPERIMENTS
from emloc.report.figures import drawings, save, save_records
from emloc.report.glossary import column_meanings
from emloc.report.grid import Grid
from emloc.report.latex import latex
from emloc.report.lead import lead_sentence
from emloc.report.markdown import is_run, markdown
from emloc.report.notes import are_of_several, data_digests, left_out
from emloc.report.origin import origin
from emloc.report.page import FIGURES, NARROW, PageFigure, Report, Section, page
from emloc.report.paper import QUANTITIES, Paper, paper_of
from emloc.report.rows import Row, write_rows
from emloc.report.run_table import notes_of, number_notes, table_of, without_failures
from emloc.report.summary import summary_of
from emloc.report.summary_file import write_summary
from emloc.report.table import Table
from emloc.report.task_table import HOW_TO_READ, task_table

if TYPE_CHECKING:
    from emloc.report.draw.drawing import Drawing

_CSS_PIXELS = 140  # of an inch of a figure, so that its text is as large as the page's


@dataclass(frozen=True)
class _Part:
    """A table of the report; its Markdown and LaTeX files have its name."""

    name: str
    caption: str
    table: Table
    notes: Sequence[str]
    printed: Table  # with the columns that a paper prints
    printed_caption: str
    printed_notes: Sequence[str]
    page_notes: Sequence[str]  # those of columns are in the page's glossary


def write_report(place: Path, rows: Sequence[Row], to: Path) -> list[Path]:
    """Write tables, figures and their page into `to`, and return the files.

    `table`: a line for each method or cell, as Markdown, LaTeX and CSV. `by_task_score`: a
    column for each task, where an experiment has several. `runs.csv`: all numbers of each run.
    Runs without results are in the CSV files alone; a note below each other table names them.

    Args:
        place: a folder of runs, one run, or a file of rows.
        rows: the rows of `place`, at least one.
        to: a folder, which is made if it is missing.
    """
    paper = paper_of([row.experiment for row in rows], EXPERIMENTS)
    summary = summary_of(rows, paper, unrun=not is_run(place))
    facts = origin(place, rows)
    known = _experiment_of(facts["experiments"])
    title = ", ".join(facts["experiments"])
    about = (known.about if known else "") or title
    parts = [*_by_task(known, rows, paper), _runs(about, summary, rows, paper)]
    to.mkdir(parents=True, exist_ok=True)
    drawn = drawings(rows, place)
    saved = _save_figures(drawn, drawings(rows, place, columns=1), to)
    report = Report(
        title=title,
        lead=[*([known.about] if known else []), lead_sentence(rows, facts, place)],
        sections=[_section(part) for part in parts],
        meanings=column_meanings(summary, parts[-1].table),
        figures=_page_figures(drawn),
        origin=facts,
    )
    texts = {f"{part.name}.md": _markdown(part) for part in parts}
    texts |= {f"{part.name}.tex": _latex(part, title) for part in parts}
    texts |= {"provenance.json": json.dumps(facts, indent=1) + "\n", "report.html": page(report)}
    for name, text in texts.items():
        (to / name).write_text(text, encoding="utf-8")
    write_rows(rows, to / "runs.csv")
    write_summary(summary, to / "table.csv")
    return [*(to / name for name in (*texts, "runs.csv", "table.csv")), *saved]


def _markdown(part: _Part) -> str:
    notes = [f"* {note}" for note in part.notes]
    return "\n".join([markdown(part.table, bold=True), "", *notes, ""])


def _latex(part: _Part, title: str) -> str:
    label = "-".join([*title.split(", "), part.name])
    return latex(part.printed, part.printed_caption, part.printed_notes, label)


def _runs(about: str, summary: pd.DataFrame, rows: Sequence[Row], paper: Paper) -> _Part:
    """The table with a line for each method or cell."""
    with_results = without_failures(summary)
    sources = paper.of_models(row.model for row in rows).sources
    tables = [table_of(with_results, printed=printed) for printed in (False, True)]
    notes = [[*notes_of(with_results, one, sources), *left_out(rows)] for one in tables]
    digests = data_digests(rows)
    page_notes = [*number_notes(tables[0], sources), *left_out(rows), *digests]
    return _Part(
        name="table",
        caption="Runs",
        table=tables[0],
        notes=[*notes[0], *digests],
        printed=tables[1],
        printed_caption=about,
        printed_notes=notes[1],
        page_notes=page_notes,
    )


def _by_task(known: Experiment | None, rows: Sequence[Row], paper: Paper) -> list[_Part]:
    """A table by task for each quantity that the paper prints, where runs are on several tasks."""
    if known is None or not are_of_several(rows):
        return []
    parts = []
    for quantity in (QUANTITIES[name] for name in paper.quantities or ["score"]):
        table, failures = task_table(Grid(known, rows), paper, quantity)
        notes = [HOW_TO_READ, *failures]
        name, caption = f"by_task_{quantity.name}", f"{quantity.head} by task"
        about = f"{known.about} {caption[0].upper()}{caption[1:]}."
        parts.append(_Part(name, caption, table, notes, table, about.strip(), notes, notes))
    return parts


def _experiment_of(names: Sequence[str]) -> Experiment | None:
    """The experiment of all runs; None if they are of several, or of one without a file."""
    files = [EXPERIMENTS / f"{name}.yaml" for name in names]
    return experiment(files[0]) if len(files) == 1 and files[0].exists() else None


def _section(part: _Part) -> Section:
    files = [f"{part.name}.md", f"{part.name}.tex"]
    files += ["table.csv", "runs.csv"] if part.name == "table" else []
    return Section(part.caption, part.table, part.page_notes, files)


def _save_figures(
    drawn: Mapping[str, Drawing], narrow: Mapping[str, Drawing], to: Path
) -> list[Path]:
    """Write each figure with its numbers, and once more for narrow screens."""
    figures, narrow_figures = (
        {stem: one.figure for stem, one in some.items()} for some in (drawn, narrow)
    )
    return [
        *save(figures, to / FIGURES, ("svg", "png", "pdf")),
        *save_records(drawn, to / FIGURES),
        *save(narrow_figures, to / NARROW, ("svg",)),
    ]


def _page_figures(drawn: Mapping[str, Drawing]) -> list[PageFigure]:
    figures = []
    for stem, one in drawn.items():
        width, _ = one.figure.get_size_inches()
        figures.append(PageFigure(stem, one.caption, one.alt, round(_CSS_PIXELS * width)))
    return figures
