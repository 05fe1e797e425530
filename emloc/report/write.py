"""The report of some runs as files in a folder: tables, figures and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from emloc.config.experiments import Experiment, experiment
from emloc.config.paths import EXPERIMENTS
from emloc.config.run_folder import DONE, is_run
from emloc.report.glossary import column_meanings
from emloc.report.grid import Grid
from emloc.report.latex import latex
from emloc.report.lead import lead_sentence
from emloc.report.markdown import markdown
from emloc.report.notes import are_of_several, data_digests, how_to_serve, left_out, sentence
from emloc.report.origin import origin
from emloc.report.page import Report, Section, page
from emloc.report.page_figures import write_figures
from emloc.report.paper import QUANTITIES, Paper, paper_of
from emloc.report.rows import Row, write_rows
from emloc.report.run_table import notes_of, number_notes, table_of
from emloc.report.summary import NOT_RUN, summary_of
from emloc.report.summary_file import write_summary
from emloc.report.table import Table
from emloc.report.task_table import HOW_TO_READ, task_table


@dataclass(frozen=True)
class _Part:
    """A table of the report; its Markdown and LaTeX files have its name."""

    name: str
    caption: str
    table: Table
    notes: Sequence[str]
    latex: str
    page_notes: Sequence[str]  # without those of columns, which are in the page's glossary


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
    common = _experiment_of(facts["experiments"])
    title = ", ".join(facts["experiments"])
    about = (common.about if common else "") or title
    parts = [*_by_task(common, rows, paper), _runs(place, about, summary, rows, paper)]
    to.mkdir(parents=True, exist_ok=True)
    figures, saved = write_figures(rows, place, to)
    report = Report(
        title=title,
        lead=[*([common.about] if common else []), lead_sentence(rows, facts, place)],
        sections=[_section(part) for part in parts],
        meanings=column_meanings(summary, parts[-1].table),
        figures=figures,
        origin=facts,
    )
    texts = {f"{part.name}.md": _markdown(part) for part in parts}
    texts |= {f"{part.name}.tex": part.latex for part in parts}
    texts |= {"provenance.json": json.dumps(facts, indent=1) + "\n", "report.html": page(report)}
    for name, text in texts.items():
        (to / name).write_text(text, encoding="utf-8")
    write_rows(rows, to / "runs.csv")
    write_summary(summary, to / "table.csv")
    return [*(to / name for name in (*texts, "runs.csv", "table.csv")), *saved]


def _markdown(part: _Part) -> str:
    notes = [f"* {note}" for note in part.notes]
    return "\n".join([markdown(part.table, bold=True), "", *notes, ""])


def _runs(
    place: Path, about: str, summary: pd.DataFrame, rows: Sequence[Row], paper: Paper
) -> _Part:
    """The table with a line for each method or cell that has results."""
    summary = summary[summary["state"].isin([DONE, NOT_RUN])]
    sources = paper.of_models(row.model for row in rows).sources
    table, printed = table_of(summary), table_of(summary, printed=True)
    of_runs = [*left_out(rows), *data_digests(rows), *how_to_serve(place, rows)]
    notes = [*notes_of(table, sources), *of_runs]
    printed_notes = [*notes_of(printed, sources), *left_out(rows)]
    label = f"{rows[0].experiment}-table"
    page_notes = [*number_notes(table, sources), *of_runs]
    text = latex(printed, about, printed_notes, label)
    return _Part("table", "Runs", table, notes, text, page_notes)


def _by_task(common: Experiment | None, rows: Sequence[Row], paper: Paper) -> list[_Part]:
    """A table by task for each quantity that the paper prints, where runs are on several tasks."""
    if common is None or not are_of_several(rows):
        return []
    parts = []
    for quantity in (QUANTITIES[name] for name in paper.quantities or ["score"]):
        table, failures = task_table(Grid(common, rows), paper, quantity)
        name, caption = f"by_task_{quantity.name}", f"{quantity.head} by task"
        about = f"{common.about} {sentence(caption)}".strip()
        notes = [HOW_TO_READ, *failures]
        text = latex(table, about, notes, f"{common.name}-{name}")
        parts.append(_Part(name, caption, table, notes, text, notes))
    return parts


def _experiment_of(names: Sequence[str]) -> Experiment | None:
    """The experiment of all runs; None if they are of several, or of one without a file."""
    files = [EXPERIMENTS / f"{name}.yaml" for name in names]
    return experiment(files[0]) if len(files) == 1 and files[0].exists() else None


def _section(part: _Part) -> Section:
    files = [f"{part.name}.md", f"{part.name}.tex"]
    files += ["table.csv", "runs.csv"] if part.name == "table" else []
    return Section(part.caption, part.table, part.page_notes, files)
